// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A scripted VMM that saves its guest to images and restores it from them.

use super::{Host, SOON, ScriptedHooks, ScriptedVmm, images, lock};
use crate::deadline::{wait_for, wait_until};
use crate::memory::{BlockLayout, TestBlock, TestMemory, of_clone};
use crate::random::page_content;
use crate::require;
use pageferry_agent::image::Chain;
use pageferry_client::{
    BlockRange, Client, Config, Error, JobStatus, MIN_BANDWIDTH, Parameters, Phase, RestoreMode,
    RestoreOptions, SnapshotOptions, Trackers,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Number of pages of most guests: 8 MiB.
pub const PAGES: u64 = 2048;

/// A VMM with its memory.
#[derive(Debug)]
pub struct Guest {
    /// Its connection.
    pub client: Client,
    /// Its hooks.
    pub vmm: Arc<ScriptedVmm>,
    /// Its memory.
    pub memory: Arc<TestMemory>,
}

impl Guest {
    /// A guest with one empty block.
    pub fn new(host: &Host, pages: u64) -> Self {
        Self::of(host, vec![BlockLayout::ram(pages * PAGE_SIZE)], Config::default())
    }

    /// A guest with one block, and content in all its pages.
    pub fn full(host: &Host, pages: u64) -> Self {
        let guest = Self::new(host, pages);
        guest.fill(0..pages, 1);
        guest
    }

    /// A guest with one empty block, whose VMM waits no longer than this for its agent.
    pub fn hasty(host: &Host, pages: u64, request_timeout: Duration) -> Self {
        let config = Config { request_timeout, ..Config::default() };
        let guest = Self::of(host, vec![BlockLayout::ram(pages * PAGE_SIZE)], config);
        guest.fill(0..pages, 1);
        guest
    }

    /// A guest with empty blocks of these layouts.
    pub fn of(host: &Host, layouts: Vec<BlockLayout>, config: Config) -> Self {
        Self::with(host, config, |_| layouts)
    }

    /// A guest whose memory is private mappings of the base of an image, which has one block. It
    /// becomes a clone by a restore with [`cloning`].
    pub fn clone_of(host: &Host, image: &Path) -> Self {
        Self::with(host, Config::default(), |client| {
            let length = client.open_base(image).unwrap().block(0).unwrap().length;
            of_clone(client, image, vec![BlockLayout::ram(length)]).unwrap()
        })
    }

    /// A clone of an image that runs and has all its memory.
    #[track_caller]
    pub fn cloned(host: &Host, image: &Path) -> Self {
        let guest = Self::clone_of(host, image);
        assert_completed(&guest.restored(image, &cloning()));
        guest
    }

    fn with(
        host: &Host, config: Config, layouts: impl FnOnce(&Client) -> Vec<BlockLayout>,
    ) -> Self {
        let (client, channel) = Client::connect(host.agent.socket(), config).unwrap();
        let vmm = ScriptedVmm::new();
        channel.spawn(ScriptedHooks(vmm.clone())).unwrap();
        let memory = Arc::new(TestMemory::new(layouts(&client)).unwrap());
        memory.add_to(&client).unwrap();
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        Self { client, vmm, memory }
    }

    /// Connects to the host's present agent.
    pub fn reattach(&self, host: &Host) {
        self.client
            .reattach(host.agent.socket())
            .unwrap()
            .spawn(ScriptedHooks(self.vmm.clone()))
            .unwrap();
    }

    /// Its first block.
    pub fn block(&self) -> &TestBlock {
        &self.memory.blocks()[0]
    }

    /// Fills pages with the content of `seed`, and marks them.
    pub fn fill(&self, pages: std::ops::Range<u64>, seed: u64) {
        let pages = PageRange::new(pages.start, pages.end - pages.start);
        self.block().fill(pages, seed).unwrap();
        self.block().mark(pages);
    }

    /// Writes to a page like the guest, and marks it.
    pub fn write(&self, page: u64, value: u64) {
        self.block().store(page * PAGE_SIZE + 8, value).unwrap();
        self.block().mark(PageRange::new(page, 1));
    }

    /// Checks that every page can be written through the mapping without a fault that waits for an
    /// agent. The content stays as it is.
    #[track_caller]
    pub fn assert_free(&self) {
        assert!(!self.vmm.is_paused(), "the guest is paused");
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

    /// Pages of the first block as a discard or a populate names them.
    pub fn range(&self, first: u64, count: u64) -> BlockRange {
        BlockRange {
            block: self.block().id(),
            offset: first * PAGE_SIZE,
            length: count * PAGE_SIZE,
        }
    }

    /// Checks that each page of the first block holds what [`Guest::fill`] wrote with this seed.
    #[track_caller]
    pub fn assert_holds(&self, seed: u64) {
        let block = self.block();
        for page in 0..block.pages() {
            assert!(block.read_page(page).unwrap() == page_content(seed, page), "page {page:#x}");
        }
    }

    /// All bytes of the first block.
    pub fn bytes(&self) -> Vec<u8> {
        images::bytes_of(self.block())
    }

    /// Starts a snapshot. Returns the job.
    pub fn snapshot(&self, path: &Path, options: &SnapshotOptions) -> u64 {
        self.client.start_snapshot(path, options).unwrap().job
    }

    /// Starts a restore. Returns the job.
    pub fn restore(&self, path: &Path, options: &RestoreOptions) -> u64 {
        self.client.start_restore(path, options).unwrap().job
    }

    /// Restores, and returns the final status.
    pub fn restored(&self, path: &Path, options: &RestoreOptions) -> JobStatus {
        self.wait(self.restore(path, options))
    }

    /// Removes the bandwidth limit of a job, if it has not ended.
    pub fn hurry(&self) {
        match self.client.set_parameters(&Parameters::bandwidth(0)) {
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits for the end of a job.
    pub fn wait(&self, job: u64) -> JobStatus {
        self.client.wait(job, SOON).unwrap()
    }

    /// Saves the guest, and checks that the job completed.
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
        assert_eq!(status.phase, phase, "{}", status.error_text());
        status
    }

    /// Checks that the memory and the image are the same, byte for byte.
    #[track_caller]
    pub fn check(&self, chain: &Chain) {
        images::assert_saved(&self.memory, &self.client, chain);
    }

    /// True if none of its memory is allocated.
    pub fn is_hole(&self) -> bool {
        self.memory.blocks().iter().all(|block| block.is_hole(block.all()).unwrap())
    }

    /// How often the VMM was told that memory is lost.
    pub fn losses(&self) -> u64 {
        lock(&self.vmm.asked).lost
    }
}

/// Checks that the job completed.
#[track_caller]
pub fn assert_completed(status: &JobStatus) {
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
}

/// Checks that the job failed, and that its error contains these words.
#[track_caller]
pub fn assert_failed(status: &JobStatus, with: &[&str]) {
    assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
    for text in with {
        assert!(status.error_text().contains(text), "no \"{text}\" in: {}", status.error_text());
    }
}

/// A snapshot of a running guest.
pub fn background() -> SnapshotOptions {
    SnapshotOptions::default()
}

/// Such a snapshot at the lowest bandwidth. It does not end by itself, but pages that the guest
/// writes are still saved before the write.
pub fn endless(options: SnapshotOptions) -> SnapshotOptions {
    SnapshotOptions { bandwidth: MIN_BANDWIDTH, ..options }
}

/// A restore that loads all memory before the guest runs.
pub fn eager() -> RestoreOptions {
    RestoreOptions::default()
}

/// A restore that loads the pages that the guest touches, and meanwhile the rest.
pub fn lazy() -> RestoreOptions {
    RestoreOptions { mode: RestoreMode::Lazy, ..RestoreOptions::default() }
}

/// A lazy restore of a clone.
pub fn cloning() -> RestoreOptions {
    RestoreOptions { shared_base: true, ..lazy() }
}

/// These options at the lowest bandwidth. The restore does not end by itself, but pages that the
/// guest touches are still loaded.
pub fn slow(options: RestoreOptions) -> RestoreOptions {
    RestoreOptions { bandwidth: MIN_BANDWIDTH, ..options }
}

/// The modes of a snapshot that this machine supports.
pub fn snapshot_modes() -> Vec<SnapshotOptions> {
    if require::uffd() { vec![background(), images::paused()] } else { vec![images::paused()] }
}

/// The modes of a restore that this machine supports.
pub fn restore_modes() -> Vec<RestoreOptions> {
    if require::uffd() { vec![eager(), lazy()] } else { vec![eager()] }
}

/// The offset in the image at which a write failed, according to the error.
#[track_caller]
pub fn byte_of(error: &str) -> u64 {
    let (_, rest) =
        error.split_once("cannot write at byte 0x").unwrap_or_else(|| panic!("{error}"));
    u64::from_str_radix(rest.split(':').next().unwrap(), 16).unwrap()
}
