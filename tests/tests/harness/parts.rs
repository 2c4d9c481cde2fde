// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the harness: the parts on which other tests rely.

use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_tests::Error;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::Guest;
use pageferry_tests::guest::threads::{PageSet, Pattern, ThreadGuest, ThreadGuestOptions};
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::usage::{Path, Usage};
use pageferry_tests::verify::same_block;
use std::sync::Arc;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

/// Two blocks: one at an odd place in its file, one in the middle of another file.
fn memory() -> TestMemory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    let ram = BlockLayout { fd_offset: 0x5000, ..BlockLayout::ram(1 << 20) };
    let high = BlockLayout {
        id: 7,
        name: "high".into(),
        gpa: 4 << 30,
        fd_offset: 1 << 20,
        backing: Backing::File(Arc::new(file)),
        ..BlockLayout::ram(2 << 20)
    };
    TestMemory::new(vec![ram, high]).unwrap()
}

fn busy(path: Path) -> ThreadGuestOptions {
    ThreadGuestOptions { rate: None, path, ..ThreadGuestOptions::default() }
}

#[test]
fn looking_at_memory_allocates_nothing() {
    let memory = memory();
    let block = memory.block(7).unwrap();
    block.fill(PageRange::new(3, 2), 9).unwrap();
    let before = memory.allocated().unwrap();
    assert_eq!(block.extents().unwrap(), [PageRange::new(3, 2)]);
    assert_eq!(block.read_page(100).unwrap(), [0; PAGE_SIZE as usize]);
    assert!(block.is_hole(PageRange::new(5, 400)).unwrap());
    assert!(!block.is_hole(PageRange::new(0, 4)).unwrap());
    assert_eq!(memory.allocated().unwrap(), before);
    assert_eq!(before, 2 * PAGE_SIZE);
}

#[test]
fn a_store_through_the_mapping_is_in_the_file_at_its_offset() {
    let memory = memory();
    for block in memory.blocks() {
        block.store(9 * PAGE_SIZE + 16, 0x1122).unwrap();
        assert_eq!(block.read_word(9 * PAGE_SIZE + 16).unwrap(), 0x1122);
        assert!(block.store(block.layout().length, 1).is_err());
    }
}

#[test]
fn a_file_that_is_too_short_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len((1 << 20) - 1).unwrap();
    let layout =
        BlockLayout { backing: Backing::File(Arc::new(file)), ..BlockLayout::ram(1 << 20) };
    let error = TestMemory::new(vec![layout]).unwrap_err();
    assert!(error.to_string().contains("0xfffff"), "{error}");
}

#[test]
fn a_paused_guest_writes_nothing_and_its_ledger_is_right() {
    for pattern in [
        Pattern::Sequential,
        Pattern::Uniform,
        Pattern::Hot { pages_percent: 10, writes_percent: 90 },
    ] {
        let usage = Usage::new(Arc::new(memory())).unwrap();
        let mut guest =
            ThreadGuest::new(&usage, ThreadGuestOptions { pattern, ..busy(Path::Mapping) })
                .unwrap();
        guest.start().unwrap();
        wait_until("10000 writes", SOON, || guest.writes() > 10_000).unwrap();
        guest.pause().unwrap();
        let writes = guest.writes();
        assert!(usage.check().unwrap() > 100, "{pattern:?}");
        guest.resume().unwrap();
        wait_until("more writes", SOON, || guest.writes() > writes).unwrap();
        guest.pause().unwrap();
        usage.check().unwrap();
    }
}

#[test]
fn a_wrong_word_is_found() {
    let usage = Usage::new(Arc::new(memory())).unwrap();
    let writer = usage.writer("one", Path::VmMemory).unwrap();
    assert!(writer.touch(7, 3).unwrap());
    assert_eq!(usage.check().unwrap(), 1);
    usage.memory().block(7).unwrap().store(3 * PAGE_SIZE, 2).unwrap();
    assert!(matches!(usage.check(), Err(Error::Mismatch(_))));
}

#[test]
fn pages_that_were_given_up_are_not_written() {
    let usage = Usage::new(Arc::new(memory())).unwrap();
    let mut guest = ThreadGuest::new(&usage, busy(Path::Mapping)).unwrap();
    let gone = PageRange::new(10, 300);
    guest.start().unwrap();
    wait_until("writes", SOON, || guest.writes() > 5_000).unwrap();
    usage.give_up(7, gone).unwrap();
    let block = usage.memory().block(7).unwrap();
    block.punch(gone).unwrap();
    let writes = guest.writes();
    wait_until("writes elsewhere", SOON, || guest.writes() > writes + 5_000).unwrap();
    assert!(block.is_hole(gone).unwrap(), "the guest wrote into what it gave up");
    usage.take_back(7, gone).unwrap();
    wait_until("writes there again", SOON, || !block.is_hole(gone).unwrap()).unwrap();
    guest.pause().unwrap();
    usage.check().unwrap();
}

