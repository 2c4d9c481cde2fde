//! What is pushed, or read ahead, next.
//!
//! A guest that touched a page will touch those after it soon. So it goes on behind the last fault, in small pieces, so that the next fault need not wait
//! behind a large one; and as long as there is no fault the pieces grow. All who do it share one cursor: two atomics, no lock. They may claim pieces that overlap, since what
//! they work on is what they take from [`Owed`].

use super::GuestMemory;
use super::owed::Owed;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of a piece right after a fault: 64 KiB.
const SMALLEST: u64 = (64 << 10) / PAGE_SIZE;
/// Pages of a piece when it is quiet: 4 MiB.
const LARGEST: u64 = (4 << 20) / PAGE_SIZE;

/// Where it goes on.
#[derive(Debug)]
pub struct Cursor {
    /// The page that is looked at next, counted over all blocks.
    next: AtomicU64,
    /// Pages of the next piece.
    piece: AtomicU64,
    /// Pages of a piece right after a fault.
    smallest: u64,
    /// First page of each block in that count.
    starts: Vec<u64>,
}

impl Cursor {
    /// From the first page on.
    pub fn new(memory: &GuestMemory) -> Self {
        Self::with_pieces(memory, SMALLEST)
    }

    /// The same, where no fault waits for a piece: its pieces have at least `smallest` pages.
    pub fn with_pieces(memory: &GuestMemory, smallest: u64) -> Self {
        let starts = memory.blocks().iter().scan(0, |next, block| {
            let start = *next;
            *next += block.geometry.pages();
            Some(start)
        });
        Self { next: AtomicU64::new(0), piece: AtomicU64::new(smallest), smallest, starts: starts.collect() }
    }

    /// The guest waits for the page before page `page` of the block at index `at`.
    pub fn fault(&self, at: usize, page: u64) {
        self.piece.store(self.smallest, Ordering::Relaxed);
        self.next.store(self.starts[at] + page, Ordering::Relaxed);
    }

    /// Claims the next piece: the index of its block, and its host pages. `None` if nothing is owed any more.
    pub fn claim(&self, owed: &Owed) -> Option<(usize, PageRange)> {
        loop {
            let next = self.next.load(Ordering::Relaxed);
            let at = self.starts.partition_point(|start| *start <= next).saturating_sub(1);
            let block = owed.block(at);
            let (at, host_page) = owed.next(at, (next - self.starts[at]).div_ceil(block.unit()))?;
            let (block, piece) = (owed.block(at), self.piece.load(Ordering::Relaxed));
            let all = PageRange::new(0, block.bits().pages());
            let range = PageRange::new(host_page, piece.div_ceil(block.unit())).intersection(&all);
            let end = self.starts[at] + range.end() * block.unit();
            // A fault that comes in between has moved it, and wins.
            if self.next.compare_exchange(next, end, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                let larger = (piece * 2).min(LARGEST);
                let _ = self.piece.compare_exchange(piece, larger, Ordering::Relaxed, Ordering::Relaxed);
                return Some((at, range));
            }
        }
    }
}
