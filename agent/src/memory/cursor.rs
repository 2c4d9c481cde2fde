// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cursor: which missing pages are pushed or prefetched next.
//!
//! A guest that touched a page will soon touch the pages after it. So the work goes on right after
//! the last fault, in small pieces, so that the next fault does not wait behind a large one. While
//! there is no fault, the pieces grow. All workers share one cursor, which is two atomics and no
//! lock. Two workers may claim pieces that overlap: each page goes to the worker that takes it from
//! [`HostPageSet`].

use super::block::Block;
use super::host_page_set::HostPageSet;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of a piece right after a fault: 64 KiB.
const SMALLEST: u64 = (64 << 10) / PAGE_SIZE;
/// Pages of the largest piece: 4 MiB.
const LARGEST: u64 = (4 << 20) / PAGE_SIZE;

/// The place where the work goes on, shared by all workers.
#[derive(Debug)]
pub struct Cursor {
    /// The next page, counted over all blocks.
    next: AtomicU64,
    /// Pages of the next piece.
    piece: AtomicU64,
    /// The number of each block's first page in that count.
    starts: Vec<u64>,
}

impl Cursor {
    /// A cursor at the first page.
    pub fn new(blocks: &[Arc<Block>]) -> Self {
        let starts = blocks.iter().scan(0, |next, block| {
            let start = *next;
            *next += block.geometry.pages();
            Some(start)
        });
        Self { next: AtomicU64::new(0), piece: AtomicU64::new(SMALLEST), starts: starts.collect() }
    }

    /// A fault: the guest waits for the page before page `page` of the block at index `at`. The
    /// next piece starts at `page`.
    pub fn fault(&self, at: usize, page: u64) {
        self.piece.store(SMALLEST, Ordering::Relaxed);
        self.next.store(self.starts[at] + page, Ordering::Relaxed);
    }

    /// Claims the next piece: the index of its block, and its host pages. `None` if the set is
    /// empty.
    pub fn claim(&self, missing: &HostPageSet) -> Option<(usize, PageRange)> {
        loop {
            let next = self.next.load(Ordering::Relaxed);
            let at = self.starts.partition_point(|start| *start <= next).saturating_sub(1);
            let block = missing.block(at);
            let (at, host_page) =
                missing.next_from(at, (next - self.starts[at]).div_ceil(block.unit()))?;
            let (block, piece) = (missing.block(at), self.piece.load(Ordering::Relaxed));
            let all = PageRange::new(0, block.bits().pages());
            let range = PageRange::new(host_page, piece.div_ceil(block.unit())).intersection(&all);
            let end = self.starts[at] + range.end() * block.unit();
            // If this fails, a fault or another worker has moved the cursor: look again from there.
            if self.next.compare_exchange(next, end, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                let larger = (piece * 2).min(LARGEST);
                let _ = self.piece.compare_exchange(
                    piece,
                    larger,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
                return Some((at, range));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use pageferry_protocol::shm::bitmap::WORD_BITS;
    use std::collections::BTreeSet;

    /// Pages of three blocks. The second block is smaller than the largest piece, the third is
    /// larger.
    const BLOCKS: [u64; 3] = [200, 72, 3000];
    /// Pages of a host page in each block.
    const UNITS: [u64; 3] = [1, 8, 4];

    /// The next piece, found the slow way: from the page `next` on, counted over all blocks, and
    /// then again from the first page.
    fn expected(missing: &BTreeSet<u64>, next: u64, piece: u64) -> Option<(usize, PageRange)> {
        let first = *missing.range(next..).next().or_else(|| missing.first())?;
        let (mut at, mut start) = (0, 0);
        while first >= start + BLOCKS[at] {
            start += BLOCKS[at];
            at += 1;
        }
        let (unit, host_page) = (UNITS[at], (first - start) / UNITS[at]);
        let end = (host_page + piece.div_ceil(unit)).min(BLOCKS[at] / unit);
        Some((at, PageRange::new(host_page, end - host_page)))
    }

    #[test]
    fn claims_follow_the_last_fault_and_the_last_claim() {
        let memory = memory(&BLOCKS);
        let starts = [0, 200, 272];
        for hole in [0..0, 0..200, 150..400, 1000..3272] {
            let missing =
                HostPageSet::empty(memory.blocks(), &UNITS.map(|unit| unit * PAGE_SIZE)).unwrap();
            let mut model = BTreeSet::new();
            for at in 0..3 {
                for host_page in 0..BLOCKS[at] / UNITS[at] {
                    let page = starts[at] + host_page * UNITS[at];
                    if !hole.contains(&page) {
                        missing.add(at, host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
                        model.extend(page..page + UNITS[at]);
                    }
                }
            }
            let cursor = Cursor::new(memory.blocks());
            let (mut next, mut piece) = (0, SMALLEST);
            // The guest waits for pages in each block, and also for the last page of a block.
            let mut faults = [(2, 1500), (1, 72), (0, 64), (2, 3000), (0, 200), (1, 8)].into_iter();
            for claims in 0.. {
                if claims % 3 == 2
                    && let Some((at, page)) = faults.next()
                {
                    cursor.fault(at, page);
                    (next, piece) = (starts[at] + page, SMALLEST);
                }
                let claimed = cursor.claim(&missing);
                assert_eq!(
                    claimed,
                    expected(&model, next, piece),
                    "claim {claims}, {hole:?} is not missing"
                );
                let Some((at, range)) = claimed else { break };
                let pages = missing.block(at).pages(range);
                (pages.first..pages.end()).for_each(|page| _ = model.remove(&(starts[at] + page)));
                missing.take_range(at, range, |_, _| ());
                (next, piece) = (starts[at] + pages.end(), (piece * 2).min(LARGEST));
            }
            assert_eq!(missing.remaining_pages(), 0);
        }
    }
}
