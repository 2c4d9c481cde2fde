use super::*;
use crate::memory::Backing;
use crate::memory::Block;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{BlockGeometry, BlockTable};

fn memfd(length: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, length).unwrap();
    fd
}

/// A block of which page 3 is owed. What stands for the userfaultfd is none, so whatever is placed fails.
fn arriving() -> (Arc<GuestMemory>, Arc<Arriving>) {
    let length = 64 * PAGE_SIZE;
    let geometry = BlockGeometry { id: 0, name: "ram".into(), gpa: 0, length, granularity: PAGE_SIZE };
    let block = Block::new(geometry, Backing::new(memfd(length), 0, length).unwrap(), 0, None).unwrap();
    let memory = GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None);
    let owed = Owed::nothing(&memory, &[PAGE_SIZE]).unwrap();
    owed.add(0, 0, 1 << 3);
    let arriving = Arriving::new(&memory, Arc::new(owed), memfd(0), false, Arc::default()).unwrap();
    let arriving = Arc::new(arriving);
    memory.set_arriving(Some(arriving.clone()));
    (Arc::new(memory), arriving)
}

/// Gives another thread every chance to go too far.
fn let_others_run() {
    (0..1000).for_each(|_| yield_now());
}

#[test]
fn a_fault_on_a_page_that_is_being_placed_is_answered_when_that_is_over() {
    let (memory, arriving) = arriving();
    let placing = memory.readers.reading(0, 0, 0);
    assert_ne!(arriving.owed.take(0, 0, 1 << 3), 0);
    std::thread::scope(|scope| {
        let fault = scope.spawn(|| arriving.fault(&memory.readers, (0, 3), Instant::now()));
        while !arriving.requested[0].contains(3) && !fault.is_finished() {
            yield_now();
        }
        let_others_run();
        // It could not be placed.
        arriving.owed.add(0, 0, 1 << 3);
        drop(placing);
        assert_eq!(fault.join().unwrap().unwrap(), Answer::Ask);
    });
}

#[test]
fn a_discard_frees_what_a_fault_that_was_read_before_it_still_places() {
    let (memory, arriving) = arriving();
    let block = &memory.blocks()[0];
    let range = BlockRange { block: 0, offset: 3 * PAGE_SIZE, length: PAGE_SIZE };
    let answering = arriving.answering();
    std::thread::scope(|scope| {
        let discard = scope.spawn(|| memory.discard(&[range], true).unwrap());
        while arriving.owed.left() > 0 {
            yield_now();
        }
        let_others_run();
        block.backing.write(3 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).unwrap();
        drop(answering);
        assert_eq!(discard.join().unwrap(), 1);
    });
    assert_eq!(block.backing.first_data(block.all()).unwrap(), None);
}
