//! What several scenario tests share: memory with stamps in its pages, a VMM whose hooks follow a script, and a relay that passes one
//! record at a time, so that a test decides what happens between any two of them.
#![allow(dead_code, unreachable_pub)]

use pageferry_client::{
    BlockRange, BlockSpec, ClearPages, Client, Config, DirtyLog, HookError, Hooks, IncomingOptions, JobStatus,
    NonConvergence, OutgoingOptions, Phase, StatePiece, Target,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_tests::files;
use pageferry_tests::in_process::InProcessAgent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest time for anything that takes milliseconds.
pub const SOON: Duration = Duration::from_secs(20);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block of guest memory; pages hold a stamp in their first bytes.
pub struct Ram {
    pub id: u32,
    pub gpa: u64,
    pub pages: u64,
    pub fd_offset: u64,
    pub fd: OwnedFd,
}

impl Ram {
    pub fn new(id: u32, gpa: u64, pages: u64, fd_offset: u64) -> Self {
        let ram = Self::without_seal(id, gpa, pages, fd_offset);
        files::seal(&ram.fd).unwrap();
        ram
    }

    fn without_seal(id: u32, gpa: u64, pages: u64, fd_offset: u64) -> Self {
        let fd = files::unsealed_memfd("ram", fd_offset + pages * PAGE_SIZE, MemfdFlags::empty()).unwrap();
        Self { id, gpa, pages, fd_offset, fd }
    }

    /// A block at an odd place.
    pub fn odd(pages: u64) -> Self {
        Self::new(3, 0x7000, pages, 0x5000)
    }

    /// The same, but its file can shrink.
    pub fn unsealed(pages: u64) -> Self {
        Self::without_seal(3, 0x7000, pages, 0x5000)
    }

    pub fn add_to(&self, client: &Client) {
        let name = format!("block{}", self.id);
        let block = files::block(self.id, &name, self.fd.as_fd(), self.pages * PAGE_SIZE);
        client.add_block(BlockSpec { gpa: self.gpa, fd_offset: self.fd_offset, ..block }).unwrap();
    }

    /// Writes a stamp without a mark in the log.
    pub fn write(&self, page: u64, stamp: u64) {
        rustix::io::pwrite(&self.fd, &stamp.to_le_bytes(), self.fd_offset + page * PAGE_SIZE).unwrap();
    }

    /// Writes a stamp as a guest's device does: the mark comes after the write.
    pub fn write_and_mark(&self, client: &Client, page: u64, stamp: u64) {
        self.write(page, stamp);
        client.log().mark(PageRange::new(self.gpa / PAGE_SIZE + page, 1));
    }

    pub fn stamp(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::pread(&self.fd, &mut bytes, self.fd_offset + page * PAGE_SIZE).unwrap(), 8);
        u64::from_le_bytes(bytes)
    }

    pub fn is_hole(&self, page: u64) -> bool {
        files::is_hole(&self.fd, self.fd_offset + page * PAGE_SIZE).unwrap()
    }

    /// Frees pages without a word to anyone.
    pub fn punch(&self, first: u64, count: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, flags, self.fd_offset + first * PAGE_SIZE, count * PAGE_SIZE).unwrap();
    }

    pub fn range(&self, first: u64, count: u64) -> BlockRange {
        BlockRange { block: self.id, offset: first * PAGE_SIZE, length: count * PAGE_SIZE }
    }
}

/// Where a script may step in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum At {
    Pause,
    Resume,
    SaveState,
    LoadState,
    Event(u32),
}

impl At {
    pub fn phase(phase: Phase) -> Self {
        Self::Event(phase as u32)
    }
}

/// What was asked of a VMM.
#[derive(Debug, Default)]
pub struct Asked {
    pub pauses: u64,
    pub resumes: u64,
    pub paused: bool,
    pub state: Vec<StatePiece>,
}

