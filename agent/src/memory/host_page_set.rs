// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sets of host pages from which threads take pages: pages that are missing or to be sent in
//! postcopy, missing in a lazy restore, or pending in a snapshot.
//!
//! The unit is a host page, which is placed as a whole or not at all: in a migration that of the
//! destination. A host page stays in the set until a thread *takes* it: at the source the thread
//! that sends it; at the destination the thread that places it, or drops it because the guest has
//! discarded it. Taking is one atomic step, so each host page is sent once and placed once, even if
//! many threads want it at the same time.

use super::backing::BackingError;
use super::block::Block;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest host page, in bytes, that postcopy, a lazy restore and a background snapshot take. A
/// thread of the guest waits until all of the page is placed or captured.
pub const MAX_POSTCOPY_HOST_PAGE: u64 = 2 << 20;

/// A set of host pages of all blocks, in the order of the memory's blocks.
#[derive(Debug)]
pub struct HostPageSet {
    blocks: Vec<BlockHostPages>,
    /// The size of the set, in pages, not in host pages.
    remaining: AtomicU64,
}

/// A set of host pages of one block: one bit for each.
#[derive(Debug)]
pub struct BlockHostPages {
    bits: MappedBitmap,
    /// Pages in a host page: a power of two.
    unit: u64,
    /// Pages of the block: a multiple of the unit.
    pages: u64,
}

impl BlockHostPages {
    /// The empty set for a block of `pages` pages.
    ///
    /// # Errors
    /// If there is no memory for the bitmap.
    pub fn empty(pages: u64, host_page_size: u64) -> Result<Self, MappingError> {
        let unit = (host_page_size / PAGE_SIZE).max(1);
        Ok(Self { bits: MappedBitmap::private(pages.div_ceil(unit))?, unit, pages })
    }

    /// The bitmap, with one bit for each host page.
    pub fn bits(&self) -> &MappedBitmap {
        &self.bits
    }

    /// Pages in a host page.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// The host pages that `pages` touches.
    pub fn covering(&self, pages: PageRange) -> PageRange {
        if pages.is_empty() {
            return PageRange::default();
        }
        let first = pages.first / self.unit;
        PageRange::new(first, pages.end().div_ceil(self.unit) - first)
    }

    /// The pages of these host pages, cut at the end of the block.
    pub fn pages(&self, host_pages: PageRange) -> PageRange {
        let pages = PageRange::new(host_pages.first * self.unit, host_pages.count * self.unit);
        pages.intersection(&PageRange::new(0, self.pages))
    }

    /// Adds the host pages that the pages `bits` of word `word` touch.
    pub fn add_pages(&self, word: u64, bits: u64) {
        for (word, bits) in self.host_pages_of_word(word, bits) {
            self.bits.or_word(word, bits);
        }
    }

    /// The words of host pages that the pages `bits` of word `word` touch, and the bits in each.
    fn host_pages_of_word(&self, word: u64, bits: u64) -> impl Iterator<Item = (u64, u64)> {
        let (unit, mut rest) = (self.unit, bits);
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            if unit == 1 {
                return Some((word, std::mem::take(&mut rest)));
            }
            let host_page = (word * WORD_BITS + u64::from(rest.trailing_zeros())) / unit;
            let end = ((host_page + 1) * unit - word * WORD_BITS).min(WORD_BITS);
            rest &= !word_mask(0, end);
            Some((host_page / WORD_BITS, 1 << (host_page % WORD_BITS)))
        })
    }

    /// The word that a thread publishes in the fence before it places or reads host page
    /// `host_page`.
    pub fn word_of(&self, host_page: u64) -> u64 {
        host_page * self.unit / WORD_BITS
    }

    /// The pages that a thread may be working on when it has published word `word` in the fence:
    /// that word, or the host page that contains it.
    pub fn published_pages(&self, word: u64) -> PageRange {
        let size = self.unit.max(WORD_BITS);
        PageRange::new(word * WORD_BITS / size * size, size)
    }

    /// Word `index` of the set, seen as a bitmap of pages.
    pub fn page_word(&self, index: u64) -> u64 {
        if self.unit == 1 {
            return self.bits.word(index);
        }
        let first = index * WORD_BITS;
        if self.unit >= WORD_BITS {
            return if self.bits.contains(first / self.unit) { u64::MAX } else { 0 };
        }
        let units = WORD_BITS / self.unit;
        let bit = |at: u64| self.bits.contains(first / self.unit + at);
        let pages = (0..units)
            .filter(|at| bit(*at))
            .map(|at| word_mask(at * self.unit, (at + 1) * self.unit));
        pages.fold(0, |word, pages| word | pages)
    }
}

