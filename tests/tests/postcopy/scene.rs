// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two VMMs, and a migration between them.

use pageferry_client::{JobStatus, Mode, NonConvergence, OutgoingOptions, Phase};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::{Pattern, ThreadGuest, ThreadGuestOptions};
use pageferry_tests::huge_pages::HUGE_PAGE;
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::random::page_content;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::usage::Path;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

pub const MIB: u64 = 1 << 20;
/// Pages of a huge page.
pub const HUGE: u64 = HUGE_PAGE / PAGE_SIZE;

/// What memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Small,
    Huge,
}

/// Two blocks of `mib` MiB each, at places that suit the pages.
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

/// A VMM with its agent.
pub struct Side {
    mock: MockSide,
}

impl Deref for Side {
    type Target = MockSide;

    fn deref(&self) -> &MockSide {
        &self.mock
    }
}

impl Side {
    pub fn new(memory: Arc<TestMemory>) -> Self {
        Self { mock: MockSide::over(memory, Tracker::Log) }
    }

    pub fn small(mib: u64) -> Self {
        Self::new(memory(Pages::Small, mib))
    }

    /// Puts a guest of threads into it; returns how often it wrote.
    pub fn threads(&self, options: &ThreadGuestOptions) -> impl Fn() -> u64 + Send + Sync + use<> {
        let guest = ThreadGuest::new(self.vmm.usage(), options.clone()).unwrap();
        let writes = guest.watch_writes();
        self.vmm.set_guest(guest);
        writes
    }

    pub fn allocated(&self) -> u64 {
        self.vmm.memory().allocated().unwrap()
    }

    pub fn saw(&self, phase: Phase) -> bool {
        self.vmm.record().events.iter().any(|status| status.phase == phase)
    }

    /// Fills all of its memory but the first words of each page, which are the guests'.
    pub fn fill(&self, seed: u64) {
        for block in self.vmm.memory().blocks() {
            fill(block, block.all(), seed);
        }
    }

    /// Checks what [`Side::fill`] did, where the guest may not have given pages away.
    pub fn check_filled(&self, seed: u64) {
        for block in self.vmm.memory().blocks() {
            check_filled(block, block.all(), seed);
        }
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

/// A guest that writes the log itself.
pub fn guest(pattern: Pattern, rate: u64) -> ThreadGuestOptions {
    ThreadGuestOptions {
        threads: 3,
        rate: Some(rate),
        pattern,
        path: Path::MappingAndLog,
        ..Default::default()
    }
}

/// When the guest goes.
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
            // Never met.
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

/// Bytes per second at which next to nothing comes by itself: what the guest touches is missing.
pub const TRICKLE: u64 = 64 << 10;

/// A migration.
pub struct Move<'a> {
    pub source: &'a Side,
    pub destination: &'a Side,
    pub options: OutgoingOptions,
    outgoing: u64,
    incoming: u64,
}

impl<'a> Move<'a> {
    pub fn start(source: &'a Side, destination: &'a Side, options: OutgoingOptions) -> Self {
        let [outgoing, incoming] = source.start_move(destination, &options);
        Self { source, destination, options, outgoing, incoming }
    }

    /// Waits until the guest runs at the destination, whose memory may be there by then.
    pub fn until_gone(&self) {
        self.source.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
        wait_until("the guest runs", PATIENCE, || self.destination.vmm.record().runs).unwrap();
    }

    /// Waits until both sides are in postcopy; the guest runs at the destination.
    pub fn until_postcopy(&self) {
        for side in [self.source, self.destination] {
            let status = side.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Postcopy, "{}", status.error);
        }
        wait_until("the guest runs", PATIENCE, || self.destination.vmm.record().runs).unwrap();
    }

    /// Lets the rest come as fast as it can.
    pub fn hurry(&self) {
        let options = OutgoingOptions { bandwidth: 0, ..self.options.clone() };
        // Refused if it is over.
        let _ = self.source.client().set_parameters(&options);
    }

    /// Waits until both jobs ended; returns how they stand at the source and at the destination.
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

    /// The same for a postcopy that is to be complete.
    pub fn finish(self) -> [JobStatus; 2] {
        let (source, destination) = (self.source, self.destination);
        let ended = self.end();
        for status in &ended {
            assert_eq!(status.phase, Phase::Completed, "{}", status.error);
            plausible(status);
        }
        for side in [source, destination] {
            // The job may be over before its events have arrived.
            wait_until("the event of the postcopy", PATIENCE, || side.saw(Phase::Postcopy))
                .unwrap();
        }
        assert!(destination.vmm.record().memory_complete);
        let [outgoing, incoming] = &ended;
        let (ours, theirs) = (outgoing.counters, incoming.counters);
        // What was asked for may have come by itself meanwhile.
        assert!(ours.requested_pages <= theirs.requested_pages, "{ours:?} {theirs:?}");
        assert!(
            theirs.pushed_pages <= ours.pushed_pages + ours.requested_pages,
            "{ours:?} {theirs:?}"
        );
        ended
    }
}

/// The figures of a postcopy that is complete.
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
    assert!(counters.paused_us <= counters.total_us, "{counters:?}");
    assert!(counters.faults > 0 || counters.fault_max_us == 0, "{counters:?}");
}