type Script = Box<dyn FnMut() -> Result<(), HookError> + Send>;
/// Runs in place of the clear hook of [`KvmLog`].
type OnClear = Box<dyn FnMut(&mut KvmLog, &BTreeSet<u64>) + Send>;

/// A model of KVM's dirty log with manual protect: reading it clears nothing, and a clear clears exactly what it is given.
#[derive(Debug, Default)]
pub struct KvmLog {
    /// Guest page numbers.
    pub dirty: BTreeSet<u64>,
}

/// A VMM whose hooks do what a test says.
#[derive(Default)]
pub struct Vmm {
    pub asked: Mutex<Asked>,
    scripts: Mutex<BTreeMap<At, Script>>,
    pub kvm: Mutex<KvmLog>,
    pub on_clear: Mutex<Option<OnClear>>,
}

impl Vmm {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn on(&self, at: At, script: impl FnMut() -> Result<(), HookError> + Send + 'static) {
        lock(&self.scripts).insert(at, Box::new(script));
    }

    pub fn off(&self, at: At) {
        lock(&self.scripts).remove(&at);
    }

    /// A hook that is not answered until what is returned is dropped.
    #[must_use]
    pub fn block(&self, at: At) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel::<()>();
        self.on(at, move || {
            // Only the end of the sender ends it.
            let _ = released.recv();
            Ok(())
        });
        release
    }

    fn run(&self, at: At) -> Result<(), HookError> {
        let script = lock(&self.scripts).remove(&at);
        let Some(mut script) = script else { return Ok(()) };
        let outcome = script();
        lock(&self.scripts).entry(at).or_insert(script);
        outcome
    }

    pub fn resumes(&self) -> u64 {
        lock(&self.asked).resumes
    }

    pub fn is_paused(&self) -> bool {
        lock(&self.asked).paused
    }
}

pub struct VmmHooks(pub Arc<Vmm>);

impl Hooks for VmmHooks {
    fn pause(&mut self) -> Result<(), HookError> {
        self.0.run(At::Pause)?;
        let mut asked = lock(&self.0.asked);
        asked.pauses += 1;
        asked.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.0.run(At::Resume)?;
        let mut asked = lock(&self.0.asked);
        asked.resumes += 1;
        asked.paused = false;
        Ok(())
    }

    fn sync_tracker(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        for page in &lock(&self.0.kvm).dirty {
            log.mark(PageRange::new(*page, 1));
        }
        Ok(())
    }

    fn clear_tracker(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        let set = |bit: &u64| pages.bitmap[(*bit / 64) as usize] >> (*bit % 64) & 1 == 1;
        let bits = (0..pages.bitmap.len() as u64 * 64).filter(set);
        let given: BTreeSet<u64> = bits.map(|bit| pages.log_first_page + bit).collect();
        let mut kvm = lock(&self.0.kvm);
        match lock(&self.0.on_clear).as_mut() {
            Some(on_clear) => on_clear(&mut kvm, &given),
            None => kvm.dirty.retain(|page| !given.contains(page)),
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        self.0.run(At::SaveState)?;
        Ok(vec![StatePiece { name: "vcpu".into(), bytes: vec![5; 3000] }])
    }

    fn load_state(&mut self, state: Vec<StatePiece>) -> Result<(), HookError> {
        self.0.run(At::LoadState)?;
        lock(&self.0.asked).state = state;
        Ok(())
    }

    fn event(&mut self, status: &JobStatus) {
        // An event cannot fail.
        let _ = self.0.run(At::phase(status.phase));
    }
}

/// A VMM with its agent; fields drop in order, so the connection closes before the agent is waited for.
pub struct Side {
    pub client: Client,
    pub vmm: Arc<Vmm>,
    pub ram: Arc<Ram>,
    pub agent: InProcessAgent,
}

impl Side {
    pub fn new(ram: Ram) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let config = Config { log_covers: 1 << 30, ..Config::default() };
        let (client, channel) = Client::from_socket(socket, config).unwrap();
        let vmm = Vmm::new();
        channel.spawn(VmmHooks(vmm.clone())).unwrap();
        ram.add_to(&client);
        Self { client, vmm, ram: Arc::new(ram), agent }
    }

