// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A destination with too few huge pages, before its guest runs and while it runs.

use crate::scene::{
    HUGE, MIB, Move, Pages, Switch, TRICKLE, check_all_filled, fill_all, guest, memory, plausible,
    side_with, small,
};
use pageferry_client::{BlockRange, OutgoingOptions, Phase, Punch};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::Pattern;
use pageferry_tests::huge_pages::{HUGE_PAGE, HugePages, hugetlb_memfd};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::vmm::PATIENCE;
use rustix::fs::{FallocateFlags, fallocate};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

/// Takes all free huge pages except `left`, until the value is dropped.
fn take_all_but(left: u64) -> OwnedFd {
    let others = HugePages::free().unwrap() - left;
    let hog = hugetlb_memfd(others * HUGE_PAGE).unwrap();
    fallocate(&hog, FallocateFlags::empty(), 0, others * HUGE_PAGE).unwrap();
    hog
}

/// A source on small pages with full memory, and a destination on huge pages.
fn sides() -> (MockSide, MockSide) {
    let (source, destination) = (small(8), side_with(memory(Pages::Huge, 8)));
    fill_all(&source, 4);
    (source, destination)
}

/// Switches the guest over at once. Hardly any page is pushed.
fn start<'a>(source: &'a MockSide, destination: &'a MockSide) -> Move<'a> {
    let migration = Move::start(source, destination, Switch::AtOnce.options(TRICKLE));
    migration.until_postcopy();
    migration
}

/// The last huge page of the second block: its number, and its first byte.
fn last_page(side: &MockSide) -> (u64, u64) {
    let last = side.block(1).pages() / HUGE - 1;
    (last, last * HUGE_PAGE)
}

/// A thread of the guest that writes to the last huge page of the second block.
fn touch(side: &MockSide) -> JoinHandle<()> {
    let (memory, (_, offset)) = (side.vmm.memory().clone(), last_page(side));
    std::thread::spawn(move || memory.block(1).unwrap().store(offset, 5).unwrap())
}

#[test]
fn a_guest_does_not_move_to_too_few_huge_pages() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(10) else { return };
    for switch in [Switch::AtOnce, Switch::AfterPasses(1)] {
        let (source, destination) = sides();
        let options = guest(Pattern::Uniform, 20_000);
        let (wrote, writes) = (source.threads(&options), destination.threads(&options));
        source.vmm.start().unwrap();
        wait_until("writes", PATIENCE, || wrote() > 2000).unwrap();
        // With passes, huge pages are allocated as pages arrive. That error names the pool, too.
        let hog = take_all_but(3);
        let [outgoing, incoming] =
            Move::start(&source, &destination, switch.options(60 * MIB)).end();
        for status in [&outgoing, &incoming] {
            assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
            assert!(status.error_text().contains("nr_hugepages"), "{}", status.error_text());
        }
        // The guest keeps running at the source.
        assert!(source.vmm.record().runs && !destination.vmm.record().runs);
        let before = wrote();
        wait_until("more writes", PATIENCE, || wrote() > before + 100).unwrap();
        drop(hog);

        let migration = Move::start(&source, &destination, Switch::AtOnce.options(0));
        migration.finish();
        wait_until("writes there", PATIENCE, || writes() > 0).unwrap();
        destination.vmm.stop().unwrap();
        assert!(destination.vmm.usage().check().unwrap() > 1000);
        check_all_filled(&destination, 4);
    }
}

#[test]
fn huge_pages_still_missing_are_reserved_for_the_guest() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(10) else { return };
    let (source, destination) = sides();
    let migration = start(&source, &destination);
    let hog = take_all_but(0);
    migration.hurry();
    migration.finish();
    drop(hog);
    check_all_filled(&destination, 4);
}

#[test]
fn a_guest_waits_for_a_huge_page_and_continues_with_it() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(10) else { return };
    let (source, destination) = sides();
    let migration = start(&source, &destination);
    // The guest discards a huge page, which also drops its reservation. Then others take all free
    // huge pages.
    let (_, offset) = last_page(&destination);
    let given = BlockRange { block: 1, offset, length: HUGE_PAGE };
    destination.block(1).store(offset, 4).unwrap();
    destination.client().discard(&[given], Punch::Yes).unwrap();
    destination.client().populate(&[given]).unwrap();
    let hog = take_all_but(0);
    let touching = touch(&destination);
    wait_until("the reason in the status", PATIENCE, || {
        destination.status().error_text().contains("nr_hugepages")
    })
    .unwrap();
    assert!(!touching.is_finished());
    drop(hog);
    wait_until("the page", PATIENCE, || touching.is_finished()).unwrap();
    touching.join().unwrap();
    migration.hurry();
    let [_, incoming] = migration.finish();
    assert_eq!(incoming.error, None);
    assert_eq!(destination.block(1).load(offset).unwrap(), 5);
}

#[test]
fn a_page_that_cannot_be_placed_pauses_both_sides() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(10) else { return };
    let (source, destination) = sides();
    let migration = start(&source, &destination);
    // The page is reserved. To allocate it through its file and to free it uses the reservation up.
    // Then others take all free huge pages.
    let (last, offset) = last_page(&destination);
    let file = destination.block(1).file();
    let place = destination.block(1).layout().fd_offset + offset;
    fallocate(file, FallocateFlags::empty(), place, HUGE_PAGE).unwrap();
    destination.block(1).punch(PageRange::new(last * HUGE, HUGE)).unwrap();
    let hog = take_all_but(0);
    let touching = touch(&destination);
    // The page is requested and arrives, and there is no room for it.
    let errors = [&source, &destination].map(|side| {
        let paused = || side.status().phase == Phase::PostcopyPaused;
        wait_until("the pause", PATIENCE, paused).unwrap();
        side.status().error.unwrap()
    });
    let says = |why: &String| why.contains("cannot be placed") && why.contains("nr_hugepages");
    assert!(errors.iter().all(says), "{errors:#?}");
    assert!(!touching.is_finished());
    drop(hog);
    source.client().recover(None, &OutgoingOptions::default()).unwrap();
    touching.join().unwrap();
    migration.hurry();
    for status in migration.end() {
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        assert!(status.counters.disconnected_us > 0);
        plausible(&status);
    }
    assert_eq!(destination.block(1).load(offset).unwrap(), 5);
    check_all_filled(&destination, 4);
}
