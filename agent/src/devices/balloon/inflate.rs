// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that go into the balloon: they come one by one, each as a number of 32 bits.
//!
//! A driver takes them from wherever it finds them, and lists the last one first as often as not.
//! So they are sorted, and those that follow each other are freed by one call.
//!
//! Where the host has pages of 2 MiB, it can free one only when the guest has given back all of it.
//! So the pages of such a block are remembered.

use crate::memory::GuestMemory;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// The runs of pages in a buffer: first page, and count. A part of a number at the end is ignored.
pub fn runs(numbers: &[u8]) -> Vec<(u64, u64)> {
    let number = |word: &[u8]| u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    let mut pages: Vec<u32> = numbers.chunks_exact(4).map(number).collect();
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in pages.into_iter().map(u64::from) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// The pages in the balloon of blocks whose host pages are larger than theirs, by the block's id.
#[derive(Debug, Default)]
pub struct Inflated(BTreeMap<u32, MappedBitmap>);

impl Inflated {
    /// Adds pages. Returns what can be freed now: the pages themselves, or whole host pages.
    pub fn add(&mut self, memory: &GuestMemory, ranges: &[BlockRange]) -> Vec<BlockRange> {
        let mut whole = Vec::new();
        for range in ranges {
            let Some((unit, pages)) = unit_of(memory, range) else {
                whole.push(*range);
                continue;
            };
            let Some(inflated) = self.of(memory, range.block) else { continue };
            inflated.set(pages);
            let mut first = pages.first / unit * unit;
            while first < pages.end() {
                let host_page = PageRange::new(first, unit);
                if inflated.next_clear(host_page).is_none() {
                    let offset = host_page.offset();
                    whole.push(BlockRange { block: range.block, offset, length: unit * PAGE_SIZE });
                }
                first += unit;
            }
        }
        whole
    }

    /// Removes pages.
    pub fn remove(&mut self, memory: &GuestMemory, ranges: &[BlockRange]) {
        for range in ranges {
            if let Some((_, pages)) = unit_of(memory, range)
                && let Some(inflated) = self.0.get(&range.block)
                && pages.end() <= inflated.pages()
            {
                inflated.clear(pages);
            }
        }
    }

    fn of(&mut self, memory: &GuestMemory, id: u32) -> Option<&MappedBitmap> {
        let (_, block) = memory.find(id)?;
        let pages = block.geometry.pages();
        // A block that was replaced has nothing in the balloon.
        self.0.retain(|other, bitmap| *other != id || bitmap.pages() == pages);
        Some(match self.0.entry(id) {
            Entry::Occupied(entry) => entry.into_mut(),
            // Without memory for it, nothing is freed.
            Entry::Vacant(entry) => entry.insert(MappedBitmap::private(pages).ok()?),
        })
    }
}

/// Pages of a host page, and the pages of the range. `None` if each page can be freed by itself.
fn unit_of(memory: &GuestMemory, range: &BlockRange) -> Option<(u64, PageRange)> {
    let (_, block) = memory.find(range.block)?;
    let unit = block.discard_unit() / PAGE_SIZE;
    let pages = PageRange::new(range.offset / PAGE_SIZE, range.length / PAGE_SIZE);
    (unit > 1).then_some((unit, pages))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn runs_have_the_pages_once_and_in_order(pages in prop::collection::vec(0u32..64, 0..100)) {
            let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
            let wanted: BTreeSet<u64> = pages.iter().map(|page| u64::from(*page)).collect();
            let runs = runs(&bytes);
            let found: Vec<u64> =
                runs.iter().flat_map(|(first, count)| *first..first + count).collect();
            prop_assert_eq!(&found, &wanted.into_iter().collect::<Vec<_>>());
            let apart = runs.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0);
            prop_assert!(apart, "{:?}", runs);
        }
    }
}
