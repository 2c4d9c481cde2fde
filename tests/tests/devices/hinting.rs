// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting while a guest moves: what it says is free is left out of the first pass, and
//! whatever it says, the destination has what the guest wrote.

use pageferry_client::{
    ClearPages, DirtyLog, HookError, NonConvergence, OutgoingOptions, Parameters, Phase,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::front_end::balloon::bytes;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, PATIENCE, Piece};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::random::page_content;
use pageferry_tests::scenario::SOON;
use pageferry_tests::vmm::Tracker;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A pass looks at hints when it begins with a piece of memory of this many pages.
const CHUNK: u64 = 16384;
const PAGES: u64 = 3 * CHUNK;
/// What the guest uses.
const USED: PageRange = PageRange { first: FIRST_FREE_PAGE, count: 512 };
/// What it does not use any more.
const FREE: PageRange = PageRange { first: 2 * CHUNK, count: 6144 };

/// A guest on its way: slow, until [`Moving::ends`].
struct Moving {
    source: DeviceHost,
    destination: DeviceHost,
    balloon: BalloonDriver,
    jobs: [u64; 2],
    round: u32,
}

impl Moving {
    fn start() -> Self {
        Self::with_tracker(Tracker::Log)
    }

    fn with_tracker(tracker: Tracker) -> Self {
        let memory = TestMemory::new(vec![BlockLayout::ram(PAGES * PAGE_SIZE)]).unwrap();
        let source = DeviceHost::with_tracker(Arc::new(memory), tracker);
        let destination = DeviceHost::ram(PAGES);
        for pages in [USED, FREE] {
            source.block(0).fill(pages, 1).unwrap();
        }
        let mut balloon = source.balloon();
        assert_eq!(balloon.hint_command(), 0);
        let slow = OutgoingOptions {
            bandwidth: 64 << 10,
            max_passes: 0,
            policy: NonConvergence::KeepGoing,
            downtime_limit: Duration::from_secs(1),
            ..OutgoingOptions::default()
        };
        let jobs = source.start_move(&destination, &slow);
        balloon.driver.front_end.wait_for_config_change();
        let round = balloon.hint_command();
        assert!(round >= 2, "{round}");
        Self { source, destination, balloon, jobs, round }
    }

    /// The guest writes to a page.
    fn write(&self, page: u64, seed: u64) {
        let block = self.source.block(0);
        block.write(page * PAGE_SIZE, &page_content(seed, page)).unwrap();
        block.mark(PageRange::new(page, 1));
    }

    /// Lets the job go on, and waits for its end. Returns the pages that were sent.
    #[track_caller]
    fn ends(&mut self) -> u64 {
        self.source.vmm.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
        let sent = self.source.arrives_at(&self.destination, self.jobs).counters.pages_sent;
        for page in USED.first..USED.end() {
            self.arrived(page, 1);
        }
        sent
    }

    #[track_caller]
    fn arrived(&self, page: u64, seed: u64) {
        let found = self.destination.block(0).read_page(page).unwrap();
        assert!(found == page_content(seed, page), "page {page:#x}");
    }
}

#[test]
fn hinted_pages_are_not_sent_unless_they_are_written_again() {
    let mut moving = Moving::start();
    moving.balloon.answer_hints(moving.round);
    // The pass has sent some of the first pages by now.
    for first in (FREE.first..FREE.end()).step_by(1024) {
        moving.balloon.hint(&[bytes(first, 1024)]);
    }
    moving.balloon.answer_hints(0);
    wait_until("hints", PATIENCE, || moving.source.balloon_now().hinted == FREE.bytes()).unwrap();
    let written = [FREE.first, FREE.first + 5, FREE.end() - 1];
    for page in written {
        moving.write(page, 2);
    }
    let sent = moving.ends();
    assert!(sent < USED.count + 2 * FIRST_FREE_PAGE + 64, "{sent} pages");
    for page in written {
        moving.arrived(page, 2);
    }
    assert!(moving.destination.block(0).is_hole(PageRange::new(FREE.first + 6, 1024)).unwrap());
    // The guest gets its pages back when the pass is over.
    moving.balloon.driver.front_end.wait_for_config_change();
    assert_eq!(moving.balloon.hint_command(), 1);
    assert_eq!(moving.source.balloon_now().hinted, FREE.bytes());
}

/// A tracker that a sync does not clear, such as KVM's dirty log: the pages that it reports.
#[derive(Clone, Default)]
struct LazyTracker(Arc<Mutex<BTreeSet<u64>>>);