    /// Waits for a guest at `path`; returns the job.
    pub fn listen(&self, path: &Path, options: &IncomingOptions) -> u64 {
        let listen = Target::Address(format!("unix:{}", path.display()));
        self.client.start_incoming(listen, options).unwrap().job
    }

    /// Sends the guest to `path`; returns the job.
    pub fn send(&self, path: &Path, options: &OutgoingOptions) -> u64 {
        let target = Target::Address(format!("unix:{}", path.display()));
        self.client.start_outgoing(target, options).unwrap().job
    }

    pub fn wait(&self, job: u64) -> JobStatus {
        self.client.wait(job, SOON).unwrap()
    }

    pub fn write(&self, page: u64, stamp: u64) {
        self.ram.write_and_mark(&self.client, page, stamp);
    }
}

/// Runs `running` passes over the running guest, and one over the stopped one.
pub fn passes(running: u32) -> OutgoingOptions {
    OutgoingOptions {
        // Never met, so that as many passes run as the test wants.
        downtime_limit: Duration::ZERO,
        max_passes: running,
        policy: NonConvergence::StopAnyway,
        ..OutgoingOptions::default()
    }
}

/// A record on its way.
pub struct Passing {
    link: usize,
    pub to_destination: bool,
    pub kind: Kind,
    pub header: RecordHeader,
    pub payload: Vec<u8>,
}

impl Passing {
    pub fn is(&self, kind: Kind, number: u64) -> bool {
        self.kind == kind && self.header.number() == number
    }

    /// True if it carries content or zeroes of this page.
    pub fn carries(&self, page: u64) -> bool {
        let range = self.header.range();
        matches!(self.kind, Kind::Data | Kind::Zero) && range.first <= page && page < range.end()
    }

    pub fn bytes(&self) -> Vec<u8> {
        [self.header.to_wire().as_slice(), &self.payload].concat()
    }
}

struct Link {
    source: UnixStream,
    destination: UnixStream,
}

/// Stands between the agents, on the test's own thread.
pub struct Relay {
    pub folder: tempfile::TempDir,
    listener: UnixListener,
    links: Vec<Link>,
    /// All that was passed on.
    pub seen: Vec<Passing>,
}

