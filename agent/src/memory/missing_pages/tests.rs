// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::GuestMemory;
use crate::memory::test_support::{Registered, let_others_run, memfd, memory};
use crate::stats::get;
use pageferry_protocol::control::request::BlockRange;

/// A block whose page 3 is missing. The descriptor is not a userfaultfd, so every placing fails.
fn missing_pages() -> (Arc<GuestMemory>, Arc<MissingPages>) {
    let memory = memory(&[64]);
    let missing = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
    missing.add(0, 0, 1 << 3);
    let missing_pages =
        MissingPages::new(memory.blocks(), Arc::new(missing), memfd(0), false, Arc::default())
            .unwrap();
    let missing_pages = Arc::new(missing_pages);
    memory.set_missing_pages(Some(missing_pages.clone()));
    (Arc::new(memory), missing_pages)
}

#[test]
fn fault_during_a_placing_waits_for_its_outcome() {
    let (memory, missing_pages) = missing_pages();
    let placing = memory.readers.reading(0, 0, 0);
    assert_ne!(missing_pages.missing.take(0, 0, 1 << 3), 0);
    std::thread::scope(|scope| {
        let fault = scope.spawn(|| missing_pages.fault(&memory.readers, (0, 3), Instant::now()));
        while !missing_pages.requested[0].contains(3) && !fault.is_finished() {
            yield_now();
        }
        let_others_run();
        // The placing has failed.
        missing_pages.missing.add(0, 0, 1 << 3);
        drop(placing);
        assert_eq!(fault.join().unwrap().unwrap(), FaultOutcome::Request);
    });
}

#[test]
fn discard_frees_what_an_earlier_fault_still_places() {
    let (memory, missing_pages) = missing_pages();
    let block = &memory.blocks()[0];
    let range = BlockRange { block: 0, offset: 3 * PAGE_SIZE, length: PAGE_SIZE };
    let answering = missing_pages.handling_faults();
    std::thread::scope(|scope| {
        let discard = scope.spawn(|| memory.discard(&[range], true).unwrap());
        while missing_pages.missing.remaining_pages() > 0 {
            yield_now();
        }
        let_others_run();
        block.backing.write(3 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).unwrap();
        drop(answering);
        assert_eq!(discard.join().unwrap(), 1);
    });
    assert_eq!(block.backing.first_data(block.all()).unwrap(), None);
}

/// A thread that did not wait can leave a fault behind, which is read late: here, while the pages
/// are freed.
#[test]
fn page_that_a_late_fault_fills_is_punched_again() {
    let (memory, missing_pages) = missing_pages();
    let block = &memory.blocks()[0];
    let punches = std::cell::Cell::new(0);
    memory.give_back(
        &[(0, PageRange::new(3, 1))],
        || (),
        || {
            block.backing.punch(PageRange::new(3, 1)).unwrap();
            if punches.replace(punches.get() + 1) == 0 {
                let _handling = missing_pages.handling_faults();
                block.backing.write(3 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).unwrap();
            }
        },
    );
    assert_eq!(punches.get(), 2);
    assert_eq!(block.backing.first_data(block.all()).unwrap(), None);
    memory.give_back(
        &[(0, PageRange::new(3, 1))],
        || (),
        || {
            punches.set(punches.get() + 1);
        },
    );
    assert_eq!(punches.get(), 3, "no fault was handled meanwhile");
}

/// The VMM may punch a discarded page at any time, so a fault that is read late must not fill it.
#[test]
fn first_fault_of_a_discarded_hole_allocates_nothing() {
    let Some(ram) = Registered::new(64) else { return };
    let missing_pages = registered(&ram, PageRange::new(0, 0));
    let block = &ram.memory.blocks()[0];
    block.discarded.set(PageRange::new(5, 1));
    let fault = || missing_pages.fault(&ram.memory.readers, (0, 5), Instant::now()).unwrap();
    assert_eq!((fault(), block.backing.allocated_pages()), (FaultOutcome::Resolved, 0));
    assert_eq!((fault(), block.backing.allocated_pages()), (FaultOutcome::Resolved, 1));
    // The page is present: a late fault changes nothing, also after the VMM has punched the page.
    assert_eq!((fault(), block.backing.allocated_pages()), (FaultOutcome::Resolved, 1));
    block.backing.punch(PageRange::new(5, 1)).unwrap();
    assert_eq!((fault(), block.backing.allocated_pages()), (FaultOutcome::Resolved, 0));
    // After another discard it is the first fault again.
    missing_pages.wake_waiting(0, PageRange::new(5, 1));
    assert_eq!((fault(), block.backing.allocated_pages()), (FaultOutcome::Resolved, 0));
    // An ordinary hole is filled at once.
    missing_pages.fault(&ram.memory.readers, (0, 6), Instant::now()).unwrap();
    assert_eq!(block.backing.allocated_pages(), 1);
}

/// Pages with their number in the first word, plus `version`.
fn content(pages: PageRange, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; pages.bytes() as usize];
    for (page, bytes) in (pages.first..).zip(bytes.chunks_mut(PAGE_SIZE as usize)) {
        bytes[..8].copy_from_slice(&(page + version).to_le_bytes());
    }
    bytes
}

/// A registered block whose pages `missing` will arrive.
fn registered(ram: &Registered, missing: PageRange) -> MissingPages {
    let all = HostPageSet::empty(ram.memory.blocks(), &[PAGE_SIZE]).unwrap();
    words_of(missing).for_each(|(word, bits)| all.add(0, word, bits));
    MissingPages::new(ram.memory.blocks(), Arc::new(all), ram.for_agent(), true, Arc::default())
        .unwrap()
}

