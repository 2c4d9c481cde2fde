//! An agent that is a process, a VMM in this one whose hooks follow a script, and folders for
//! images.

pub use super::images::{on, paused, tracked};
use super::{PROGRAM, Peer, SOON, Vmm, VmmHooks, images, lock};
use pageferry_agent::image::Chain;
use pageferry_client::{
    BlockRange, Client, Config, Error, JobStatus, MIN_BANDWIDTH, Phase, RestoreMode,
    RestoreOptions, SnapshotOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::memory::{BlockLayout, TestBlock, TestMemory};
use pageferry_tests::process::AgentProcess;
use pageferry_tests::require;
use pageferry_tests::tmpfs::{Tmpfs, View};
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// Pages of most guests: 8 MiB.
pub const PAGES: u64 = 2048;

/// A folder for images, as the agent names it, and as it is found from here.
pub struct Folder {
    agents: PathBuf,
    view: Option<View>,
}

impl Folder {
    /// A path for the agent.
    pub fn path(&self, name: &str) -> PathBuf {
        self.agents.join(name)
    }

    /// The same file from here.
    pub fn seen(&self, name: &str) -> PathBuf {
        self.view.as_ref().map_or_else(|| self.agents.clone(), View::path).join(name)
    }

    /// The names of all that is in it.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.seen("")).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Names and bytes of all that is in it.
    pub fn bytes(&self) -> Vec<(String, Vec<u8>)> {
        self.files()
            .into_iter()
            .map(|name| (name.clone(), std::fs::read(self.seen(&name)).unwrap()))
            .collect()
    }

    pub fn free(&self) -> u64 {
        self.view.as_ref().unwrap().free().unwrap()
    }

    /// Fills it until this many bytes are free.
    pub fn fill(&self, left: u64) {
        let ballast = self.free().checked_sub(left).unwrap();
        std::fs::write(self.seen("ballast"), vec![1; ballast as usize]).unwrap();
        assert_eq!(self.free(), left);
    }

    /// Takes away what [`Folder::fill`] put there.
    pub fn relieve(&self) {
        std::fs::remove_file(self.seen("ballast")).unwrap();
    }
}

/// An agent as a process, and a folder for images.
pub struct Host {
    pub agent: AgentProcess,
    pub images: Folder,
    home: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let agent = AgentProcess::spawn(OsStr::new(PROGRAM), home.path(), "agent").unwrap();
        Self { agent, images: Folder { agents: folder_in(&home), view: None }, home }
    }

    /// The agent may do no more than any user. `None` if this machine lacks the need `nobody`: the
    /// user of that name cannot run it.
    pub fn unprivileged() -> Option<Self> {
        const NOBODY: u32 = 65534;
        if !rustix::process::geteuid().is_root() {
            return Some(Self::new());
        }
        let home = tempfile::tempdir().unwrap();
        let agents = folder_in(&home);
        for folder in [home.path(), &agents] {
            std::os::unix::fs::chown(folder, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let agent = AgentProcess::start(
            Command::new(PROGRAM).uid(NOBODY).gid(NOBODY),
            home.path(),
            "agent",
        );
        let agent = require::met("nobody", agent.map_err(Into::into))?;
        Some(Self { agent, images: Folder { agents, view: None }, home })
    }

    /// The folder has room for this many bytes.
    pub fn cramped(tmpfs: Tmpfs, bytes: u64) -> Self {
        let home = tempfile::tempdir().unwrap();
        let agents = folder_in(&home);
        let mut command = tmpfs.command(&agents, bytes, OsStr::new(PROGRAM));
        let mut agent = AgentProcess::start(&mut command, home.path(), "agent").unwrap();
        let view = View::of(agent.process().id(), &agents).unwrap();
        Self { agent, images: Folder { agents, view: Some(view) }, home }
    }

    /// Another agent in the place of the first, which was killed or is now.
    pub fn replace_agent(&mut self) {
        self.agent.process().kill().unwrap();
        self.agent = AgentProcess::spawn(OsStr::new(PROGRAM), self.home.path(), "agent").unwrap();
    }

    /// How the last job stands, as an operator sees it.
    pub fn status(&self) -> JobStatus {
        Peer::connect(self.agent.socket()).status()
    }

    /// How the last job ended, as an operator sees it.
    pub fn ended(&self) -> JobStatus {
        let mut operator = Peer::connect(self.agent.socket());
        wait_for("the job's end", SOON, || {
            Some(operator.status()).filter(|status| status.phase.is_final())
        })
        .unwrap()
    }
}

fn folder_in(home: &tempfile::TempDir) -> PathBuf {
    let folder = home.path().join("images");
    std::fs::create_dir(&folder).unwrap();
    folder
}

/// A VMM with its memory.
pub struct Guest {
    pub client: Client,
    pub vmm: Arc<Vmm>,
    pub memory: Arc<TestMemory>,
}

impl Guest {
    /// One block, empty.
    pub fn new(host: &Host, pages: u64) -> Self {
        Self::of(host, vec![BlockLayout::ram(pages * PAGE_SIZE)], Config::default())
    }

    /// One block, all of whose pages hold something.
    pub fn full(host: &Host, pages: u64) -> Self {
        let guest = Self::new(host, pages);
        guest.fill(0..pages, 1);
        guest
    }

    /// The same, and it waits for its agent no longer than this.
    pub fn hasty(host: &Host, pages: u64, request_timeout: Duration) -> Self {
        let config = Config { request_timeout, ..Config::default() };
        let guest = Self::of(host, vec![BlockLayout::ram(pages * PAGE_SIZE)], config);
        guest.fill(0..pages, 1);
        guest
    }

    pub fn of(host: &Host, layouts: Vec<BlockLayout>, config: Config) -> Self {
        Self::with(host, Arc::new(TestMemory::new(layouts).unwrap()), config)
    }

    fn with(host: &Host, memory: Arc<TestMemory>, config: Config) -> Self {
        let (client, channel) = Client::connect(host.agent.socket(), config).unwrap();
        let vmm = Vmm::new();
        channel.spawn(VmmHooks(vmm.clone())).unwrap();
        memory.add_to(&client).unwrap();
        client.set_trackers(pageferry_client::Trackers::LOG_IS_COMPLETE).unwrap();
        Self { client, vmm, memory }
    }

    /// Goes on with the agent that is there now.
    pub fn reattach(&self, host: &Host) {
        self.client
            .reattach(host.agent.socket())
            .unwrap()
            .spawn(VmmHooks(self.vmm.clone()))
            .unwrap();
    }

    pub fn block(&self) -> &TestBlock {
        &self.memory.blocks()[0]
    }

    /// Fills pages with what `seed` gives, and marks them.
    pub fn fill(&self, pages: std::ops::Range<u64>, seed: u64) {
        let pages = PageRange::new(pages.start, pages.end - pages.start);
        self.block().fill(pages, seed).unwrap();
        self.block().mark(pages);
    }

    /// Writes to a page as the guest does, and marks it.
    pub fn write(&self, page: u64, value: u64) {
        self.block().store(page * PAGE_SIZE + 8, value).unwrap();
        self.block().mark(PageRange::new(page, 1));
    }

    /// Every page can be written through the mapping, and nobody is asked about it. What it holds
    /// stays.
    #[track_caller]
    pub fn assert_free(&self) {
        assert!(!self.vmm.is_paused(), "the guest stands still");
        let memory = self.memory.clone();
        let writing = std::thread::spawn(move || {
            for block in memory.blocks() {
                for at in (0..block.pages()).map(|page| page * PAGE_SIZE + 16) {
                    block.store(at, block.load(at).unwrap()).unwrap();
                }
            }
        });
        wait_until("every page to be written", SOON, || writing.is_finished()).unwrap();
        writing.join().unwrap();
    }

    pub fn range(&self, first: u64, count: u64) -> BlockRange {
        BlockRange {
            block: self.block().id(),
            offset: first * PAGE_SIZE,
            length: count * PAGE_SIZE,
        }
    }

    /// All bytes of the first block.
    pub fn bytes(&self) -> Vec<u8> {
        images::bytes_of(self.block())
    }

    pub fn snapshot(&self, path: &Path, options: &SnapshotOptions) -> u64 {
        self.client.start_snapshot(path, options).unwrap().job
    }

    pub fn restore(&self, path: &Path, options: &RestoreOptions) -> u64 {
        self.client.start_restore(path, options).unwrap().job
    }

    /// Restores, however that ends.
    pub fn restored(&self, path: &Path, options: &RestoreOptions) -> JobStatus {
        self.wait(self.restore(path, options))
    }

    /// Lifts the limit of a job, if that has not ended by itself.
    pub fn hurry(&self) {
        match self.client.set_parameters(&Default::default()) {
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    pub fn wait(&self, job: u64) -> JobStatus {
        self.client.wait(job, SOON).unwrap()
    }

    /// Saves, and it comes to its end.
    #[track_caller]
    pub fn saved(&self, host: &Host, name: &str, options: &SnapshotOptions) -> Chain {
        assert_completed(&self.wait(self.snapshot(&host.images.path(name), options)));
        Chain::open(&host.images.seen(name)).unwrap()
    }

    /// Waits until the job is in this phase.
    pub fn reaches(&self, phase: Phase) -> JobStatus {
        let seen = || {
            self.client
                .status()
                .ok()
                .filter(|status| status.phase == phase || status.phase.is_final())
        };
        let status = wait_for(phase.name(), SOON, seen).unwrap();
        assert_eq!(status.phase, phase, "{}", status.error);
        status
    }

    /// The memory is what the image says, byte for byte.
    #[track_caller]
    pub fn check(&self, chain: &Chain) {
        images::assert_saved(&self.memory, &self.client, chain);
    }

    pub fn is_hole(&self) -> bool {
        self.memory.blocks().iter().all(|block| block.is_hole(block.all()).unwrap())
    }

    /// How often its memory was lost.
    pub fn losses(&self) -> u64 {
        lock(&self.vmm.asked).lost
    }
}

#[track_caller]
pub fn assert_completed(status: &JobStatus) {
    assert_eq!((status.phase, &*status.error), (Phase::Completed, ""));
}

#[track_caller]
pub fn assert_failed(status: &JobStatus, with: &[&str]) {
    assert_eq!(status.phase, Phase::Failed, "{}", status.error);
    for text in with {
        assert!(status.error.contains(text), "no \"{text}\" in: {}", status.error);
    }
}

pub fn background() -> SnapshotOptions {
    SnapshotOptions::default()
}

/// One that would take for ever, but for what does not wait for its turn.
pub fn endless(options: SnapshotOptions) -> SnapshotOptions {
    SnapshotOptions { bandwidth: MIN_BANDWIDTH, ..options }
}

pub fn eager() -> RestoreOptions {
    RestoreOptions::default()
}

pub fn lazy() -> RestoreOptions {
    RestoreOptions { mode: RestoreMode::Lazy, ..RestoreOptions::default() }
}

/// One that would take for ever, but for what the guest touches.
pub fn slow(options: RestoreOptions) -> RestoreOptions {
    RestoreOptions { bandwidth: MIN_BANDWIDTH, ..options }
}

/// The modes of a restore that this machine has.
pub fn both() -> Vec<RestoreOptions> {
    if require::uffd() { vec![eager(), lazy()] } else { vec![eager()] }
}

/// The byte of the image at which it cannot be written, as the error says.
#[track_caller]
pub fn byte_of(error: &str) -> u64 {
    let (_, rest) =
        error.split_once("cannot write at byte 0x").unwrap_or_else(|| panic!("{error}"));
    u64::from_str_radix(rest.split(':').next().unwrap(), 16).unwrap()
}
