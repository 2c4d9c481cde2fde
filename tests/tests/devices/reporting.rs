// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page reporting, whatever number its queue has, and drivers that fill free pages.

use pageferry_agent::devices::balloon::feature;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::balloon::{bytes, pages};
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, Numbering};
use pageferry_tests::random::page_content;

const FIRST: u64 = FIRST_FREE_PAGE;
const PAGES: u64 = 2048;

fn full() -> DeviceHost {
    let host = DeviceHost::ram(PAGES);
    host.block(0).fill(PageRange::new(FIRST, PAGES - FIRST), 1).unwrap();
    host
}

fn report_with(features: u64, numbering: Numbering, number: usize) {
    let host = full();
    let socket = host.balloon_socket();
    let mut balloon = BalloonDriver::start(&socket, host.memory(), 0, features, numbering);
    assert_eq!(balloon.report_queue(), number);
    balloon.report(&[bytes(FIRST, 512), bytes(FIRST + 1024, 1)]);
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 512)).unwrap());
    assert!(host.block(0).is_hole(PageRange::new(FIRST + 1024, 1)).unwrap());
    assert_eq!(host.balloon_now().freed, 513 * PAGE_SIZE);
    assert_eq!(host.block(0).read_page(FIRST + 512).unwrap(), page_content(1, FIRST + 512));
}

#[test]
fn reports_come_in_the_queue_that_the_driver_counts() {
    let reporting = feature::REPORTING;
    report_with(reporting, Numbering::Counted, 2);
    report_with(reporting | feature::STATS, Numbering::Counted, 3);
    report_with(reporting | feature::HINTING, Numbering::Counted, 3);
    report_with(reporting | feature::STATS | feature::HINTING, Numbering::Counted, 4);
}

#[test]
fn reports_come_in_the_queue_of_the_specification() {
    report_with(feature::REPORTING, Numbering::Fixed, 4);
    report_with(feature::REPORTING | feature::HINTING, Numbering::Fixed, 4);
}

#[test]
fn reports_of_parts_of_pages_free_no_neighbour() {
    let host = full();
    let mut balloon = host.balloon();
    let (gpa, _) = bytes(FIRST, 1);
    // Half of the first page, all of the second, and half of the third.
    balloon.report(&[(gpa + PAGE_SIZE / 2, 2 * PAGE_SIZE)]);
    for page in [FIRST, FIRST + 2] {
        assert_eq!(host.block(0).read_page(page).unwrap(), page_content(1, page), "{page:#x}");
    }
    balloon.report(&[(gpa + 10 * PAGE_SIZE, 100)]);
    assert_eq!(host.block(0).read_page(FIRST + 10).unwrap(), page_content(1, FIRST + 10));
}

#[test]
fn guest_that_fills_its_free_pages_keeps_them() {
    let host = full();
    let mut balloon = host.balloon();
    balloon.set_poison(0xaaaa_aaaa);
    let before = host.block(0).allocated().unwrap();
    balloon.report(&[bytes(FIRST, 512)]);
    assert_eq!(host.block(0).allocated().unwrap(), before, "it expects its pattern there");
    assert_eq!(host.balloon_now().freed, 0);
    // What is in the balloon it does not read before it takes it out.
    balloon.inflate(&pages(FIRST, 16));
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 16)).unwrap());
    // A pattern of zeroes is what a hole has.
    balloon.set_poison(0);
    balloon.report(&[bytes(FIRST, 512)]);
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 512)).unwrap());
}

#[test]
fn pattern_without_the_feature_means_nothing() {
    let host = full();
    let socket = host.balloon_socket();
    let features = feature::REPORTING;
    let mut balloon = BalloonDriver::start(&socket, host.memory(), 0, features, Numbering::Counted);
    balloon.set_poison(0xaaaa_aaaa);
    balloon.report(&[bytes(FIRST, 512)]);
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 512)).unwrap());
}