impl HostPageSet {
    /// The empty set for `blocks`. `host_pages` has the size of a host page for each block, in
    /// bytes.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn empty(blocks: &[Arc<Block>], host_pages: &[u64]) -> Result<Self, MappingError> {
        let blocks = blocks.iter().zip(host_pages);
        let blocks = blocks
            .map(|(block, size)| BlockHostPages::empty(block.geometry.pages(), *size))
            .collect::<Result<_, _>>()?;
        Ok(Self { blocks, remaining: AtomicU64::new(0) })
    }

    /// A copy of the set.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn try_clone(&self) -> Result<Self, MappingError> {
        let empty =
            |block: &BlockHostPages| BlockHostPages::empty(block.pages, block.unit * PAGE_SIZE);
        let blocks = self.blocks.iter().map(empty).collect::<Result<_, _>>()?;
        let copy = Self { blocks, remaining: AtomicU64::new(0) };
        for (at, block) in self.blocks.iter().enumerate() {
            block
                .bits
                .nonzero_words(block.bits.all())
                .for_each(|(word, bits)| copy.add(at, word, bits));
        }
        Ok(copy)
    }

    /// The host pages of the block at index `at`.
    pub fn block(&self, at: usize) -> &BlockHostPages {
        &self.blocks[at]
    }

    /// The number of pages in the set.
    pub fn remaining_pages(&self) -> u64 {
        self.remaining.load(Ordering::SeqCst)
    }

    /// Adds the host pages `bits` of word `word` of the block at index `at`.
    pub fn add(&self, at: usize, word: u64, bits: u64) {
        let fresh = self.blocks[at].bits.or_word(word, bits);
        self.remaining
            .fetch_add(u64::from(fresh.count_ones()) * self.blocks[at].unit, Ordering::SeqCst);
    }

    /// Adds the host pages that the pages `bits` of word `word` touch.
    pub fn add_pages(&self, at: usize, word: u64, bits: u64) {
        self.blocks[at]
            .host_pages_of_word(word, bits)
            .for_each(|(word, bits)| self.add(at, word, bits));
    }

    /// Takes those of the host pages `bits` of word `word` that are in the set, and returns them.
    /// They belong to the caller from then on.
    pub fn take(&self, at: usize, word: u64, bits: u64) -> u64 {
        let taken = self.blocks[at].bits.take_bits(word, bits);
        if taken != 0 {
            self.remaining
                .fetch_sub(u64::from(taken.count_ones()) * self.blocks[at].unit, Ordering::SeqCst);
        }
        taken
    }

    /// Takes the host pages of `range` that are in the set. Calls `taken` with each word of them
    /// and its bits.
    pub fn take_range(&self, at: usize, range: PageRange, mut taken: impl FnMut(u64, u64)) {
        // Other threads take pages, too: only `take` decides which ones are ours.
        for (word, _) in self.blocks[at].bits.nonzero_words(range) {
            let first = word * WORD_BITS;
            let part = range.intersection(&PageRange::new(first, WORD_BITS));
            let bits = self.take(at, word, word_mask(part.first - first, part.end() - first));
            if bits != 0 {
                taken(word, bits);
            }
        }
    }

    /// Punches the host pages of a block that are in the set and have content. It asks the file
    /// once for each run of the set, which takes about a microsecond, and stops after the last
    /// data.
    ///
    /// # Errors
    /// If the file cannot be asked or punched.
    pub fn punch_missing(&self, at: usize, block: &Block) -> Result<(), BackingError> {
        let (missing, mut rest) = (&self.blocks[at], block.all());
        while let Some(host_page) = missing.bits.next_set(missing.covering(rest)) {
            let first = missing.pages(PageRange::new(host_page, 1)).first;
            rest = PageRange::new(first, rest.end() - first);
            let Some(page) = block.backing.first_data(rest)? else { break };
            let run = missing.pages(PageRange::new(page / missing.unit, 1));
            if missing.bits.contains(page / missing.unit) {
                block.backing.punch(run)?;
            }
            rest = PageRange::new(run.end(), rest.end() - run.end());
        }
        Ok(())
    }

    /// The next host page of the set, from host page `from` of the block at index `at` on. After
    /// the last block the search goes on from the first.
    pub fn next_from(&self, at: usize, from: u64) -> Option<(usize, u64)> {
        let rest = |at: usize, from: u64| {
            let bits = &self.blocks[at].bits;
            bits.next_set(PageRange::new(from, bits.pages().saturating_sub(from)))
                .map(|page| (at, page))
        };
        let count = self.blocks.len();
        rest(at, from).or_else(|| (1..=count).find_map(|step| rest((at + step) % count, 0)))
    }
}

