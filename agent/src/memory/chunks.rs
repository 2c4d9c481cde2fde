// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Chunks: how several threads share one walk over the guest's memory.
//!
//! Each block is cut into chunks of one size. The threads claim the chunks in order, from one
//! atomic cursor: there is no lock, and a slow thread claims fewer chunks. A walk that is
//! interested only in some pages, such as the dirty ones, skips the chunks that have none of them.
//!
//! A chunk begins at a multiple of 64 pages of its block, and ends at one or with the block. So two
//! threads never share a word of a bitmap of that block.

use super::block::Block;
use super::guest_memory::GuestMemory;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Builder;

/// The low bits of the cursor hold a page, the others the index of a block.
const PAGE_BITS: u32 = 40;

/// The largest chunk of a test, in pages.
static LARGEST: AtomicU64 = AtomicU64::new(u64::MAX);

/// Makes no chunk of this process larger than `pages`, so that tests with small guests have many.
#[doc(hidden)]
pub fn limit_for_tests(pages: u64) {
    LARGEST.store(pages, Ordering::Relaxed);
}

/// Finds the first page of a range that a walk is interested in, in the block at an index.
type Find<'a> = Box<dyn Fn(usize, PageRange) -> Option<u64> + Sync + 'a>;

/// The chunks of one walk. Each is handed out once.
pub struct Chunks<'a> {
    memory: &'a GuestMemory,
    /// For each block the pages of a chunk.
    sizes: Vec<u64>,
    find: Find<'a>,
    /// Where the next chunk begins: the index of its block, and its first page.
    cursor: AtomicU64,
    /// A thread failed, so the others stop.
    failed: AtomicBool,
}