#[test]
fn page_present_before_arrival_stays_and_others_are_placed() {
    const ARRIVED: u64 = 1000;
    const PRESENT: u64 = 5000;
    for present in [&[][..], &[20], &[27], &[39], &[20, 21], &[24, 26, 27, 33], &[38, 39]] {
        let Some(ram) = Registered::new(64) else { return };
        let range = PageRange::new(20, 20);
        let missing_pages = registered(&ram, range);
        let backing = &ram.memory.blocks()[0].backing;
        for page in present {
            backing.write(page * PAGE_SIZE, &content(PageRange::new(*page, 1), PRESENT)).unwrap();
        }
        let used = missing_pages
            .place_pages(&ram.memory.readers, 0, 0, range, &content(range, ARRIVED))
            .unwrap();
        assert_eq!(
            (used, missing_pages.missing.remaining_pages()),
            (20, 0),
            "{present:?} were present"
        );
        for page in range.first..range.end() {
            let version = if present.contains(&page) { PRESENT } else { ARRIVED };
            assert_eq!(ram.word(page), page + version, "page {page}, {present:?} were present");
        }
        assert_eq!(backing.allocated_pages(), 20);
        assert_eq!(missing_pages.take_placed(0), [range]);
    }
}

/// A zero page is placed only if the guest waits for it, and counted in any case.
#[test]
fn zeroes_count_as_faults_or_as_pushed() {
    let Some(ram) = Registered::new(200) else { return };
    let missing = PageRange::new(10, 150);
    let missing_pages = registered(&ram, missing);
    let readers = &ram.memory.readers;
    for page in [12, 13, 100] {
        assert_eq!(
            missing_pages.fault(&ram.memory.readers, (0, page), Instant::now()).unwrap(),
            FaultOutcome::Request
        );
        assert_eq!(
            missing_pages.fault(&ram.memory.readers, (0, page), Instant::now()).unwrap(),
            FaultOutcome::AlreadyRequested
        );
    }
    // 100 of these pages are missing. The second round finds none.
    for (used, left) in [(100, 50), (0, 50)] {
        assert_eq!(
            missing_pages.place_zeroes(readers, 0, 0, PageRange::new(0, 110)).unwrap(),
            used
        );
        assert_eq!(missing_pages.missing.remaining_pages(), left);
        let (faults, pushed) =
            (get(&missing_pages.live.faults), get(&missing_pages.live.pushed_pages));
        assert_eq!((faults, pushed, get(&missing_pages.live.requested_pages)), (3, 97, 3));
        assert_eq!(ram.memory.blocks()[0].backing.allocated_pages(), 3);
    }
    assert_eq!(missing_pages.take_placed(0), [PageRange::new(10, 100)]);
    assert!(
        [12, 13, 100].iter().all(|page| ram.touch(*page) == 0),
        "touches of placed pages must not wait"
    );
    assert_eq!(missing_pages.place_zeroes(readers, 0, 0, PageRange::new(110, 90)).unwrap(), 50);
    assert_eq!(
        (missing_pages.missing.remaining_pages(), get(&missing_pages.live.pushed_pages)),
        (0, 147)
    );
}

/// Pages are counted, not host pages. Nobody waits here, so nothing is placed.
#[test]
fn zeroes_and_drops_of_huge_pages_are_counted_in_pages() {
    let memory = memory(&[1024, 1024]);
    let missing = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE, 8 * PAGE_SIZE]).unwrap();
    missing.add(1, 0, u64::MAX);
    missing.add(1, 1, u64::MAX);
    let missing_pages =
        MissingPages::new(memory.blocks(), Arc::new(missing), memfd(0), true, Arc::default())
            .unwrap();
    let live = &missing_pages.live;
    assert_eq!(
        missing_pages.place_zeroes(&memory.readers, 0, 1, PageRange::new(60, 10)).unwrap(),
        80
    );
    assert_eq!((missing_pages.missing.remaining_pages(), get(&live.pushed_pages)), (1024 - 80, 80));
    assert_eq!(missing_pages.take_placed(1), [PageRange::new(480, 80)]);
    // Host pages 60 to 69 are placed above, so 70 to 99 are missing.
    for _ in 0..2 {
        missing_pages.drop_missing(1, PageRange::new(64 * 8, 36 * 8));
        assert_eq!(
            (missing_pages.missing.remaining_pages(), get(&live.dropped_pages)),
            (1024 - 80 - 240, 240)
        );
    }
    assert_eq!(missing_pages.take_dropped(1), [PageRange::new(560, 240)]);
    assert_eq!((missing_pages.take_dropped(0), missing_pages.take_dropped(1)), (vec![], vec![]));
    assert_eq!(get(&live.faults), 0);
}

/// The job's thread is woken when there is something to announce, or when nothing is missing any
/// more.
#[test]
fn job_thread_is_woken_by_a_drop_and_by_the_last_page() {
    let memory = memory(&[128]);
    let missing = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap();
    missing.add(0, 0, 0b111);
    let missing_pages =
        MissingPages::new(memory.blocks(), Arc::new(missing), memfd(0), false, Arc::default())
            .unwrap();
    let woken = || missing_pages.event().reset();
    missing_pages.drop_missing(0, PageRange::new(3, 100));
    assert!(!woken(), "none of these pages was missing");
    missing_pages.drop_missing(0, PageRange::new(2, 5));
    assert!(woken());
    missing_pages.place_zeroes(&memory.readers, 0, 0, PageRange::new(1, 1)).unwrap();
    assert!(!woken(), "one page is still missing");
    missing_pages.place_zeroes(&memory.readers, 0, 0, PageRange::new(0, 1)).unwrap();
    assert!(woken());
}
