// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests on huge pages. A host page holds 512 pages. It is allocated and freed as a whole, its
//! file cannot be written with `pwrite`, and its holes are not reported.

use pageferry_client::{
    BlockRange, Client, IncomingOptions, JobStatus, OutgoingOptions, Phase, Punch,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::huge_pages::{HUGE_PAGE, HugePages, hugetlb_memfd};
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock, TestMemory};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use rustix::fs::{FallocateFlags, fallocate};
use std::sync::Arc;

/// Pages of a huge page.
const HUGE: u64 = HUGE_PAGE / PAGE_SIZE;
const BLOCK: u32 = 4;
/// Huge pages of the block.
const COUNT: u64 = 9;

/// The tracker of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Log,
    WriteProtect,
}

/// A VMM with one block of huge pages.
fn side(granularity: u64, by: By) -> MockSide {
    side_on(Backing::HugePages, granularity, by)
}

/// A VMM with one block.
fn side_on(backing: Backing, granularity: u64, by: By) -> MockSide {
    let layout = BlockLayout {
        id: BLOCK,
        gpa: 1 << 32,
        // One host page, because the offset must be aligned to huge pages.
        fd_offset: HUGE_PAGE,
        granularity,
        backing,
        ..BlockLayout::ram(COUNT * HUGE_PAGE)
    };
    let memory = Arc::new(TestMemory::new(vec![layout]).unwrap());
    let tracker = match by {
        By::Log => Tracker::Log,
        By::WriteProtect => Tracker::WriteProtect,
    };
    MockSide::over(memory, tracker)
}

/// Huge pages that are allocated.
fn allocated(side: &MockSide) -> u64 {
    side.allocated() / HUGE_PAGE
}

fn is_discarded(side: &MockSide, page: u64) -> bool {
    side.vmm.client().discarded(BLOCK).unwrap().contains(page)
}

/// Migrates to `destination`, and checks that its memory is then the same.
fn migrate(source: &MockSide, destination: &MockSide, streams: u16) -> JobStatus {
    let status = move_guest(source, destination, streams);
    same_memory(source.vmm.memory(), source.vmm.client(), destination.vmm.memory()).unwrap();
    status
}

/// Migrates to `destination`.
fn move_guest(source: &MockSide, destination: &MockSide, streams: u16) -> JobStatus {
    let options = OutgoingOptions { streams, ..OutgoingOptions::default() };
    let [job, _] = source.start_move(destination, &options);
    let status = source.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    wait_until("the guest running there", PATIENCE, || destination.vmm.record().runs).unwrap();
    status
}

fn huge(index: u64) -> PageRange {
    PageRange::new(index * HUGE, HUGE)
}

/// True if the whole huge page is discarded, false if no page of it is.
fn huge_is_discarded(side: &MockSide, index: u64) -> bool {
    let bitmap = side.vmm.client().discarded(BLOCK).unwrap();
    match bitmap.count(huge(index)) {
        0 => false,
        count => {
            assert_eq!(count, HUGE, "a part of huge page {index} is discarded");
            true
        }
    }
}

fn discard(client: &Client, pages: PageRange, punch: Punch) -> u64 {
    client
        .discard(
            &[BlockRange { block: BLOCK, offset: pages.offset(), length: pages.bytes() }],
            punch,
        )
        .unwrap()
}

/// Fills pages like the guest. Marks the log if there is no other tracker.
fn write(
    block: &TestBlock, by: By, pages: PageRange, fill: impl Fn(u64) -> [u8; PAGE_SIZE as usize],
) {
    for page in pages.first..pages.end() {
        block.write(page * PAGE_SIZE, &fill(page)).unwrap();
    }
    if by == By::Log {
        block.mark(pages);
    }
}

fn zero(_: u64) -> [u8; PAGE_SIZE as usize] {
    [0; PAGE_SIZE as usize]
}

fn stale(_: u64) -> [u8; PAGE_SIZE as usize] {
    [0xdd; PAGE_SIZE as usize]
}

