// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mock VMM process, which can be killed while its guest is saved or restored.

use super::Host;
use super::moments::{Moment, PAGES};
use crate::deadline::wait_until;
use crate::process::{Process, mock_vmm};
use crate::random::Random;
use crate::require;
use crate::vmm::PATIENCE;
use pageferry_agent::image::Chain;
use pageferry_client::Phase;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of its memory.
pub const SIZE: u64 = PAGES * PAGE_SIZE;

/// A VMM process whose memory is a file.
#[derive(Debug)]
pub struct VmmProcess<'a> {
    host: &'a Host,
    memory: PathBuf,
    _folder: tempfile::TempDir,
}

impl<'a> VmmProcess<'a> {
    /// A VMM on the agent of `host`, with empty memory.
    pub fn new(host: &'a Host) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let memory = folder.path().join("memory");
        File::create_new(&memory).unwrap().set_len(SIZE).unwrap();
        Self { host, memory, _folder: folder }
    }

    /// Fills three quarters of its memory with the content of `seed`.
    pub fn fill(&self, seed: u64) {
        let mut bytes = vec![0; SIZE as usize / 4 * 3];
        Random::new(seed).fill(&mut bytes);
        File::options().write(true).open(&self.memory).unwrap().write_all_at(&bytes, 0).unwrap();
    }

    /// Starts it as a `source` or a `destination`, with more options.
    pub fn start(&self, side: &str, more: &[&str]) -> Process {
        let mut command = mock_vmm(side, SIZE, self.host.agent.socket(), &self.memory);
        Process::spawn(side, command.args(more)).unwrap()
    }

    /// Runs it to its end, and checks that it succeeded.
    #[track_caller]
    pub fn completes(&self, side: &str, more: &[&str]) {
        let mut process = self.start(side, more);
        let status = process.wait(PATIENCE).unwrap();
        assert!(status.success(), "{:?}", process.lines());
    }

    /// Runs it to save its guest, and checks that it succeeded.
    pub fn saves_to(&self, image: &str) {
        let more = ["--replace", "--snapshot-to", image, "--paused"];
        self.completes("source", if require::uffd() { &more[..3] } else { &more });
    }

    /// Kills it at this moment of the job that follows `last`. Returns the phase in which that job
    /// ended.
    pub fn kill(&self, mut process: Process, moment: &Moment, last: u64) -> Phase {
        wait_until("the job to start", PATIENCE, || {
            self.host.status().job > last || process.has_ended()
        })
        .unwrap();
        moment.wait(|| self.host.status());
        process.kill().unwrap();
        let status = self.host.ended();
        // The status is not that of the VMM before, whose jobs count, too.
        assert!(status.job > last, "{status:?}");
        if status.phase != Phase::Completed {
            let said =
                ["the VMM is gone", "hook \"", "cannot protect", "userfaultfd", "write protect"];
            assert!(
                said.iter().any(|said| status.error_text().contains(said)),
                "{:?}: {}",
                status.phase,
                status.error_text()
            );
        }
        status.phase
    }

    /// Checks that the image and the memory are the same.
    pub fn is_saved_in(&self, image: &Path) {
        let (memory, chain) = (std::fs::read(&self.memory).unwrap(), Chain::open(image).unwrap());
        let mut saved = vec![0; SIZE as usize];
        chain.read(0, PageRange::new(0, PAGES), &mut saved).unwrap();
        assert!(saved == memory);
    }
}
