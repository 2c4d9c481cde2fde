use super::*;
use crate::memory::Backing;
use pageferry_protocol::memory::{BlockGeometry, BlockTable};
use std::thread::yield_now;

const PAGES: u64 = 8;

/// Takes all, and keeps nothing.
#[derive(Debug)]
struct Nowhere;

impl Sink for Nowhere {
    fn put(&self, _: usize, _: PageRange, _: &[u8]) -> Result<u64, ImageError> {
        Ok(0)
    }
}

/// A block of eight pages, of which page 3 is pending.
fn capturing() -> (GuestMemory, Capturing) {
    let length = PAGES * PAGE_SIZE;
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, length).unwrap();
    let geometry = BlockGeometry { id: 0, name: "ram".into(), gpa: 0, length, granularity: PAGE_SIZE };
    let block = Block::new(geometry, Backing::new(fd, 0, length).unwrap(), 0, None).unwrap();
    let memory = GuestMemory::new(vec![Arc::new(block)], BlockTable::new(), None);
    let pending = Owed::nothing(&memory, &[PAGE_SIZE]).unwrap();
    pending.add(0, 0, 1 << 3);
    let capturing = Capturing::new(&memory, Arc::new(pending), None, Arc::new(Nowhere), Arc::default());
    (memory, capturing)
}

/// Gives another thread every chance to go too far.
fn let_others_run() {
    (0..1000).for_each(|_| yield_now());
}

#[test]
fn nothing_is_settled_while_a_fault_reads_what_it_took() {
    let (memory, capturing) = capturing();
    let reading = memory.readers.reading(FAULTS, 0, 0);
    assert_ne!(capturing.pending.take(0, 0, 1 << 3), 0);
    std::thread::scope(|scope| {
        let settled = scope.spawn(|| capturing.settled(&memory.readers));
        let_others_run();
        assert!(!settled.is_finished());
        drop(reading);
        settled.join().unwrap().unwrap();
    });
}

#[test]
fn what_is_pending_of_a_snapshot_that_failed_is_not_read_any_more() {
    let (memory, capturing) = capturing();
    let mut into = vec![0; PAGE_SIZE as usize];
    capturing.end();
    // It may have been discarded, and nobody has saved it.
    assert_eq!(capturing.fault(&memory, (0, 3), &mut into).unwrap(), None);
    assert_eq!(capturing.pending.left(), 1);
}
