// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that write all the time, random moments of a job, and checks of an image of such a guest.

use super::Host;
use crate::deadline::wait_until;
use crate::guest::threads::{ThreadGuest, ThreadGuestOptions};
use crate::memory::TestMemory;
use crate::random::{Random, page_content};
use crate::usage::Usage;
use crate::vmm::{MockVmm, PATIENCE, Tracker};
use pageferry_agent::image::Chain;
use pageferry_client::{Client, Config, JobStatus, Phase, StatePiece};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Number of pages of the guest. The first `FILLED` of them hold something from the start.
pub const PAGES: u64 = 4096;
const FILLED: u64 = 3000;
/// With this bandwidth, the pages that hold something take about 50 ms.
pub const BANDWIDTH: u64 = 256 << 20;

fn usage() -> Arc<Usage> {
    Usage::new(Arc::new(TestMemory::ram(PAGES * PAGE_SIZE).unwrap())).unwrap()
}

fn options(rate: u64) -> ThreadGuestOptions {
    ThreadGuestOptions { rate: Some(rate), ..ThreadGuestOptions::default() }
}

/// A VMM whose guest runs and writes everywhere.
pub struct Running {
    /// The VMM.
    pub vmm: MockVmm,
    writes: Box<dyn Fn() -> u64>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Running").finish_non_exhaustive()
    }
}

impl Running {
    /// Memory that holds something, and a guest that writes to it.
    pub fn new(host: &Host) -> Self {
        Self::with(host, Config::default())
    }

    /// The same with another configuration of the client.
    pub fn with(host: &Host, config: Config) -> Self {
        let usage = usage();
        usage.memory().block(0).unwrap().fill(PageRange::new(0, FILLED), 1).unwrap();
        let guest = ThreadGuest::new(&usage, options(4000)).unwrap();
        let writes = Box::new(guest.watch_writes());
        let (client, channel) = Client::connect(host.agent.socket(), config).unwrap();
        let vmm = MockVmm::new(client, channel, usage, Tracker::Log).unwrap();
        vmm.set_guest(guest);
        vmm.start().unwrap();
        let running = Self { vmm, writes };
        running.assert_runs();
        running
    }

    /// Waits until the agent is lost, and checks that the guest runs and can write everywhere.
    pub fn assert_runs_without_agent(&self) {
        wait_until("the agent to be lost", PATIENCE, || self.vmm.record().agent_lost.is_some())
            .unwrap();
        self.assert_runs();
    }

    /// Checks that the guest runs and can write everywhere.
    pub fn assert_runs(&self) {
        wait_until("the guest to run", PATIENCE, || self.vmm.record().runs).unwrap();
        let before = (self.writes)();
        wait_until("the guest to write", PATIENCE, || (self.writes)() >= before + 50).unwrap();
        let memory = self.vmm.memory().clone();
        // These words are not the guest's.
        let writing = std::thread::spawn(move || {
            let block = memory.block(0).unwrap();
            (0..PAGES).for_each(|page| block.store(page * PAGE_SIZE + 2048, page).unwrap());
        });
        wait_until("every page to be written", PATIENCE, || writing.is_finished()).unwrap();
        writing.join().unwrap();
    }
}

/// A VMM that waits for a guest like that of [`Running`].
pub fn waiting(host: &Host) -> MockVmm {
    waiting_with(host, Config::default())
}

/// The same with another configuration of the client.
pub fn waiting_with(host: &Host, config: Config) -> MockVmm {
    let usage = usage();
    let guest = ThreadGuest::new(&usage, options(0)).unwrap();
    let (client, channel) = Client::connect(host.agent.socket(), config).unwrap();
    let vmm = MockVmm::new(client, channel, usage, Tracker::Log).unwrap();
    vmm.set_guest(guest);
    vmm
}

