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

/// The VMM is dropped first.
pub struct Scene {
    pub vmm: MockVmm,
    agent: Listening,
    pub folder: tempfile::TempDir,
}

impl Scene {
    /// A scene with blocks of these layouts. The guest marks its writes itself.
    pub fn new(layouts: Vec<BlockLayout>) -> Self {
        let usage = Usage::new(Arc::new(TestMemory::new(layouts).unwrap())).unwrap();
        let agent = Listening::start();
        let vmm = MockVmm::connect(&agent.path, usage, Tracker::Log).unwrap();
        Self { vmm, agent, folder: tempfile::tempdir().unwrap() }
    }

    /// A scene with one block of `pages` pages, all with content.
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

    /// The socket of the agent, for operators.
    pub fn socket(&self) -> &Path {
        &self.agent.path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Names of the files in the folder.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Saves the guest, and returns the final status.
    pub fn save(&self, name: &str, options: &SnapshotOptions) -> JobStatus {
        let started = self.client().start_snapshot(&self.path(name), options).unwrap();
        self.client().wait(started.job, PATIENCE).unwrap()
    }

    /// Saves the guest, and checks that the job completed.
    #[track_caller]
    pub fn saved(&self, name: &str, options: &SnapshotOptions) -> (JobStatus, Chain) {
        let status = self.save(name, options);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        (status, Chain::open(&self.path(name)).unwrap())
    }

    /// Saves the guest while its resume fails, and checks that the job fails. Afterwards the guest
    /// runs.
    #[track_caller]
    pub fn fail_to_resume(&self, options: &SnapshotOptions) {
        self.vmm.inject(HookName::Resume, Some(Fault::Fail("not now".into())));
        let status = self.save("failed", options);
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error_text().contains("not now"), "{}", status.error_text());
        self.vmm.inject(HookName::Resume, None);
        self.vmm.start().unwrap();
    }

    /// Checks that the memory and the image are the same, byte for byte.
    #[track_caller]
    pub fn check(&self, chain: &Chain) {
        images::assert_saved(self.vmm.memory(), self.client(), chain);
    }

    /// Accesses the first block like a vCPU, on its own thread. If the access waits forever for the
    /// agent, the test fails instead of hanging.
    #[track_caller]
    pub fn as_guest<T: Send + 'static>(
        &self, act: impl FnOnce(&TestBlock) -> T + Send + 'static,
    ) -> T {
        let memory = self.vmm.memory().clone();
        let acting = std::thread::spawn(move || act(&memory.blocks()[0]));
        wait_until("the guest to come on", PATIENCE, || acting.is_finished()).unwrap();
        acting.join().unwrap()
    }

    /// Writes to a page like the guest, and marks it.
    pub fn write(&self, page: u64, value: u64) {
        self.block().store(page * PAGE_SIZE, value).unwrap();
        self.block().mark(PageRange::new(page, 1));
    }
}