impl<'a> Chunks<'a> {
    /// Chunks of `pages`, rounded up to a multiple of 64.
    pub fn new(memory: &'a GuestMemory, pages: u64) -> Self {
        let pages = pages.min(LARGEST.load(Ordering::Relaxed)).max(1).next_multiple_of(WORD_BITS);
        Self {
            memory,
            sizes: vec![pages; memory.blocks().len()],
            find: Box::new(|_, range| Some(range.first)),
            cursor: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// The same, for a walk that must not cut units. `pages` is the size of the units of a block.
    #[must_use]
    pub fn of_whole(mut self, pages: impl Fn(&Block) -> u64) -> Self {
        for (size, block) in self.sizes.iter_mut().zip(self.memory.blocks()) {
            *size = size.next_multiple_of(pages(block)).next_multiple_of(WORD_BITS);
        }
        self
    }

    /// The same without the chunks that have no page of interest. `find` gets the index of a block
    /// and pages of it, and finds the first page of interest among them.
    #[must_use]
    pub fn only(self, find: impl Fn(usize, PageRange) -> Option<u64> + Sync + 'a) -> Self {
        Self { find: Box::new(find), ..self }
    }

    /// Claims a chunk: the index of its block, and its pages. `None` if there are no more, or
    /// [`Chunks::stop`] was called.
    pub fn claim(&self) -> Option<(usize, PageRange)> {
        let mut cursor = self.cursor.load(Ordering::Relaxed);
        while !self.failed.load(Ordering::Relaxed) {
            let (at, chunk) = self.next_from(cursor)?;
            // The cursor only grows. So if it is still the same, nobody has claimed this chunk.
            let next = position(at, chunk.end());
            match self.cursor.compare_exchange_weak(
                cursor,
                next,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some((at, chunk)),
                Err(moved) => cursor = moved,
            }
        }
        None
    }

    /// The first chunk at or after `cursor`.
    fn next_from(&self, cursor: u64) -> Option<(usize, PageRange)> {
        let (mut at, mut first) = ((cursor >> PAGE_BITS) as usize, cursor & ((1 << PAGE_BITS) - 1));
        loop {
            let block = self.memory.blocks().get(at)?;
            let rest = PageRange::new(first, block.geometry.pages().saturating_sub(first));
            if let Some(page) = (!rest.is_empty()).then(|| (self.find)(at, rest)).flatten() {
                let size = self.sizes[at];
                let chunk = PageRange::new(page / size * size, size);
                return Some((at, chunk.intersection(&block.all())));
            }
            (at, first) = (at + 1, 0);
        }
    }

    /// No chunk is claimed any more.
    pub fn stop(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Calls `work` for each chunk, on up to `threads` threads, this one among them. No thread is
    /// started without a chunk for it. If the kernel starts no more threads, those that exist do
    /// all the work.
    ///
    /// # Errors
    /// The first error of `work` in the order of the threads. After an error no more chunks are
    /// claimed.
    pub fn share<E: Send>(
        &self, threads: usize, work: impl Fn(usize, PageRange) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let mut own: Vec<_> = self.claim().into_iter().collect();
        let work_from = |claimed: &[(usize, PageRange)]| {
            let claimed = claimed.iter().copied();
            claimed
                .chain(std::iter::from_fn(|| self.claim()))
                .try_for_each(|(at, chunk)| work(at, chunk).inspect_err(|_| self.stop()))
        };
        std::thread::scope(|scope| {
            let mut others = Vec::new();
            while !own.is_empty() && others.len() + 1 < threads {
                let Some(claimed) = self.claim() else { break };
                match Builder::new().spawn_scoped(scope, move || work_from(&[claimed])) {
                    Ok(thread) => others.push(thread),
                    Err(_) => {
                        own.push(claimed);
                        break;
                    }
                }
            }
            let first = work_from(&own);
            others.into_iter().fold(first, |outcome, thread| {
                let other = thread.join();
                outcome.and(other.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        })
    }
}

/// A place in the memory: a page of the block at an index. Later places have larger numbers.
pub fn position(at: usize, page: u64) -> u64 {
    ((at as u64) << PAGE_BITS) | page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use pageferry_protocol::shm::MappedBitmap;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    fn claimed(chunks: &Chunks<'_>) -> Vec<(usize, PageRange)> {
        std::iter::from_fn(|| chunks.claim()).collect()
    }

    #[test]
    fn each_chunk_of_each_block_is_claimed_once_in_order() {
        let memory = memory(&[133, 3, 256]);
        let expected = [
            (0, PageRange::new(0, 128)),
            (0, PageRange::new(128, 5)),
            (1, PageRange::new(0, 3)),
            (2, PageRange::new(0, 128)),
            (2, PageRange::new(128, 128)),
        ];
        assert_eq!(claimed(&Chunks::new(&memory, 100)), expected);
    }

    #[test]
    fn nothing_is_claimed_after_a_failure() {
        let memory = memory(&[640]);
        let chunks = Chunks::new(&memory, 64);
        let outcome = chunks.share(1, |_, chunk| if chunk.first < 128 { Ok(()) } else { Err(7) });
        assert_eq!(outcome, Err(7));
        assert_eq!(chunks.claim(), None);
        let outcome = Chunks::new(&memory, 64).share(3, |_, chunk| Err(chunk.first));
        assert_eq!(outcome, Err(0), "the first thread's error");
    }

    #[test]
    fn a_unit_is_never_cut() {
        let memory = memory(&[600, 300]);
        let chunks = Chunks::new(&memory, 64).of_whole(|block| 600 - block.geometry.pages() + 256);
        let expected = [
            (0, PageRange::new(0, 256)),
            (0, PageRange::new(256, 256)),
            (0, PageRange::new(512, 88)),
            (1, PageRange::new(0, 300)),
        ];
        assert_eq!(claimed(&chunks), expected);
    }

    proptest! {
        /// The model: every chunk of the grid that has a wanted page, and no other, is worked on
        /// once, by however many threads.
        #[test]
        fn threads_share_exactly_the_chunks_with_a_page(
            lengths in prop::collection::vec(1u64..900, 1..4),
            wanted in prop::collection::btree_set((0usize..4, 0u64..900), 0..20),
            size in 1u64..300,
            threads in 1usize..5,
        ) {
            let memory = memory(&lengths);
            let bitmap = |pages: &u64| MappedBitmap::private(*pages).unwrap();
            let bitmaps: Vec<MappedBitmap> = lengths.iter().map(bitmap).collect();
            let grid = size.next_multiple_of(WORD_BITS);
            let mut expected = BTreeSet::new();
            for (at, page) in wanted {
                if lengths.get(at).is_some_and(|pages| page < *pages) {
                    bitmaps[at].set(PageRange::new(page, 1));
                    expected.insert((at, page / grid * grid));
                }
            }
            let found = Mutex::new(Vec::new());
            let chunks = Chunks::new(&memory, size).only(|at, rest| bitmaps[at].next_set(rest));
            let outcome: Result<(), ()> = chunks.share(threads, |at, chunk| {
                // As a worker does that takes the pages: what is claimed must not depend on it.
                bitmaps[at].clear(chunk);
                assert_eq!(chunk.end(), (chunk.first + grid).min(lengths[at]));
                found.lock().unwrap().push((at, chunk.first));
                Ok(())
            });
            prop_assert_eq!(outcome, Ok(()));
            let mut found = found.into_inner().unwrap();
            found.sort_unstable();
            prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
