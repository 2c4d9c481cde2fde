//! A VMM, its agent, and a folder for images.

use pageferry_agent::image::Chain;
use pageferry_client::{Client, Config, JobStatus, Phase, SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestBlock, TestMemory};
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{Fault, HookName, MockVmm, PATIENCE, Tracker};
use std::path::PathBuf;
use std::sync::Arc;

/// The VMM goes first.
pub struct Scene {
    pub vmm: MockVmm,
    _agent: InProcessAgent,
    pub folder: tempfile::TempDir,
}

impl Scene {
    /// Blocks of these layouts, whose writes the guest marks itself.
    pub fn new(layouts: Vec<BlockLayout>) -> Self {
        let usage = Usage::new(Arc::new(TestMemory::new(layouts).unwrap())).unwrap();
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
        let vmm = MockVmm::new(client, channel, usage, Tracker::Log).unwrap();
        Self { vmm, _agent: agent, folder: tempfile::tempdir().unwrap() }
    }

    /// One block of `pages` pages, all of which hold something.
    pub fn full(pages: u64) -> Self {
        let scene = Self::new(vec![BlockLayout::ram(pages * PAGE_SIZE)]);
        scene.block().fill(PageRange::new(0, pages), 1).unwrap();
        scene
    }

    pub fn block(&self) -> &TestBlock {
        self.vmm.memory().block(0).unwrap()
    }

    pub fn client(&self) -> &Client {
        self.vmm.client()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Names in the folder.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Saves, however that ends.
    pub fn save(&self, name: &str, options: &SnapshotOptions) -> JobStatus {
        let started = self.client().start_snapshot(&self.path(name), options).unwrap();
        self.client().wait(started.job, PATIENCE).unwrap()
    }

    /// Saves, and it comes to its end.
    #[track_caller]
    pub fn saved(&self, name: &str, options: &SnapshotOptions) -> (JobStatus, Chain) {
        let status = self.save(name, options);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error);
        (status, Chain::open(&self.path(name)).unwrap())
    }

    /// Saves, which fails since the VMM cannot resume its guest; afterwards it runs.
    #[track_caller]
    pub fn fail_to_resume(&self, options: &SnapshotOptions) {
        self.vmm.inject(HookName::Resume, Some(Fault::Fail("not now".into())));
        let status = self.save("failed", options);
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error.contains("not now"), "{}", status.error);
        self.vmm.inject(HookName::Resume, None);
        self.vmm.start().unwrap();
    }

    /// The memory is what the image says, byte for byte.
    #[track_caller]
    pub fn check(&self, chain: &Chain) {
        for (at, geometry) in chain.table().blocks().iter().enumerate() {
            let block = self.vmm.memory().block(geometry.id).unwrap();
            let discarded = self.client().discarded(geometry.id).unwrap();
            let mut saved = vec![0; PAGE_SIZE as usize];
            for page in 0..geometry.pages() {
                let (here, there) = (discarded.contains(page), chain.discarded(at).contains(page));
                assert_eq!(here, there, "page {page:#x} of block {}: discarded", geometry.id);
                chain.read(at, PageRange::new(page, 1), &mut saved).unwrap();
                let same = here || saved == block.read_page(page).unwrap();
                assert!(same, "page {page:#x} of block {}", geometry.id);
            }
        }
    }

    /// Writes to a page as the guest does, and marks it.
    pub fn write(&self, page: u64, value: u64) {
        self.block().store(page * PAGE_SIZE, value).unwrap();
        self.block().mark(PageRange::new(page, 1));
    }
}

pub fn paused() -> SnapshotOptions {
    SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() }
}

pub fn tracked() -> SnapshotOptions {
    SnapshotOptions { track: true, ..paused() }
}

/// An increment to the image at `base`, on which the next may build.
pub fn on(base: &std::path::Path) -> SnapshotOptions {
    SnapshotOptions { base: base.to_str().unwrap().to_owned(), ..tracked() }
}
