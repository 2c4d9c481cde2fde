use super::*;
use crate::hooks::Hooks;
use crate::memory::{Backing, GuestMemory};
use pageferry_protocol::control::job::{JobKind, OutgoingOptions};
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{BlockGeometry, BlockTable};
use pageferry_protocol::stream::Kind;
use std::thread::yield_now;

const PAGES: u64 = 64;
/// The page that this is about.
const PAGE: PageRange = PageRange::new(5, 1);

fn memory() -> Arc<GuestMemory> {
    memory_on(|backing| backing)
}

fn memory_on(kind: impl FnOnce(Backing) -> Backing) -> Arc<GuestMemory> {
    let length = PAGES * PAGE_SIZE;
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, length).unwrap();
    let geometry =
        BlockGeometry { id: 7, name: "ram".into(), gpa: 0, length, granularity: PAGE_SIZE };
    let backing = kind(Backing::new(fd, 0, length).unwrap());
    let block = Block::new(geometry, backing, 0, None).unwrap();
    Arc::new(GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None))
}

fn job(memory: &Arc<GuestMemory>) -> Arc<Job> {
    let (hooks, notify) = (Arc::new(Hooks::new(None)), crate::job::notifier().unwrap());
    let options = OutgoingOptions::default();
    Arc::new(Job::new(1, JobKind::Incoming, memory.clone(), hooks, options, notify).unwrap())
}

fn header(kind: Kind, bytes: usize) -> RecordHeader {
    RecordHeader::new(kind, 0, 7, PAGE, bytes)
}

fn given_back() -> [BlockRange; 1] {
    [BlockRange { block: 7, offset: PAGE.offset(), length: PAGE.bytes() }]
}

/// A discard has set its marks and not punched yet: what comes waits, or its content would be gone
/// and its marks would stay.
#[test]
fn nothing_that_comes_is_placed_between_the_marks_and_the_punch_of_a_discard() {
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
        let placer = Placer::prepare(&job).unwrap();
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

/// The same window from the other side: what came is written, and its marks are not set yet.
#[test]
fn nothing_is_given_back_between_the_write_and_the_marks_of_what_came() {
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
fn what_is_given_back_after_it_was_announced_as_remaining_need_not_come() {
    let memory = memory();
    let job = job(&memory);
    let placer = Placer::prepare(&job).unwrap();
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

/// What is missing is a hole, whatever was looked at, and however many pages the file has.
#[test]
fn what_is_owed_is_a_hole_also_if_the_file_has_as_many_pages_as_came() {
    for (touched, given) in
        [(&[][..], false), (&[2][..], false), (&[2, 3], false), (&[2][..], true)]
    {
        let memory = memory();
        let job = job(&memory);
        let placer = Placer::prepare(&job).unwrap();
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
            // One page less, so there are as many as came.
            memory.free(&given_back()).unwrap();
        }
        placer.into_remaining().make_holes(&memory).unwrap();
        let data: Vec<PageRange> =
            block.backing.data_runs(block.all()).collect::<Result<_, _>>().unwrap();
        assert_eq!(data, if given { vec![] } else { vec![PAGE] }, "touched {touched:?}");
    }
}

/// Pages of a host page share one allocation: it is freed with the last of them, and not before.
#[test]
fn a_host_page_is_a_hole_again_when_none_of_its_pages_holds_anything() {
    const UNIT: u64 = 8;
    let memory = memory_on(|backing| backing.with_huge_pages(UNIT * PAGE_SIZE));
    let job = job(&memory);
    let placer = Placer::prepare(&job).unwrap();
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
    // The second half of one host page and the first of the next.
    zero(12, 8);
    assert_eq!((content(), backing.allocated_pages()), (vec![8, 9, 10, 11, 20, 21, 22, 23], 16));
    zero(20, 4);
    assert_eq!((content(), backing.allocated_pages()), (vec![8, 9, 10, 11], 8));
    zero(0, 12);
    assert_eq!((content(), backing.allocated_pages()), (vec![], 0));
}