/// Migrates huge pages of every kind in one block.
fn all_kinds(by: By, streams: u16) {
    let (source, destination) = (side(PAGE_SIZE, by), side(PAGE_SIZE, By::Log));
    let block = source.block(BLOCK);
    let client = source.vmm.client();
    // 0: full. 1: a hole. 2: some pages have content, and the others are zero.
    block.fill(huge(0), 7).unwrap();
    block.fill(PageRange::new(2 * HUGE + 5, 1), 7).unwrap();
    block.fill(PageRange::new(2 * HUGE + 100, 10), 7).unwrap();
    // 3, 4: discarded before the start, and freed or not.
    write(block, by, huge(3), stale);
    write(block, by, huge(4), stale);
    assert_eq!(discard(client, huge(3), Punch::Yes), HUGE);
    assert_eq!(discard(client, huge(4), Punch::No), HUGE);
    // 5: discarded in part, which has no effect.
    block.fill(huge(5), 7).unwrap();
    assert_eq!(discard(client, PageRange::new(5 * HUGE + 10, 20), Punch::Yes), 0);
    // 6: discarded after it was sent. 7: zeroed after it was sent. 8: written for the first time
    // after the rest was sent.
    block.fill(huge(6), 7).unwrap();
    block.fill(huge(7), 7).unwrap();
    assert_eq!(allocated(&source), 6);

    let (memory, late) = (source.vmm.memory().clone(), client.clone());
    source.vmm.before_pause(move || {
        let block = memory.block(BLOCK)?;
        write(block, by, PageRange::new(2 * HUGE + 100, 5), zero);
        write(block, by, PageRange::new(5 * HUGE + 40, 1), |page| [page as u8; PAGE_SIZE as usize]);
        discard(&late, huge(6), Punch::Yes);
        write(block, by, huge(7), zero);
        write(block, by, PageRange::new(8 * HUGE + 511, 1), |_| [8; PAGE_SIZE as usize]);
        Ok(())
    });
    let status = migrate(&source, &destination, streams);

    assert_eq!(allocated(&source), 6, "0, 2, 4, 5, 7, 8: the agent's reads allocate nothing");
    assert_eq!(allocated(&destination), 4, "0, 2, 5, 8");
    assert!(destination.vmm.record().allocated_at_load <= Some(4 * HUGE_PAGE));
    for index in [3, 4, 6] {
        assert!(huge_is_discarded(&destination, index), "{index}");
    }
    assert!(!huge_is_discarded(&destination, 5));
    let counters = status.counters;
    assert_eq!(counters.stray_pages, 0, "the guest wrote to no discarded page");
    assert_eq!(counters.discarded_pages, 3 * HUGE);
}

#[test]
fn huge_pages_arrive_by_the_log() {
    for streams in [1, 3] {
        let Some(_pool) = require::hugetlb(2 * COUNT) else { return };
        all_kinds(By::Log, streams);
    }
}

#[test]
fn huge_pages_arrive_by_write_protection() {
    for streams in [1, 3] {
        let Some(_pool) = require::hugetlb(2 * COUNT) else { return };
        if require::uffd() {
            all_kinds(By::WriteProtect, streams);
        }
    }
}

/// A file on hugetlbfs does not report its holes. A write after the free must still not be lost.
#[test]
fn freed_huge_pages_are_holes_until_they_are_written() {
    if !require::uffd() {
        return;
    }
    for by in [By::Log, By::WriteProtect] {
        let Some(_pool) = require::hugetlb(2 * COUNT) else { return };
        let (source, destination) = (side(PAGE_SIZE, by), side(PAGE_SIZE, By::Log));
        let (block, client) = (source.block(BLOCK), source.vmm.client().clone());
        block.fill(PageRange::new(0, 6 * HUGE), 7).unwrap();
        let free = |client: &Client, first: u64, count: u64| {
            let range = PageRange::new(first * HUGE, count * HUGE);
            let range = BlockRange { block: BLOCK, offset: range.offset(), length: range.bytes() };
            assert_eq!(client.free(&[range]).unwrap(), count * HUGE);
        };
        // Frees before the start, and after everything was sent, with and without a later write.
        free(&client, 0, 2);
        block.store(huge(1).offset() + 4096, 11).unwrap();
        assert_eq!(allocated(&source), 5);
        let memory = source.vmm.memory().clone();
        source.vmm.before_pause(move || {
            let block = memory.block(BLOCK)?;
            write(block, by, huge(2), stale);
            free(&client, 2, 2);
            block.store(huge(3).offset() + 8192, 33)?;
            if by == By::Log {
                block.mark(PageRange::new(huge(3).first + 2, 1));
            }
            Ok(())
        });
        migrate(&source, &destination, 2);
        assert_eq!((allocated(&source), allocated(&destination)), (4, 4), "1, 3, 4, 5");
        let there = destination.block(BLOCK);
        assert_eq!(there.read_word(huge(1).offset() + 4096).unwrap(), 11);
        assert_eq!(there.read_word(huge(3).offset() + 8192).unwrap(), 33);
        assert_eq!(there.read_page(huge(2).first + 5).unwrap(), zero(0));
    }
}

#[test]
fn a_discard_rounds_inward_and_a_populate_outward() {
    for granularity in [PAGE_SIZE, HUGE_PAGE] {
        let Some(_pool) = require::hugetlb(2 * COUNT) else { return };
        let (source, destination) = (side(granularity, By::Log), side(granularity, By::Log));
        source.block(BLOCK).fill(PageRange::new(0, 4 * HUGE), 3).unwrap();
        let client = source.vmm.client();
        assert_eq!(discard(client, PageRange::new(1, HUGE - 1), Punch::Yes), 0);
        assert_eq!(
            discard(client, PageRange::new(HUGE - 1, 3 * HUGE), Punch::Yes),
            2 * HUGE,
            "0 and 3 are not covered"
        );
        assert_eq!(allocated(&source), 2);
        let one_byte = BlockRange { block: BLOCK, offset: huge(2).offset() + 5, length: 1 };
        assert_eq!(client.populate(&[one_byte]).unwrap(), HUGE);
        migrate(&source, &destination, 1);
        assert_eq!(allocated(&destination), 2);
        assert_eq!(
            [0, 1, 2, 3].map(|index| huge_is_discarded(&destination, index)),
            [false, true, false, false]
        );
    }
}

