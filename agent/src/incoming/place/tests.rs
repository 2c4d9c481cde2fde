// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::test_support::job_of;
use crate::memory::{Backing, GuestMemory};
use pageferry_protocol::control::job::JobKind;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, HUGE_PAGE};
use pageferry_protocol::stream::Kind;
use rustix::pipe::{SpliceFlags, pipe, splice};
use std::thread::yield_now;

const PAGES: u64 = 64;
/// The page that the tests place and give back.
const PAGE: PageRange = PageRange::new(5, 1);

fn memory() -> Arc<GuestMemory> {
    memory_on(|backing| backing)
}

fn memory_on(kind: impl FnOnce(Backing) -> Backing) -> Arc<GuestMemory> {
    memory_of(PAGES * PAGE_SIZE, kind)
}

fn memory_of(length: u64, kind: impl FnOnce(Backing) -> Backing) -> Arc<GuestMemory> {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, length).unwrap();
    let geometry =
        BlockGeometry { id: 7, name: "ram".into(), gpa: 0, length, granularity: PAGE_SIZE };
    let backing = kind(Backing::new(fd, 0, length).unwrap());
    let block = Block::new(geometry, backing, 0, None).unwrap();
    Arc::new(GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None))
}

fn job(memory: &Arc<GuestMemory>) -> Arc<Job> {
    job_of(JobKind::Incoming, memory.clone())
}

fn header(kind: Kind, bytes: usize) -> RecordHeader {
    RecordHeader::new(kind, 0, 7, PAGE, bytes)
}

fn given_back() -> [BlockRange; 1] {
    [BlockRange { block: 7, offset: PAGE.offset(), length: PAGE.bytes() }]
}

