// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From addresses to ranges of blocks.
//!
//! A device knows guest physical addresses (a balloon) or addresses of the VMM (code around
//! `madvise`), and no blocks. [`Client::guest_ranges`] and [`Client::host_ranges`] find the blocks:
//!
//! ```no_run
//! # use pageferry_client::{Client, Error};
//! # fn inflated(client: &Client, gpa: u64) -> Result<(), Error> {
//! client.free(&client.guest_ranges(gpa, 4096)?)?;
//! # Ok(()) }
//! ```
//!
//! A lookup takes the logarithm of the number of blocks, since a balloon looks up thousands of
//! pages.

use crate::client::Client;
use crate::error::Error;
use pageferry_protocol::control::request::BlockRange;
use std::collections::BTreeMap;

impl Client {
    /// The ranges of blocks at `length` bytes from guest physical address `gpa`, in the order of
    /// the addresses: one range, or several if it spans blocks that are adjacent in the guest. For
    /// [`Client::free`], [`Client::discard`] and [`Client::populate`], which round each range. A
    /// range of no bytes is in no block, and gives none.
    ///
    /// # Errors
    /// [`Error::NoBlock`] if a part of the addresses is in no block. It names the first such part.
    pub fn guest_ranges(&self, gpa: u64, length: u64) -> Result<Vec<BlockRange>, Error> {
        self.memory().guest_ranges(gpa, length)
    }

    /// The ranges of blocks at `length` bytes from `address` in the VMM, as
    /// [`Client::guest_ranges`] does for guest physical addresses. Finds only blocks with a
    /// [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address).
    ///
    /// # Errors
    /// [`Error::NoBlock`] if a part of the addresses is in no block. It names the first such part.
    pub fn host_ranges(&self, address: u64, length: u64) -> Result<Vec<BlockRange>, Error> {
        self.memory().host_ranges(address, length)
    }
}

/// Blocks by their first address. They do not overlap, and none ends after the address space.
#[derive(Debug, Default)]
pub(crate) struct AddressMap(BTreeMap<u64, Span>);

#[derive(Debug, Clone, Copy)]
struct Span {
    /// Length in bytes.
    length: u64,
    block: u32,
}

/// Addresses that are in no block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    address: u64,
    length: u64,
}

impl Gap {
    /// The error for whoever asked for these addresses.
    pub(crate) fn error(self, what: &'static str, address: u64, length: u64) -> Error {
        Error::NoBlock { what, address, length, gap: self.address, gap_length: self.length }
    }
}

impl AddressMap {
    /// Adds a block that [overlaps](AddressMap::overlapping) no other.
    pub(crate) fn insert(&mut self, start: u64, length: u64, block: u32) {
        self.0.insert(start, Span { length, block });
    }

    /// Removes a block, if it is here.
    pub(crate) fn remove(&mut self, block: u32) {
        self.0.retain(|_, span| span.block != block);
    }

    /// A block that has one of these addresses. `length` is not zero, and `start + length` does not
    /// overflow.
    pub(crate) fn overlapping(&self, start: u64, length: u64) -> Option<u32> {
        let (first, span) = self.0.range(..start + length).next_back()?;
        (start < first + span.length).then_some(span.block)
    }

    /// The ranges of blocks at these addresses, or the first part that is in no block.
    pub(crate) fn ranges(&self, address: u64, length: u64) -> Result<Vec<BlockRange>, Gap> {
        let mut ranges = Vec::new();
        let (mut next, mut left) = (address, length);
        while left > 0 {
            let (offset, span) = self.at(next).ok_or_else(|| self.gap(next, left))?;
            let length = left.min(span.length - offset);
            ranges.push(BlockRange { block: span.block, offset, length });
            // No block ends after the address space.
            next += length;
            left -= length;
        }
        Ok(ranges)
    }

    /// The block with this address, and the offset of the address in it.
    fn at(&self, address: u64) -> Option<(u64, Span)> {
        let (start, span) = self.0.range(..=address).next_back()?;
        let offset = address - start;
        (offset < span.length).then_some((offset, *span))
    }

    /// From `address`, which is in no block, to the next block, and at most `length` bytes.
    fn gap(&self, address: u64, length: u64) -> Gap {
        let next = self.0.range(address..).next();
        Gap { address, length: next.map_or(length, |(start, _)| length.min(start - address)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Blocks from these gaps and lengths, one after the other from `base`. The second value says
    /// of each address from `base` on which block it belongs to, and at which offset.
    fn blocks(base: u64, parts: &[(u64, u64)]) -> (AddressMap, Vec<Option<(u32, u64)>>) {
        let (mut map, mut naive) = (AddressMap::default(), Vec::new());
        for (block, &(gap, length)) in (0..).zip(parts) {
            naive.extend((0..gap).map(|_| None));
            map.insert(base + naive.len() as u64, length, block);
            naive.extend((0..length).map(|offset| Some((block, offset))));
        }
        (map, naive)
    }

    /// Joins single bytes of the same block.
    fn joined(bytes: &[(u32, u64)]) -> Vec<BlockRange> {
        let mut ranges: Vec<BlockRange> = Vec::new();
        for &(block, offset) in bytes {
            match ranges.last_mut() {
                Some(last) if last.block == block => last.length += 1,
                _ => ranges.push(BlockRange { block, offset, length: 1 }),
            }
        }
        ranges
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_model_of_single_bytes(
            base in prop_oneof![Just(0u64), Just(0x1000), Just(u64::MAX - 200)],
            parts in vec((0u64..4, 1u64..8), 0..8),
            start in 0u64..100, length in 0u64..100, removed in 0u32..8,
        ) {
            let (mut map, mut naive) = blocks(base, &parts);
            for removes in [false, true] {
                if removes {
                    map.remove(removed);
                    naive.iter_mut().for_each(|at| *at = at.filter(|(block, _)| *block != removed));
                }
                let at = |index: u64| naive.get(index as usize).copied().flatten();
                let wanted: Vec<u64> = (start..start + length).collect();
                let found: Vec<_> = wanted.iter().map_while(|index| at(*index)).collect();
                let gap = wanted.iter().skip(found.len()).take_while(|index| at(**index).is_none());
                let expected = match gap.count() as u64 {
                    0 => Ok(joined(&found)),
                    // The model has as many addresses as are asked for, and nothing after them.
                    gap => Err(Gap { address: base + start + found.len() as u64, length: gap }),
                };
                prop_assert_eq!(map.ranges(base + start, length), expected);
                if length > 0 && base.checked_add(start + length).is_some() {
                    let overlaps = wanted.iter().any(|index| at(*index).is_some());
                    prop_assert_eq!(map.overlapping(base + start, length).is_some(), overlaps);
                }
            }
        }
    }

    #[test]
    fn addresses_up_to_the_last_are_no_overflow() {
        let mut map = AddressMap::default();
        map.insert(u64::MAX - 0xfff, 0xfff, 7);
        let last = BlockRange { block: 7, offset: 0xffe, length: 1 };
        assert_eq!(map.ranges(u64::MAX - 1, 1), Ok(vec![last]));
        let gap = Gap { address: u64::MAX, length: u64::MAX - 1 };
        assert_eq!(map.ranges(u64::MAX - 1, u64::MAX), Err(gap));
    }
}