#[test]
fn small_discards_are_zero_or_free_in_huge_pages() {
    let Some(_pool) = require::hugetlb(COUNT) else { return };
    let (source, destination) = (
        side_on(Backing::Memfd, PAGE_SIZE, By::Log),
        side_on(Backing::HugePages, PAGE_SIZE, By::Log),
    );
    source.block(BLOCK).fill(PageRange::new(0, 3 * HUGE), 5).unwrap();
    // After everything was sent: a part of 0, the end of 1 and all of 2.
    let late = [PageRange::new(10, 20), PageRange::new(2 * HUGE - 7, 7), huge(2)];
    let client = source.vmm.client().clone();
    source.vmm.before_pause(move || {
        for pages in late {
            assert_eq!(discard(&client, pages, Punch::Yes), pages.count);
        }
        Ok(())
    });
    migrate(&source, &destination, 2);
    assert_eq!(allocated(&destination), 2);
    for page in late.iter().flat_map(|pages| pages.first..pages.end()) {
        assert!(is_discarded(&destination, page));
        assert_eq!(
            destination.block(BLOCK).read_page(page).unwrap(),
            zero(page),
            "page {page} is stale"
        );
    }
}

#[test]
fn a_write_into_a_discarded_huge_page_is_a_stray_one() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(2 * COUNT) else { return };
    let (source, destination) = (side(HUGE_PAGE, By::WriteProtect), side(HUGE_PAGE, By::Log));
    source.block(BLOCK).fill(huge(0), 3).unwrap();
    discard(source.vmm.client(), huge(2), Punch::Yes);
    let memory = source.vmm.memory().clone();
    source.vmm.before_pause(move || memory.block(BLOCK)?.store(huge(2).offset() + 4096, 77));
    let status = migrate(&source, &destination, 1);
    assert!(status.counters.stray_pages > 0);
    assert_eq!(destination.block(BLOCK).read_word(huge(2).offset() + 4096).unwrap(), 77);
    assert!(is_discarded(&destination, huge(2).first + 1), "it stays discarded");
    assert_eq!(allocated(&destination), 2);
}

#[test]
fn without_huge_pages_there_the_guest_stays() {
    let Some(_pool) = require::hugetlb(2 * COUNT) else { return };
    let (source, destination) = (side(PAGE_SIZE, By::Log), side(PAGE_SIZE, By::Log));
    source.block(BLOCK).fill(PageRange::new(0, 4 * HUGE), 9).unwrap();
    // All huge pages except two, which are not enough.
    let others = HugePages::free().unwrap() - 2;
    let hog = hugetlb_memfd(others * HUGE_PAGE).unwrap();
    fallocate(&hog, FallocateFlags::empty(), 0, others * HUGE_PAGE).unwrap();
    source.vmm.start().unwrap();
    let (there, address) = destination.listen(&IncomingOptions::default());
    let job = source.vmm.start_outgoing(&address, &OutgoingOptions::default()).unwrap();
    let status = source.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(
        status.error_text().contains("no huge page of 2048 kB is free"),
        "{}",
        status.error_text()
    );
    assert_eq!(destination.vmm.wait_job(there, PATIENCE).unwrap().phase, Phase::Failed);
    assert!(source.vmm.record().runs && !destination.vmm.record().runs);
    drop(hog);
    migrate(&source, &destination, 1);
    assert_eq!(allocated(&destination), 4);
}

#[test]
fn a_write_beside_discarded_thp_pages_brings_none_back() {
    if !(require::thp() && require::uffd()) {
        return;
    }
    let (source, destination) = (
        side_on(Backing::Memfd, PAGE_SIZE, By::WriteProtect),
        side_on(Backing::Memfd, PAGE_SIZE, By::Log),
    );
    let block = source.block(BLOCK);
    block.store(0, 1).unwrap();
    assert_eq!(block.allocated().unwrap(), HUGE_PAGE, "one fault allocates the whole huge page");
    (0..HUGE).for_each(|page| block.store(page * PAGE_SIZE, page + 1).unwrap());
    // Without a punch, which would split the huge page.
    assert_eq!(discard(source.vmm.client(), PageRange::new(10, 10), Punch::No), 10);
    let memory = source.vmm.memory().clone();
    source.vmm.before_pause(move || memory.block(BLOCK)?.store(5 * PAGE_SIZE, 4711));
    // The destination's kernel also allocates the whole huge page for the first page. So discarded
    // pages are zero there instead of holes.
    let status = move_guest(&source, &destination, 1);
    assert_eq!(status.counters.stray_pages, 0);
    let there = |page: u64| destination.block(BLOCK).read_word(page * PAGE_SIZE).unwrap();
    assert_eq!((there(5), there(9), there(20)), (4711, 10, 21));
    assert!((10..20).all(|page| there(page) == 0 && is_discarded(&destination, page)));
}