/// Splits host pages into the parts that are published in the fence at once: a word of pages, or a
/// single host page if it is larger than a page. Returns words and their bits.
pub(super) fn fence_words(range: PageRange, unit: u64) -> impl Iterator<Item = (u64, u64)> {
    words_of(range).flat_map(move |(word, mask)| {
        let single = if unit == 1 { 0 } else { mask };
        let whole = (unit == 1).then_some((word, mask));
        let each = (0..WORD_BITS)
            .filter(move |bit| single >> bit & 1 == 1)
            .map(move |bit| (word, 1 << bit));
        whole.into_iter().chain(each)
    })
}

/// The words that `range` touches, and the bits of the range in each.
pub fn words_of(range: PageRange) -> impl Iterator<Item = (u64, u64)> {
    let words = if range.is_empty() {
        0..0
    } else {
        range.first / WORD_BITS..range.end().div_ceil(WORD_BITS)
    };
    words.map(move |word| {
        let first = word * WORD_BITS;
        let part = range.intersection(&PageRange::new(first, WORD_BITS));
        (word, word_mask(part.first - first, part.end() - first))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn missing_pages_become_holes_and_others_stay() {
        const PAGES: u64 = 600;
        for unit in [1, 4] {
            let memory = memory(&[PAGES, PAGES]);
            let missing = HostPageSet::empty(memory.blocks(), &[unit * PAGE_SIZE; 2]).unwrap();
            let is_missing = |at: usize, page: u64| {
                (at == 1 && (page / unit).is_multiple_of(3)) || (200..340).contains(&page)
            };
            let holds = |at: usize, page: u64| {
                page.is_multiple_of(5 + at as u64) || (260..300).contains(&page)
            };
            for (at, block) in memory.blocks().iter().enumerate() {
                for page in 0..PAGES {
                    if is_missing(at, page) {
                        missing.add_pages(at, page / 64, 1 << (page % 64));
                    }
                    if holds(at, page) {
                        block.backing.write(page * PAGE_SIZE, &[1]).unwrap();
                    }
                }
            }
            for (at, block) in memory.blocks().iter().enumerate() {
                missing.punch_missing(at, block).unwrap();
            }
            for (at, block) in memory.blocks().iter().enumerate() {
                for page in 0..PAGES {
                    let data = block.backing.first_data(PageRange::new(page, 1)).unwrap().is_some();
                    assert_eq!(
                        data,
                        holds(at, page) && !is_missing(at, page),
                        "block {at}, page {page}, unit {unit}"
                    );
                }
            }
        }
    }

    #[test]
    fn range_is_split_into_words() {
        let words = |first, count| words_of(PageRange::new(first, count)).collect::<Vec<_>>();
        assert_eq!(words(60, 70), [(0, 0xf << 60), (1, u64::MAX), (2, 0b11)]);
        assert_eq!(words(128, 64), [(2, u64::MAX)]);
        assert_eq!(words(70, 0), []);
    }

    #[test]
    fn published_word_covers_the_whole_host_page() {
        for unit in [1, 8, 64, 512] {
            let host_pages = BlockHostPages::empty(4096, unit * PAGE_SIZE).unwrap();
            for host_page in 0..4096 / unit {
                let pages = host_pages.pages(PageRange::new(host_page, 1));
                let published = host_pages.published_pages(host_pages.word_of(host_page));
                assert_eq!(published.intersection(&pages), pages, "{host_page} of {unit} pages");
            }
        }
    }

    #[test]
    fn copy_is_equal_and_independent() {
        let memory = memory(&[1024, 512]);
        let missing = HostPageSet::empty(memory.blocks(), &[PAGE_SIZE, 8 * PAGE_SIZE]).unwrap();
        missing.add(0, 3, 0b101);
        missing.add(1, 0, 1 << 9);
        let copy = missing.try_clone().unwrap();
        assert_eq!((copy.block(0).unit(), copy.block(1).unit()), (1, 8));
        assert_eq!(copy.remaining_pages(), 2 + 8);
        assert_eq!(copy.take(1, 0, u64::MAX), 1 << 9);
        assert_eq!((copy.remaining_pages(), missing.remaining_pages()), (2, 10));
    }

    proptest! {
        #[test]
        fn added_pages_are_taken_once_in_whole_host_pages(
            shift in prop_oneof![Just(0u32), 1u32..5, 6u32..8],
            added in prop::collection::vec((0usize..2, 0u64..1024), 1..40),
            asked in prop::collection::vec((0usize..2, 0u64..1024, 1u64..300), 0..20),
        ) {
            let unit = 1 << shift;
            let memory = memory(&[1024, 512]);
            let missing = HostPageSet::empty(memory.blocks(), &[unit * PAGE_SIZE; 2]).unwrap();
            let mut model = BTreeSet::new();
            for (at, page) in added {
                let page = page % memory.blocks()[at].geometry.pages();
                missing.add_pages(at, page / 64, 1 << (page % 64));
                model.extend((page / unit * unit..(page / unit + 1) * unit).map(|page| (at, page)));
            }
            prop_assert_eq!(missing.remaining_pages(), model.len() as u64);
            for (at, block) in memory.blocks().iter().enumerate() {
                for page in 0..block.geometry.pages() {
                    let set = missing.block(at).page_word(page / 64) >> (page % 64) & 1 == 1;
                    prop_assert_eq!(set, model.contains(&(at, page)));
                }
            }
            for (at, first, count) in asked {
                let pages = PageRange::new(first, count).intersection(&memory.blocks()[at].all());
                let host_pages = missing.block(at).covering(pages);
                let mut taken = BTreeSet::new();
                missing.take_range(at, host_pages, |word, bits| {
                    for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                        let whole = missing.block(at).pages(PageRange::new(word * 64 + bit, 1));
                        taken.extend((whole.first..whole.end()).map(|page| (at, page)));
                    }
                });
                let whole = missing.block(at).pages(host_pages);
                let expected: BTreeSet<_> =
                    (whole.first..whole.end())
                        .map(|page| (at, page))
                        .filter(|page| model.remove(page))
                        .collect();
                prop_assert_eq!(taken, expected);
                prop_assert_eq!(missing.remaining_pages(), model.len() as u64);
                let (at, from) = (at, host_pages.end());
                let next = missing.next_from(at, from).map(|(at, page)| (at, page * unit));
                let after = model.range((at, from * unit)..).next();
                let after = after.or_else(|| model.iter().next()).copied();
                prop_assert_eq!(next, after);
            }
        }
    }
}