#[test]
fn counts_go_on_from_the_state_that_was_loaded() {
    let usage = Usage::new(Arc::new(memory())).unwrap();
    let mut guest = ThreadGuest::new(&usage, busy(Path::Mapping)).unwrap();
    usage.give_up(0, PageRange::new(5, 5)).unwrap();
    guest.start().unwrap();
    wait_until("writes", SOON, || guest.writes() > 5_000).unwrap();
    guest.pause().unwrap();

    let there = Usage::new(Arc::new(memory())).unwrap();
    let mut guest_there = ThreadGuest::new(&there, busy(Path::Mapping)).unwrap();
    there.load(&usage.save()).unwrap();
    assert!(there.check().is_err(), "its memory did not come along");
    for block in usage.memory().blocks() {
        for run in block.extents().unwrap() {
            let mut bytes = vec![0; run.bytes() as usize];
            block.read(run.offset(), &mut bytes).unwrap();
            there.memory().block(block.id()).unwrap().write(run.offset(), &bytes).unwrap();
        }
    }
    assert_eq!(there.check().unwrap(), usage.check().unwrap());
    guest_there.start().unwrap();
    wait_until("writes", SOON, || guest_there.writes() > 5_000).unwrap();
    guest_there.pause().unwrap();
    there.check().unwrap();
    assert!(there.memory().block(0).unwrap().is_hole(PageRange::new(5, 5)).unwrap());
}

#[test]
fn a_rate_is_kept() {
    let usage = Usage::new(Arc::new(memory())).unwrap();
    let options = ThreadGuestOptions { rate: Some(2_000), ..ThreadGuestOptions::default() };
    let mut guest = ThreadGuest::new(&usage, options).unwrap();
    guest.start().unwrap();
    let started = std::time::Instant::now();
    wait_until("1000 writes", SOON, || guest.writes() >= 1_000).unwrap();
    assert!(started.elapsed() > Duration::from_millis(400), "{:?}", started.elapsed());
}

#[test]
fn numbered_pages_are_found_in_their_blocks() {
    let set: PageSet =
        [(3, PageRange::new(5, 2)), (1, PageRange::new(0, 0)), (9, PageRange::new(8, 1))]
            .into_iter()
            .collect();
    assert_eq!(set.pages(), 3);
    let pages: Vec<_> = (0..5).map(|number| set.page(number)).collect();
    assert_eq!(pages, [Some((3, 5)), Some((3, 6)), Some((9, 8)), None, None]);
}

#[test]
fn each_way_to_differ_is_found() {
    let pages = PageRange::new(10, 20);
    let discarded = MappedBitmap::private(256).unwrap();
    let source = TestMemory::ram(1 << 20).unwrap();
    source.block(0).unwrap().fill(pages, 1).unwrap();
    let check = |prepare: &dyn Fn(&TestMemory)| {
        let destination = TestMemory::ram(1 << 20).unwrap();
        prepare(&destination);
        same_block(source.block(0).unwrap(), &discarded, destination.block(0).unwrap(), |_| true)
    };
    let full = |destination: &TestMemory| destination.block(0).unwrap().fill(pages, 1).unwrap();

    assert_eq!(check(&full).unwrap().equal, 20);
    let missing = check(&|destination| {
        destination.block(0).unwrap().fill(PageRange::new(10, 19), 1).unwrap()
    });
    assert!(missing.unwrap_err().to_string().contains("page 0x1d"));
    let more = check(&|destination| {
        full(destination);
        destination.block(0).unwrap().write(99 * PAGE_SIZE, &[0]).unwrap();
    });
    assert!(more.unwrap_err().to_string().contains("page 0x63"));
    discarded.set(PageRange::new(12, 1));
    assert!(check(&full).unwrap_err().to_string().contains("page 0xc"));
    let compared = check(&|destination| {
        full(destination);
        destination.block(0).unwrap().punch(PageRange::new(12, 1)).unwrap();
    });
    let compared = compared.unwrap();
    assert_eq!((compared.equal, compared.discarded), (19, 1));
}