/// A discard has set its marks and has not punched yet. A page that comes must wait: the punch
/// would remove its content, and its marks would stay.
#[test]
fn placing_waits_between_the_marks_and_the_punch_of_a_discard() {
    type Place = fn(&Placer<'_>, &Block);
    let ways: [Place; 4] = [
        |placer, _| {
            placer
                .place_data(&header(Kind::Data, PAGE_SIZE as usize), &[5; PAGE_SIZE as usize])
                .unwrap()
        },
        |placer, _| placer.place_zero(&header(Kind::Zero, 0)).unwrap(),
        |placer, block| placer.place_discard(0, block, PAGE).unwrap(),
        |placer, _| {
            let header = RecordHeader::new(Kind::Remaining, 0, 7, PageRange::new(0, PAGES), 8);
            assert_eq!(placer.expect_remaining(&header, &(1u64 << 5).to_le_bytes()).unwrap(), 1);
        },
    ];
    for (way, place) in ways.into_iter().enumerate() {
        let memory = memory();
        let job = job(&memory);
        let placer = Placer::prepare(&job, HugePageUse::WhereWhole).unwrap();
        let block = &memory.blocks()[0];
        let discards = way != 2;
        let giving_back = memory.giving_back();
        if discards {
            block.discarded.set(PAGE);
        }
        std::thread::scope(|scope| {
            let placing = scope.spawn(|| place(&placer, block));
            (0..1000).for_each(|_| yield_now());
            assert!(!placing.is_finished() && block.discarded.contains(5) == discards, "way {way}");
            block.backing.punch(PAGE).unwrap();
            drop(giving_back);
            placing.join().unwrap();
        });
        assert_eq!(block.discarded.contains(5), !discards, "way {way}");
        assert_eq!(block.backing.first_data(PAGE).unwrap().is_some(), way == 0, "way {way}");
    }
}

/// The same from the other side: a page is written, and its marks are not set yet.
#[test]
fn discards_and_frees_wait_between_a_write_and_its_marks() {
    for frees in [false, true] {
        let memory = memory();
        let block = &memory.blocks()[0];
        let placing = memory.placing();
        block.backing.write(PAGE.offset(), &[5; PAGE_SIZE as usize]).unwrap();
        std::thread::scope(|scope| {
            let giving_back = scope.spawn(|| {
                if frees { memory.free(&given_back()) } else { memory.discard(&given_back(), true) }
                    .unwrap()
            });
            (0..1000).for_each(|_| yield_now());
            assert!(!giving_back.is_finished() && !block.discarded.contains(5));
            assert!(block.backing.first_data(PAGE).unwrap().is_some());
            block.discarded.clear(PAGE);
            drop(placing);
            assert_eq!(giving_back.join().unwrap(), 1);
        });
        assert_eq!(block.discarded.contains(5), !frees);
        assert!(block.backing.first_data(PAGE).unwrap().is_none());
    }
}

#[test]
fn pages_given_back_after_the_announcement_need_not_come() {
    let memory = memory();
    let job = job(&memory);
    let placer = Placer::prepare(&job, HugePageUse::WhereWhole).unwrap();
    let free = |page: u64| {
        memory
            .free(&[BlockRange { block: 7, offset: page * PAGE_SIZE, length: PAGE_SIZE }])
            .unwrap();
    };
    free(3);
    let header = RecordHeader::new(Kind::Remaining, 0, 7, PageRange::new(0, PAGES), 8);
    assert_eq!(placer.expect_remaining(&header, &0b11_1100u64.to_le_bytes()).unwrap(), 4);
    free(4);
    memory.discard(&given_back(), true).unwrap();
    let Remaining { missing, given_back, .. } = placer.into_remaining();
    let noted = given_back.recorded();
    let pages = |bits: &MappedBitmap| bits.word(0);
    assert_eq!(
        (missing.remaining_pages(), pages(noted.freed(0)), pages(noted.discarded(0))),
        (4, 1 << 4, 1 << 5)
    );
}

/// A missing page is a hole, even if the VMM touched it, and even if the number of pages is right.
#[test]
fn missing_pages_are_punched_whatever_the_file_holds() {
    for (touched, given) in
        [(&[][..], false), (&[2][..], false), (&[2, 3], false), (&[2][..], true)]
    {
        let memory = memory();
        let job = job(&memory);
        let placer = Placer::prepare(&job, HugePageUse::WhereWhole).unwrap();
        let block = &memory.blocks()[0];
        placer
            .place_data(&header(Kind::Data, PAGE_SIZE as usize), &[5; PAGE_SIZE as usize])
            .unwrap();
        let remaining = RecordHeader::new(Kind::Remaining, 0, 7, PageRange::new(0, PAGES), 8);
        assert_eq!(placer.expect_remaining(&remaining, &0b1100u64.to_le_bytes()).unwrap(), 2);
        for page in touched {
            block.backing.write(page * PAGE_SIZE, &[0]).unwrap();
        }
        if given {
            // This takes one page away, so the file has as many pages as came.
            memory.free(&given_back()).unwrap();
        }
        placer.into_remaining().make_holes(&memory).unwrap();
        let data: Vec<PageRange> =
            block.backing.data_runs(block.all()).collect::<Result<_, _>>().unwrap();
        assert_eq!(data, if given { vec![] } else { vec![PAGE] }, "touched {touched:?}");
    }
}

/// The pages of a host page share one allocation, which must be freed with the last of them.
#[test]
fn a_host_page_is_freed_with_the_last_of_its_pages() {
    const UNIT: u64 = 8;
    let memory = memory_on(|backing| backing.with_huge_pages(UNIT * PAGE_SIZE));
    let job = job(&memory);
    let placer = Placer::prepare(&job, HugePageUse::WhereWhole).unwrap();
    let backing = &memory.blocks()[0].backing;
    let full: Vec<u64> = (8..24).collect();
    let came = PageRange::new(8, 16);
    let bytes = vec![5; came.bytes() as usize];
    placer.place_data(&RecordHeader::new(Kind::Data, 0, 7, came, bytes.len()), &bytes).unwrap();
    let zero = |first, count| {
        let range = PageRange::new(first, count);
        placer.place_zero(&RecordHeader::new(Kind::Zero, 0, 7, range, 0)).unwrap();
    };
    let content = || {
        let mut page = vec![0; PAGE_SIZE as usize];
        let mut holds = |page_index: &u64| {
            backing.read(page_index * PAGE_SIZE, &mut page).unwrap();
            page.iter().any(|byte| *byte != 0)
        };
        (0..PAGES).filter(&mut holds).collect::<Vec<_>>()
    };
    assert_eq!((content(), backing.allocated_pages()), (full, 16));
    // The second half of one host page, and the first half of the next.
    zero(12, 8);
    assert_eq!((content(), backing.allocated_pages()), (vec![8, 9, 10, 11, 20, 21, 22, 23], 16));
    zero(20, 4);
    assert_eq!((content(), backing.allocated_pages()), (vec![8, 9, 10, 11], 8));
    zero(0, 12);
    assert_eq!((content(), backing.allocated_pages()), (vec![], 0));
}

/// The kernel frees no part of a large page to which somebody has a reference.
#[test]
fn what_the_vmm_gives_back_leaves_a_large_page_when_the_pass_ends() {
    const PAGES_OF_LARGE: u64 = HUGE_PAGE / PAGE_SIZE;
    const FIRST: u64 = 64;
    let memory = memory_of(HUGE_PAGE, |backing| backing);
    let job = job(&memory);
    let placer = Placer::prepare(&job, HugePageUse::WhereWhole).unwrap();
    let backing = &memory.blocks()[0].backing;
    let place = |range: PageRange, flags| {
        let bytes = vec![5; range.bytes() as usize];
        let header = RecordHeader::new(Kind::Data, flags, 7, range, bytes.len());
        placer.place_data(&header, &bytes).unwrap();
    };
    place(PageRange::new(0, FIRST), FLAG_WHOLE);
    if backing.allocated_pages() == FIRST {
        eprintln!("skipped: the kernel makes no large pages");
        return;
    }
    place(PageRange::new(FIRST, PAGES_OF_LARGE - FIRST), FLAG_WHOLE);
    placer.end_pass().unwrap();
    let (reader, writer) = pipe().unwrap();
    let spliced = 8 * PAGE_SIZE as usize;
    splice(backing.fd(), Some(&mut 0), &writer, None, spliced, SpliceFlags::empty()).unwrap();
    let range = |first: u64, pages: u64| BlockRange {
        block: 7,
        offset: first * PAGE_SIZE,
        length: pages * PAGE_SIZE,
    };
    memory.discard(&[range(20, 3)], true).unwrap();
    memory.free(&[range(100, 2)]).unwrap();
    assert_eq!(backing.allocated_pages(), PAGES_OF_LARGE, "the kernel kept nothing");
    // The guest of the source has this page again.
    place(PageRange::new(21, 1), 0);
    placer.end_pass().unwrap();
    assert_eq!(backing.allocated_pages(), PAGES_OF_LARGE - 4);
    for (page, wanted) in [(19, 5), (20, 0), (21, 5), (22, 0), (23, 5), (100, 0), (101, 0)] {
        let mut bytes = [9; PAGE_SIZE as usize];
        backing.read(page * PAGE_SIZE, &mut bytes).unwrap();
        assert_eq!(bytes, [wanted; PAGE_SIZE as usize], "page {page}");
    }
    drop((reader, writer));
}
