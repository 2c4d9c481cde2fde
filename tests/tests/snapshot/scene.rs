// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM, its agent, and a folder for images.

use pageferry_agent::image::Chain;
use pageferry_client::{Client, JobStatus, Phase, SnapshotOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::memory::{BlockLayout, TestBlock, TestMemory};
pub use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::{Listening, images};
use pageferry_tests::usage::Usage;
use pageferry_tests::vmm::{Fault, HookName, MockVmm, PATIENCE, Tracker};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The VMM goes first.
pub struct Scene {
    pub vmm: MockVmm,
    agent: Listening,
    pub folder: tempfile::TempDir,
}

impl Scene {
    /// Blocks of these layouts, whose writes the guest marks itself.
    pub fn new(layouts: Vec<BlockLayout>) -> Self {
        let usage = Usage::new(Arc::new(TestMemory::new(layouts).unwrap())).unwrap();
        let agent = Listening::start();
        let vmm = MockVmm::connect(&agent.path, usage, Tracker::Log).unwrap();
        Self { vmm, agent, folder: tempfile::tempdir().unwrap() }
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

    /// Where operators find the agent.
    pub fn socket(&self) -> &Path {
        &self.agent.path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Names in the folder.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
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
        images::assert_saved(self.vmm.memory(), self.client(), chain);
    }

    /// Does to the first block what a vCPU does, on a thread of its own: if it waits in vain for
    /// the agent, the test fails and does not hang.
    #[track_caller]
    pub fn as_guest<T: Send + 'static>(
        &self, act: impl FnOnce(&TestBlock) -> T + Send + 'static,
    ) -> T {
        let memory = self.vmm.memory().clone();
        let acting = std::thread::spawn(move || act(&memory.blocks()[0]));
        wait_until("the guest to come on", PATIENCE, || acting.is_finished()).unwrap();
        acting.join().unwrap()
    }

    /// Writes to a page as the guest does, and marks it.
    pub fn write(&self, page: u64, value: u64) {
        self.block().store(page * PAGE_SIZE, value).unwrap();
        self.block().mark(PageRange::new(page, 1));
    }
}
