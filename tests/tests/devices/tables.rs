// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Front-ends whose memory tables differ from the blocks that the VMM has handed over: a page is
//! found by its place in the file.

use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::balloon::bytes;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost};
use pageferry_tests::memory::TestMemory;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const PAGES: u64 = 2048;
const HALF: u64 = PAGES / 2;
/// Where a front-end has the second half of the block.
const ELSEWHERE: u64 = 1 << 32;

fn full() -> DeviceHost {
    let host = DeviceHost::ram(PAGES);
    host.block(0).fill(PageRange::new(FIRST_FREE_PAGE, PAGES - FIRST_FREE_PAGE), 1).unwrap();
    host
}

/// The halves of the block: the first where it is, and the second elsewhere.
fn halves(balloon: &BalloonDriver) -> [VhostUserMemoryRegionInfo; 2] {
    let whole = balloon.driver.front_end.regions()[0];
    let size = HALF * PAGE_SIZE;
    let second = VhostUserMemoryRegionInfo {
        guest_phys_addr: ELSEWHERE,
        memory_size: size,
        userspace_addr: whole.userspace_addr + size,
        mmap_offset: size,
        ..whole
    };
    [VhostUserMemoryRegionInfo { memory_size: size, ..whole }, second]
}

#[test]
fn regions_may_lie_elsewhere_than_blocks() {
    let host = full();
    let mut balloon = host.balloon();
    let table = halves(&balloon);
    balloon.driver.front_end.frontend.set_mem_table(&table).unwrap();
    balloon.report(&[(ELSEWHERE + 5 * PAGE_SIZE, 3 * PAGE_SIZE), bytes(FIRST_FREE_PAGE, 1)]);
    assert!(host.block(0).is_hole(PageRange::new(HALF + 5, 3)).unwrap());
    assert!(host.block(0).is_hole(PageRange::new(FIRST_FREE_PAGE, 1)).unwrap());
    assert_eq!(host.balloon_now().freed, 4 * PAGE_SIZE);
    // The VMM has told another address of the second half, and it does not count here.
    balloon.report(&[bytes(HALF + 20, 2)]);
    assert!(!host.block(0).is_hole(PageRange::new(HALF + 20, 1)).unwrap());
    assert_eq!(host.balloon_now().outside, 2 * PAGE_SIZE);
}

#[test]
fn regions_come_and_go() {
    let host = full();
    let mut balloon = host.balloon();
    let [first, second] = halves(&balloon);
    balloon.driver.front_end.frontend.set_mem_table(&[first]).unwrap();
    let second_half = (ELSEWHERE, 2 * PAGE_SIZE);
    balloon.report(&[second_half]);
    assert_eq!(host.balloon_now().outside, 2 * PAGE_SIZE);
    balloon.driver.front_end.frontend.add_mem_region(&second).unwrap();
    balloon.report(&[second_half]);
    assert!(host.block(0).is_hole(PageRange::new(HALF, 2)).unwrap());
    balloon.driver.front_end.frontend.remove_mem_region(&second).unwrap();
    host.block(0).fill(PageRange::new(HALF, 2), 1).unwrap();
    balloon.report(&[second_half]);
    assert_eq!(host.balloon_now().outside, 4 * PAGE_SIZE);
    assert!(!host.block(0).is_hole(PageRange::new(HALF, 1)).unwrap());
}

#[test]
fn file_that_is_no_block_is_left_alone() {
    let host = full();
    let mut balloon = host.balloon();
    let other = Arc::new(TestMemory::ram(HALF * PAGE_SIZE).unwrap());
    other.block(0).unwrap().fill(PageRange::new(0, HALF), 1).unwrap();
    let [first, second] = halves(&balloon);
    let other_file = other.block(0).unwrap().file().as_raw_fd();
    let second = VhostUserMemoryRegionInfo { mmap_offset: 0, mmap_handle: other_file, ..second };
    balloon.driver.front_end.frontend.set_mem_table(&[first, second]).unwrap();
    balloon.report(&[(ELSEWHERE, HALF * PAGE_SIZE)]);
    assert_eq!(other.allocated().unwrap(), HALF * PAGE_SIZE);
    let status = host.balloon_now();
    assert_eq!((status.freed, status.outside), (0, HALF * PAGE_SIZE));
    assert!(!host.block(0).is_hole(PageRange::new(HALF, HALF)).unwrap());
}

#[test]
fn block_that_is_handed_over_later_is_found() {
    let host = full();
    let client = host.vmm.client();
    client.remove_block(0).unwrap();
    let mut balloon = host.balloon();
    balloon.report(&[bytes(FIRST_FREE_PAGE, 2)]);
    assert_eq!(host.balloon_now().outside, 2 * PAGE_SIZE);
    let added = pageferry_tests::files::block(
        9,
        "again",
        std::os::fd::AsFd::as_fd(&**host.block(0).file()),
        PAGES * PAGE_SIZE,
    );
    client.add_block(added).unwrap();
    balloon.report(&[bytes(FIRST_FREE_PAGE, 2)]);
    assert!(host.block(0).is_hole(PageRange::new(FIRST_FREE_PAGE, 2)).unwrap());
}
