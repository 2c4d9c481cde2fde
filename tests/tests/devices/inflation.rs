// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What goes into the balloon is freed, and nothing else.

use pageferry_agent::devices::balloon::feature;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::balloon::pages;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, Numbering, Piece};
use pageferry_tests::huge_pages::{HUGE_PAGE, HugePages};
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::random::page_content;
use pageferry_tests::require;

const PAGES: u64 = 4096;
const FIRST: u64 = FIRST_FREE_PAGE;

fn full() -> DeviceHost {
    let host = DeviceHost::ram(PAGES);
    host.block(0).fill(PageRange::new(FIRST, PAGES - FIRST), 1).unwrap();
    host
}

#[test]
fn scattered_pages_become_holes_and_their_neighbours_stay() {
    let host = full();
    let mut balloon = host.balloon();
    let before = host.block(0).allocated().unwrap();
    // Backwards, with gaps, and one of them twice.
    let mut given: Vec<u32> = pages(FIRST, 900).into_iter().filter(|page| page % 3 != 0).collect();
    given.reverse();
    given.push(given[0]);
    balloon.inflate(&given);
    let after = host.block(0).allocated().unwrap();
    assert_eq!(before - after, (given.len() as u64 - 1) * PAGE_SIZE);
    for page in FIRST..FIRST + 900 {
        let is_given = given.contains(&(page as u32));
        assert_eq!(host.block(0).is_hole(PageRange::new(page, 1)).unwrap(), is_given, "{page:#x}");
        if !is_given {
            assert_eq!(host.block(0).read_page(page).unwrap(), page_content(1, page));
        }
    }
    let status = host.balloon_status(&[]);
    assert_eq!(status["freed"], (given.len() as u64 - 1) * PAGE_SIZE, "{status}");
    assert_eq!(status["outside"], 0);
    assert_eq!(status["driver"], true);
}

#[test]
fn deflated_pages_are_ordinary_memory_again() {
    let host = full();
    let mut balloon = host.balloon();
    balloon.inflate(&pages(FIRST, 64));
    // A guest may use a page before the device hears of it.
    host.block(0).store(FIRST * PAGE_SIZE, 7).unwrap();
    balloon.deflate(&pages(FIRST, 64));
    assert_eq!(host.block(0).read_word(FIRST * PAGE_SIZE).unwrap(), 7);
    assert!(host.block(0).is_hole(PageRange::new(FIRST + 1, 63)).unwrap());
    balloon.inflate(&pages(FIRST, 1));
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 1)).unwrap());
}

#[test]
fn pages_outside_of_memory_are_counted_and_the_others_freed() {
    let host = full();
    let mut balloon = host.balloon();
    // The end of memory, what follows it, and the last page that there is.
    balloon.inflate(&[PAGES as u32 - 1, PAGES as u32, PAGES as u32 + 1, u32::MAX]);
    assert!(host.block(0).is_hole(PageRange::new(PAGES - 1, 1)).unwrap());
    let status = host.balloon_status(&[]);
    assert_eq!(status["outside"], 3 * PAGE_SIZE, "{status}");
    assert_eq!(status["freed"], PAGE_SIZE);
}

#[test]
fn one_buffer_may_have_its_numbers_in_many_pieces() {
    let host = full();
    let mut balloon = host.balloon();
    let numbers: Vec<u8> =
        [FIRST, FIRST + 1].iter().flat_map(|page| (*page as u32).to_le_bytes()).collect();
    let gpa = balloon.driver.write_buffer(0, &numbers);
    // Cut in the middle of a number, with an empty piece, and with a part of a number behind.
    let pieces = [(0, 3), (3, 0), (3, 5), (0, 2)];
    let pieces = pieces.map(|(offset, length)| Piece::readable(gpa + offset, length));
    balloon.driver.queue(0).round_trip(&pieces);
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 2)).unwrap());
    assert_eq!(host.balloon_now().freed, 2 * PAGE_SIZE);
}

#[test]
fn target_and_actual_go_between_operator_and_driver() {
    let host = full();
    let mut balloon = host.balloon();
    host.balloon_status(&["2M"]);
    balloon.driver.front_end.wait_for_config_change();
    assert_eq!(u64::from(balloon.target()), (2 << 20) / PAGE_SIZE);
    balloon.inflate(&pages(FIRST, 512));
    balloon.set_actual(512);
    let status = host.balloon_status(&[]);
    assert_eq!((&status["target"], &status["actual"]), (&(2 << 20).into(), &(2 << 20).into()));
    // The same target again is no change.
    host.balloon_status(&["2M"]);
    assert!(!balloon.driver.front_end.config_changes_within(std::time::Duration::from_millis(200)));
    host.balloon_status(&["0"]);
    balloon.driver.front_end.wait_for_config_change();
    balloon.deflate(&pages(FIRST, 512));
    balloon.set_actual(0);
    assert_eq!(host.balloon_now().actual, 0);
}

#[test]
fn driver_that_deflates_on_oom_needs_nothing_else() {
    let host = full();
    let socket = host.balloon_socket();
    let features = feature::DEFLATE_ON_OOM;
    let mut balloon = BalloonDriver::start(&socket, host.memory(), 0, features, Numbering::Counted);
    balloon.inflate(&pages(FIRST, 16));
    // It takes pages back without an order of the operator's, and says so.
    balloon.deflate(&pages(FIRST, 16));
    balloon.set_actual(0);
    assert_eq!(host.balloon_now().freed, 16 * PAGE_SIZE);
}

#[test]
fn huge_page_is_freed_when_all_of_it_was_given_back() {
    let Some(_pool) = require::hugetlb(4) else { return };
    let small = HUGE_PAGE / PAGE_SIZE;
    let huge = BlockLayout {
        id: 7,
        name: "huge".into(),
        gpa: 1 << 30,
        granularity: HUGE_PAGE,
        backing: Backing::HugePages,
        ..BlockLayout::ram(4 * HUGE_PAGE)
    };
    let host = DeviceHost::start(vec![BlockLayout::ram(FIRST * PAGE_SIZE), huge]);
    host.block(7).write(0, &vec![1; 4 * HUGE_PAGE as usize]).unwrap();
    let free = HugePages::free().unwrap();
    let mut balloon = host.balloon();
    let first = (1 << 30) / PAGE_SIZE + small;
    balloon.inflate(&pages(first, small - 1));
    assert_eq!(HugePages::free().unwrap(), free, "a page of it is still in use");
    // One of them goes out again.
    balloon.deflate(&pages(first + 3, 1));
    balloon.inflate(&pages(first + small - 1, 1));
    assert_eq!(HugePages::free().unwrap(), free, "a page of it is in use again");
    balloon.inflate(&pages(first + 3, 1));
    assert_eq!(HugePages::free().unwrap(), free + 1);
    // The parts of two pages in one buffer.
    balloon.inflate(&pages(first + small + small / 2, small));
    assert_eq!(HugePages::free().unwrap(), free + 1);
    balloon.inflate(&pages(first + small, small / 2));
    assert_eq!(HugePages::free().unwrap(), free + 2);
}