impl Relay {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("relay")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { folder, listener, links: Vec::new(), seen: Vec::new() }
    }

    /// Where the source goes.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("relay")
    }

    /// Where the destination listens.
    pub fn destination(&self) -> PathBuf {
        self.folder.path().join("destination")
    }

    fn accept(&mut self) {
        while let Ok((source, _)) = self.listener.accept() {
            source.set_nonblocking(false).unwrap();
            let destination = UnixStream::connect(self.destination()).unwrap();
            for end in [&source, &destination] {
                end.set_read_timeout(Some(SOON)).unwrap();
                end.set_write_timeout(Some(SOON)).unwrap();
            }
            self.links.push(Link { source, destination });
        }
    }

    /// The next record of either side, not passed on yet; `None` if nothing comes for a moment. A link whose end closed is closed.
    fn next(&mut self) -> Option<Passing> {
        self.accept();
        for index in 0..self.links.len() {
            for to_destination in [true, false] {
                let link = &self.links[index];
                let from = if to_destination { &link.source } else { &link.destination };
                let mut polled = [PollFd::new(from, PollFlags::IN)];
                if poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 0 {
                    continue;
                }
                match read_record(from) {
                    Some((kind, header, payload)) => {
                        return Some(Passing { link: index, to_destination, kind, header, payload });
                    }
                    None => {
                        let link = self.links.remove(index);
                        // Either may be closed already.
                        let _ = link.source.shutdown(Shutdown::Both);
                        let _ = link.destination.shutdown(Shutdown::Both);
                        return None;
                    }
                }
            }
        }
        std::thread::yield_now();
        None
    }

    pub fn pass(&mut self, record: Passing) {
        let link = &self.links[record.link];
        let mut to = if record.to_destination { &link.destination } else { &link.source };
        // Whoever closed gets no more.
        let _ = to.write_all(&record.bytes());
        self.seen.push(record);
    }

    /// Passes only the first `bytes` of a record on, and cuts all links.
    pub fn cut_in(&mut self, record: &Passing, bytes: usize) {
        let link = &self.links[record.link];
        let mut to = if record.to_destination { &link.destination } else { &link.source };
        to.write_all(&record.bytes()[..bytes]).unwrap();
        self.cut();
    }

    /// Passes only the first `bytes` of a record on, and cuts the link that it came on.
    pub fn cut_one(&mut self, record: &Passing, bytes: usize) {
        let link = self.links.remove(record.link);
        let mut to = if record.to_destination { &link.destination } else { &link.source };
        to.write_all(&record.bytes()[..bytes]).unwrap();
        // Either may be closed already.
        let _ = link.source.shutdown(Shutdown::Both);
        let _ = link.destination.shutdown(Shutdown::Both);
    }

    /// Passes everything on until a record comes that is wanted, which is held back.
    pub fn until(&mut self, mut wanted: impl FnMut(&Passing) -> bool) -> Passing {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(record) = self.next() {
                if wanted(&record) {
                    return record;
                }
                self.pass(record);
            }
            assert!(Instant::now() < deadline, "the record did not come");
        }
    }

    /// Passes everything on until the job ended.
    pub fn finish(&mut self, side: &Side, job: u64) -> JobStatus {
        let deadline = Instant::now() + SOON;
        loop {
            while let Some(record) = self.next() {
                self.pass(record);
            }
            let status = side.client.status().unwrap();
            assert_eq!(status.job, job);
            if status.phase.is_final() {
                // What was said last.
                while let Some(record) = self.next() {
                    self.pass(record);
                }
                return status;
            }
            assert!(Instant::now() < deadline, "stuck: {status:?}");
        }
    }

    pub fn cut(&mut self) {
        for link in self.links.drain(..) {
            // Either may be closed already.
            let _ = link.source.shutdown(Shutdown::Both);
            let _ = link.destination.shutdown(Shutdown::Both);
        }
    }
}

/// Reads a record from a blocking socket; `None` at the end.
pub fn read_record(mut from: &UnixStream) -> Option<(Kind, RecordHeader, Vec<u8>)> {
    let mut bytes = [0; RECORD_SIZE];
    from.read_exact(&mut bytes).ok()?;
    let header = RecordHeader::from_wire(bytes);
    let kind = header.check().unwrap();
    let mut payload = vec![0; header.payload_length()];
    from.read_exact(&mut payload).ok()?;
    Some((kind, header, payload))
}

/// Migrates from `source` to a new destination without a relay, and checks that all stamps and holes arrived.
pub fn migrates_next_time(source: &Side) {
    let ram = &source.ram;
    let destination = Side::new(Ram::new(ram.id, ram.gpa, ram.pages, ram.fd_offset));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("next");
    let incoming = destination.listen(&path, &IncomingOptions::default());
    let outgoing = source.send(&path, &passes(1));
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    assert_eq!(destination.wait(incoming).phase, Phase::Completed);
    assert!(source.vmm.is_paused());
    assert_eq!(destination.vmm.resumes(), 1);
    assert_same(&source.ram, &destination.ram);
}

/// All pages hold the same, and nothing is allocated at the destination that is not at the source.
pub fn assert_same(source: &Ram, destination: &Ram) {
    for page in 0..source.pages {
        assert_eq!(destination.stamp(page), source.stamp(page), "page {page}");
        assert!(
            destination.is_hole(page) || !source.is_hole(page),
            "page {page} is allocated at the destination alone"
        );
    }
}
