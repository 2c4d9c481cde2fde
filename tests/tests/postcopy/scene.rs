// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two VMMs, and a migration between them.

use pageferry_client::{JobStatus, Mode, NonConvergence, OutgoingOptions, Parameters, Phase};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::{Pattern, ThreadGuestOptions};
use pageferry_tests::huge_pages::HUGE_PAGE;
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::random::page_content;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::usage::Path;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use std::sync::Arc;
use std::time::Duration;

pub const MIB: u64 = 1 << 20;
/// Pages of a huge page.
pub const HUGE: u64 = HUGE_PAGE / PAGE_SIZE;

/// The page size of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Small,
    Huge,
}

/// Two blocks of `mib` MiB each, at file offsets that the page size allows.
pub fn memory(pages: Pages, mib: u64) -> Arc<TestMemory> {
    let (fd_offset, backing) = match pages {
        Pages::Small => (0x3000, Backing::Memfd),
        Pages::Huge => (HUGE_PAGE, Backing::HugePages),
    };
    let low = BlockLayout { fd_offset, backing: backing.clone(), ..BlockLayout::ram(mib * MIB) };
    let high = BlockLayout {
        id: 1,
        name: "high".into(),
        gpa: 1 << 30,
        backing,
        ..BlockLayout::ram(mib * MIB)
    };
    Arc::new(TestMemory::new(vec![low, high]).unwrap())
}

/// A VMM with this memory and its agent.
pub fn side_with(memory: Arc<TestMemory>) -> MockSide {
    MockSide::over(memory, Tracker::Log)
}

/// The same with two blocks of `mib` MiB each, on small pages.
pub fn small(mib: u64) -> MockSide {
    side_with(memory(Pages::Small, mib))
}

/// Fills all memory of a side except the first words of each page, which belong to the guests.
pub fn fill_all(side: &MockSide, seed: u64) {
    for block in side.vmm.memory().blocks() {
        fill(block, block.all(), seed);
    }
}

/// Checks what [`fill_all`] wrote, on a side whose guest gave no pages away.
pub fn check_all_filled(side: &MockSide, seed: u64) {
    for block in side.vmm.memory().blocks() {
        check_filled(block, block.all(), seed);
    }
}

/// Bytes at the start of each page that belong to guests and devices.
const WORDS: usize = 256;

pub fn fill(block: &TestBlock, pages: PageRange, seed: u64) {
    for page in pages.first..pages.end() {
        block.write(page * PAGE_SIZE + WORDS as u64, &page_content(seed, page)[WORDS..]).unwrap();
    }
}

pub fn check_filled(block: &TestBlock, pages: PageRange, seed: u64) {
    for page in pages.first..pages.end() {
        let found = block.read_page(page).unwrap();
        assert!(
            found[WORDS..] == page_content(seed, page)[WORDS..],
            "block {}, page {page:#x}",
            block.id()
        );
    }
}

/// A guest that marks the log itself.
pub fn guest(pattern: Pattern, rate: u64) -> ThreadGuestOptions {
    ThreadGuestOptions {
        threads: 3,
        rate: Some(rate),
        pattern,
        path: Path::MappingAndLog,
        ..Default::default()
    }
}

/// When the guest switches over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    AtOnce,
    AfterPasses(u32),
    OnRequest,
    OnNonConvergence,
}

pub const SWITCHES: [Switch; 4] =
    [Switch::AtOnce, Switch::AfterPasses(2), Switch::OnRequest, Switch::OnNonConvergence];

impl Switch {
    pub fn options(self, bandwidth: u64) -> OutgoingOptions {
        let options = OutgoingOptions {
            streams: 2,
            mode: Mode::Hybrid,
            bandwidth,
            // This limit is never met.
            downtime_limit: Duration::ZERO,
            max_passes: 0,
            policy: NonConvergence::KeepGoing,
            ..OutgoingOptions::default()
        };
        match self {
            Self::AtOnce => OutgoingOptions { mode: Mode::Postcopy, ..options },
            Self::AfterPasses(switch_after) => OutgoingOptions { switch_after, ..options },
            Self::OnRequest => options,
            Self::OnNonConvergence => {
                OutgoingOptions { max_passes: 2, policy: NonConvergence::Postcopy, ..options }
            }
        }
    }
}