impl pageferry_client::Tracker for LazyTracker {
    fn start(&mut self) -> Result<(), HookError> {
        self.0.lock().unwrap().clear();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn sync(&mut self, log: &DirtyLog) -> Result<(), HookError> {
        self.0.lock().unwrap().iter().for_each(|page| log.mark(PageRange::new(*page, 1)));
        Ok(())
    }

    fn clear(&mut self, pages: ClearPages<'_>) -> Result<(), HookError> {
        let is_kept = |page: &u64| {
            let bit = page.wrapping_sub(pages.first);
            pages.bitmap.get((bit / 64) as usize).is_none_or(|word| word >> (bit % 64) & 1 == 0)
        };
        self.0.lock().unwrap().retain(is_kept);
        Ok(())
    }
}

#[test]
fn what_is_written_to_hinted_pages_before_the_pass_comes_by_arrives() {
    let tracker = LazyTracker::default();
    let mut moving = Moving::with_tracker(Tracker::Hooks(Box::new(tracker.clone())));
    moving.balloon.answer_hints(moving.round);
    moving.balloon.hint(&[bytes(FREE.first, FREE.count)]);
    moving.balloon.answer_hints(0);
    wait_until("hints", PATIENCE, || moving.source.balloon_now().hinted == FREE.bytes()).unwrap();
    // The guest needs some of them, and nobody but its own tracker sees that.
    for page in [FREE.first, FREE.first + 777] {
        let content = page_content(2, page);
        moving.source.block(0).write(page * PAGE_SIZE, &content).unwrap();
        tracker.0.lock().unwrap().insert(page);
    }
    moving.ends();
    for page in [FREE.first, FREE.first + 777] {
        moving.arrived(page, 2);
    }
    assert!(moving.destination.block(0).is_hole(PageRange::new(FREE.first + 1, 700)).unwrap());
}

#[test]
fn hints_of_another_round_are_ignored() {
    for stale in [0, 1, u32::MAX] {
        let mut moving = Moving::start();
        if stale != 0 {
            moving.balloon.answer_hints(stale);
        }
        moving.balloon.hint(&[bytes(FREE.first, FREE.count)]);
        // The driver ends the round, and says more.
        moving.balloon.answer_hints(moving.round);
        moving.balloon.answer_hints(0);
        moving.balloon.hint(&[bytes(FREE.first, FREE.count)]);
        assert_eq!(moving.source.balloon_now().hinted, 0, "{stale}");
        let sent = moving.ends();
        assert!(sent >= FREE.count, "{stale}: {sent} pages");
        for page in FREE.first..FREE.end() {
            moving.arrived(page, 1);
        }
    }
}

#[test]
fn hints_of_a_guest_that_fills_its_free_pages_are_ignored() {
    let mut moving = Moving::start();
    moving.balloon.set_poison(0xaaaa_aaaa);
    moving.balloon.answer_hints(moving.round);
    moving.balloon.hint(&[bytes(FREE.first, FREE.count)]);
    assert_eq!(moving.source.balloon_now().hinted, 0);
    moving.ends();
    for page in FREE.first..FREE.end() {
        moving.arrived(page, 1);
    }
}

#[test]
fn silent_driver_delays_nothing_and_loses_nothing() {
    let mut moving = Moving::start();
    moving.ends();
    for page in FREE.first..FREE.end() {
        moving.arrived(page, 1);
    }
}

#[test]
fn lying_driver_loses_only_what_it_called_free() {
    let mut moving = Moving::start();
    moving.balloon.answer_hints(moving.round);
    // Addresses that are nowhere, more than there is, and a part of a page at each end.
    let (gpa, length) = bytes(FREE.first, 4);
    moving.balloon.hint(&[
        (u64::MAX - 4095, 4096),
        (1 << 50, u32::MAX.into()),
        (gpa + 1, length - 2),
        (PAGES * PAGE_SIZE - 1, 4097),
        (gpa, 0),
    ]);
    assert_eq!(moving.source.balloon_now().hinted, 2 * PAGE_SIZE, "whole pages only");
    // The pages of the queue itself, which the driver goes on to write.
    let queue = moving.balloon.hint_queue();
    let own = moving.balloon.driver.area_of(queue);
    moving.balloon.hint(&[(own, 65536)]);
    moving.ends();
    for page in [FREE.first, FREE.first + 3, FREE.end() - 1] {
        moving.arrived(page, 1);
    }
    // What it wrote after that arrived, too.
    let [here, there] = [&moving.source, &moving.destination].map(|host| {
        let mut ring = vec![0; 4096];
        host.block(0).read(own, &mut ring).unwrap();
        ring
    });
    assert!(here == there, "the rings of the queue");
}

#[test]
fn driver_that_never_stops_does_not_hold_up_the_job() {
    let mut moving = Moving::start();
    moving.balloon.answer_hints(moving.round);
    let queue = moving.balloon.hint_queue();
    // It keeps the queue full, and nothing of it is new.
    for _ in 0..100 {
        moving.balloon.driver.queue(queue).put(&[Piece::writable(FREE.first * PAGE_SIZE, 4096)]);
    }
    moving.balloon.driver.queue(queue).kick();
    moving.ends();
    let status = moving.source.vmm.wait_job(moving.jobs[0], SOON).unwrap();
    assert_eq!(status.phase, Phase::Completed);
    for page in FREE.first + 1..FREE.end() {
        moving.arrived(page, 1);
    }
}

#[test]
fn next_job_begins_a_round_of_its_own() {
    let mut moving = Moving::start();
    moving.balloon.answer_hints(moving.round);
    moving.balloon.hint(&[bytes(FREE.first, 1024)]);
    moving.source.vmm.client().cancel().unwrap();
    moving.source.vmm.wait_job(moving.jobs[0], SOON).unwrap();
    moving.balloon.driver.front_end.wait_for_config_change();
    assert_eq!(moving.balloon.hint_command(), 1);
    let _ = moving.destination.vmm.wait_job(moving.jobs[1], SOON).unwrap();
    let fast = OutgoingOptions::default();
    moving.jobs = moving.source.start_move(&moving.destination, &fast);
    // Hints with the number of the round before are stale now.
    moving.balloon.hint(&[bytes(FREE.first, FREE.count)]);
    moving.source.arrives_at(&moving.destination, moving.jobs);
    for page in FREE.first..FREE.end() {
        moving.arrived(page, 1);
    }
}