/// Checks that the image is complete and shows one moment of its guest: each page holds what the
/// guest's ledger says, and pages that the guest did not write are as they were at the start.
#[track_caller]
pub fn check_image(path: &Path) {
    let chain = Chain::open(path).unwrap();
    let usage = usage();
    let block = usage.memory().block(0).unwrap();
    let mut bytes = vec![0; PAGE_SIZE as usize];
    for run in chain.present(0).runs(chain.present(0).all()) {
        for page in run.first..run.end() {
            chain.read(0, PageRange::new(page, 1), &mut bytes).unwrap();
            block.write(page * PAGE_SIZE, &bytes).unwrap();
        }
    }
    check_content(&usage);
    let _ledger = ThreadGuest::new(&usage, options(0)).unwrap();
    let state = chain.newest().state().unwrap();
    let mut rest = &state[..];
    let pieces = chain.newest().contents().pieces.iter().map(|piece| {
        let (bytes, after) = rest.split_at(piece.length as usize);
        rest = after;
        StatePiece { name: piece.name.clone(), bytes: bytes.to_vec() }
    });
    usage.load(&pieces.collect::<Vec<_>>()).unwrap();
    assert!(usage.check().unwrap() > 0, "nothing was compared");
}

/// Checks that everything except the words of writers is as it was at the start.
#[track_caller]
pub fn check_content(usage: &Usage) {
    let block = usage.memory().block(0).unwrap();
    for page in 0..FILLED {
        let (found, right) = (block.read_page(page).unwrap(), page_content(1, page));
        assert!(
            found[8..2048] == right[8..2048] && found[2056..] == right[2056..],
            "page {page:#x}"
        );
    }
}

/// A moment of a job.
#[derive(Debug)]
pub enum Moment {
    /// When the job has processed this many pages, or has ended.
    Pages(u64),
    /// This long after the start of the job.
    After(Duration),
    /// This long after all pages that hold something were processed. The rest of the image is then
    /// written and synced, or loaded.
    Last(Duration),
}

impl Moment {
    /// A moment that `random` chooses.
    pub fn any(random: &mut Random) -> Self {
        let kind = random.below(10);
        let mut below = |micros| Duration::from_micros(random.below(micros));
        match kind {
            // Early, when the job has hardly begun.
            0..3 => Self::After(below(3_000)),
            3..5 => Self::After(below(80_000)),
            5..7 => Self::Last(below(8_000)),
            _ => Self::Pages(random.below(FILLED)),
        }
    }

    /// Returns at this moment.
    pub fn wait(&self, mut status: impl FnMut() -> JobStatus) {
        match self {
            // The job may be in any phase then. What the tests check holds at every moment.
            Self::After(time) => std::thread::sleep(*time),
            Self::Last(time) => {
                Self::Pages(FILLED).wait(status);
                std::thread::sleep(*time);
            }
            Self::Pages(pages) => {
                let come = || {
                    let status = status();
                    let counters = status.counters;
                    let moved = counters.pages_sent
                        + counters.pages_received
                        + counters.pages_saved
                        + counters.pages_restored;
                    let done = (moved + counters.zero_pages).max(counters.pass_pages_done);
                    status.phase.is_final() || done >= *pages
                };
                wait_until("the moment", PATIENCE, come).unwrap();
            }
        }
    }
}

/// Counts how many moments hit a job that was still under way. If nearly all jobs had ended
/// already, the test shows nothing.
#[derive(Debug, Default)]
pub struct Hits {
    moments: u64,
    under_way: u64,
}

impl Hits {
    /// Waits for `moment` in the job of `client`, counts it, and prints it after `case`, so that a
    /// failure can be repeated. Returns the phase of the job at the moment.
    pub fn wait_for(
        &mut self, moment: &Moment, case: std::fmt::Arguments<'_>, client: &Client,
    ) -> Phase {
        moment.wait(|| client.status().unwrap());
        let phase = client.status().unwrap().phase;
        eprintln!("{case}: {moment:?}, in phase {}", phase.name());
        self.count(phase);
        phase
    }

    /// Counts a moment at which the job was in this phase.
    pub fn count(&mut self, phase: Phase) {
        self.count_if(!phase.is_final());
    }

    /// Counts a moment. `under_way` says whether the job had not ended.
    pub fn count_if(&mut self, under_way: bool) {
        self.moments += 1;
        self.under_way += u64::from(under_way);
    }

    /// Checks that at least a third of the moments hit a job that was under way.
    #[track_caller]
    pub fn check(&self) {
        assert!(self.under_way * 3 >= self.moments, "nearly all came too late: {self:?}");
    }
}