/// A bandwidth at which hardly any page is pushed, so that pages that the guest touches are
/// missing.
pub const TRICKLE: u64 = 64 << 10;

/// A migration.
pub struct Move<'a> {
    pub source: &'a MockSide,
    pub destination: &'a MockSide,
    outgoing: u64,
    incoming: u64,
}

impl<'a> Move<'a> {
    pub fn start(
        source: &'a MockSide, destination: &'a MockSide, options: OutgoingOptions,
    ) -> Self {
        let [outgoing, incoming] = source.start_move(destination, &options);
        Self { source, destination, outgoing, incoming }
    }

    /// Waits until the guest runs at the destination. Its memory may already be there.
    pub fn until_gone(&self) {
        self.source.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
        wait_until("the guest runs", PATIENCE, || self.destination.vmm.record().runs).unwrap();
    }

    /// Waits until both sides are in postcopy. The guest then runs at the destination.
    pub fn until_postcopy(&self) {
        for side in [self.source, self.destination] {
            let status = side.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Postcopy, "{}", status.error_text());
        }
        wait_until("the guest runs", PATIENCE, || self.destination.vmm.record().runs).unwrap();
    }

    /// Removes the bandwidth limit for the rest.
    pub fn hurry(&self) {
        // The agent refuses this if the job has ended.
        let _ = self.source.client().set_parameters(&Parameters::bandwidth(0));
    }

    /// Waits for the end of both jobs. Returns the final status of the source and of the
    /// destination.
    pub fn end(self) -> [JobStatus; 2] {
        let both = [(self.source, self.outgoing), (self.destination, self.incoming)];
        both.map(|(side, job)| {
            side.vmm.wait_job(job, PATIENCE).unwrap_or_else(|error| {
                panic!(
                    "{error}: {:?} {:?}",
                    self.source.client().status(),
                    self.destination.client().status()
                )
            })
        })
    }

    /// The same, and checks that the postcopy completed.
    pub fn finish(self) -> [JobStatus; 2] {
        let (source, destination) = (self.source, self.destination);
        let ended = self.end();
        for status in &ended {
            assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
            plausible(status);
        }
        for side in [source, destination] {
            // The job may end before its events have arrived.
            wait_until("the event of the postcopy", PATIENCE, || side.saw(Phase::Postcopy))
                .unwrap();
        }
        assert!(destination.vmm.record().memory_complete);
        let [outgoing, incoming] = &ended;
        let (ours, theirs) = (outgoing.counters, incoming.counters);
        // A requested page may have been pushed meanwhile.
        assert!(ours.requested_pages <= theirs.requested_pages, "{ours:?} {theirs:?}");
        assert!(
            theirs.pushed_pages <= ours.pushed_pages + ours.requested_pages,
            "{ours:?} {theirs:?}"
        );
        ended
    }
}

/// Checks the counters of a completed postcopy.
pub fn plausible(status: &JobStatus) {
    let counters = &status.counters;
    assert_eq!(counters.remaining_pages, 0, "{counters:?}");
    let latencies = [
        counters.fault_p50_us,
        counters.fault_p90_us,
        counters.fault_p99_us,
        counters.fault_max_us,
    ];
    assert!(latencies.is_sorted(), "{counters:?}");
    assert!(counters.fault_max_us <= counters.total_us, "{counters:?}");
    assert!(counters.disconnected_us <= counters.total_us, "{counters:?}");
    assert!(counters.faults > 0 || counters.fault_max_us == 0, "{counters:?}");
}
