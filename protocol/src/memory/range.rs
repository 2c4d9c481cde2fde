// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges of pages, and how byte ranges within a block become page ranges.
//!
//! [`round-safely`](crate::invariants#round-safely) is kept here. A discard rounds *inward*: a page
//! that it covers only in part is still in use. A populate rounds *outward*: a page that it covers
//! in part becomes safe to use.

use super::{PAGE_SHIFT, PAGE_SIZE};

/// A run of pages: `count` pages from page number `first`.
///
/// Where page 0 is depends on the use:
///
/// - in a bitmap of discarded pages, page 0 is the first page of the block;
/// - in the [dirty log](crate::shm::DirtyLog), page 0 is the page at guest physical address 0, so
///   [`DirtyLog::mark`](crate::shm::DirtyLog::mark) wants page numbers `gpa / 4096`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageRange {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages; may be zero.
    pub count: u64,
}

/// A byte range that is not part of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// `offset + length` is more than 64 bits hold.
    #[error("range offset {offset:#x} + length {length:#x} overflows")]
    Overflow {
        /// Offset in bytes within the block.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The range ends after the block.
    #[error(
        "range offset {offset:#x} + length {length:#x} ends outside the block of {block_length:#x} bytes"
    )]
    Outside {
        /// Offset in bytes within the block.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Length of the block in bytes.
        block_length: u64,
    },
}

/// Number of whole pages in `bytes`.
pub const fn pages_in(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT
}

impl PageRange {
    /// The range of `count` pages from `first`.
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// The first page after the range. Saturates, so that the numbers of a lying peer cannot wrap
    /// around.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// True if the range holds no page.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Offset of the first byte in bytes from page 0.
    pub const fn offset(&self) -> u64 {
        self.first << PAGE_SHIFT
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> u64 {
        self.count << PAGE_SHIFT
    }

    /// True if the two ranges share a page; an empty range shares none.
    pub fn overlaps(&self, other: &PageRange) -> bool {
        !self.intersection(other).is_empty()
    }

    /// The pages that are in both ranges; empty if there is none.
    pub fn intersection(&self, other: &PageRange) -> PageRange {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        PageRange::new(first, end.saturating_sub(first))
    }

    /// True if all pages of the range are below page `block_pages`.
    pub const fn fits(&self, block_pages: u64) -> bool {
        match self.first.checked_add(self.count) {
            Some(end) => end <= block_pages,
            None => false,
        }
    }

    /// The whole units of `unit` bytes that lie inside `offset..offset + length`
    /// ([`round-safely`](crate::invariants#round-safely): discards).
    ///
    /// `unit` is a power of two and a multiple of the page size: a block's discard granularity.
    /// Where the block ends before a unit does, the rest of the block counts as a whole unit. The
    /// result may be empty.
    ///
    /// # Errors
    /// If the bytes are not inside a block of `block_length` bytes.
    pub fn inward(
        offset: u64, length: u64, unit: u64, block_length: u64,
    ) -> Result<Self, RangeError> {
        let end = checked_end(offset, length, block_length)?;
        debug_assert!(unit.is_power_of_two() && unit >= PAGE_SIZE);
        let start = offset.checked_next_multiple_of(unit).unwrap_or(block_length);
        let end = if end == block_length { end } else { end & !(unit - 1) };
        let (first, last) = (pages_in(start), pages_in(end));
        Ok(Self::new(first, last.saturating_sub(first)))
    }

    /// The units of `unit` bytes that touch `offset..offset + length`, cut at the end of the block
    /// ([`round-safely`](crate::invariants#round-safely): populates).
    ///
    /// # Errors
    /// If the bytes are not inside a block of `block_length` bytes.
    pub fn outward(
        offset: u64, length: u64, unit: u64, block_length: u64,
    ) -> Result<Self, RangeError> {
        let end = checked_end(offset, length, block_length)?;
        debug_assert!(unit.is_power_of_two() && unit >= PAGE_SIZE);
        if length == 0 {
            return Ok(Self::new(pages_in(offset), 0));
        }
        let start = offset & !(unit - 1);
        let end = end.checked_next_multiple_of(unit).unwrap_or(block_length).min(block_length);
        let first = pages_in(start);
        Ok(Self::new(first, pages_in(end) - first))
    }
}

fn checked_end(offset: u64, length: u64, block_length: u64) -> Result<u64, RangeError> {
    let end = offset.checked_add(length).ok_or(RangeError::Overflow { offset, length })?;
    if end > block_length {
        return Err(RangeError::Outside { offset, length, block_length });
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u64 = 1 << 24;

    #[test]
    fn inward_of_part_of_a_page_is_empty() {
        assert!(PageRange::inward(1, 4095, PAGE_SIZE, BLOCK).unwrap().is_empty());
        assert!(PageRange::inward(4095, 2, PAGE_SIZE, BLOCK).unwrap().is_empty());
    }

    #[test]
    fn inward_reaches_the_end_of_a_block_that_is_no_multiple_of_the_unit() {
        let block = (2 << 20) + 4096;
        let range = PageRange::inward(2 << 20, 4096, 2 << 20, block).unwrap();
        assert_eq!(range, PageRange::new(512, 1));
    }

    #[test]
    fn outward_of_one_byte_is_one_unit() {
        assert_eq!(PageRange::outward(4096, 1, PAGE_SIZE, BLOCK).unwrap(), PageRange::new(1, 1));
        assert_eq!(PageRange::outward(4096, 1, 2 << 20, BLOCK).unwrap(), PageRange::new(0, 512));
    }

    #[test]
    fn an_empty_range_shares_no_page() {
        let (empty, full) = (PageRange::new(5, 0), PageRange::new(0, 10));
        assert!(!empty.overlaps(&full) && !full.overlaps(&empty) && !empty.overlaps(&empty));
        assert!(full.overlaps(&PageRange::new(9, 1)) && !full.overlaps(&PageRange::new(10, 1)));
    }

    #[test]
    fn a_range_outside_the_block_names_its_numbers() {
        let error = PageRange::inward(BLOCK, 4096, PAGE_SIZE, BLOCK).unwrap_err();
        assert!(error.to_string().contains("0x1000000"), "{error}");
        assert!(matches!(
            PageRange::outward(u64::MAX, 2, PAGE_SIZE, BLOCK),
            Err(RangeError::Overflow { .. })
        ));
    }

    proptest! {
        #[test]
        fn rounding_agrees_with_a_byte_by_byte_model(
            offset in 0u64..64 * 1024, length in 0u64..64 * 1024, unit_shift in 12u32..15, tail in 0u64..4,
        ) {
            let unit = 1u64 << unit_shift;
            let block = 128 * 1024 + tail * PAGE_SIZE;
            let inward = PageRange::inward(offset, length, unit, block).unwrap();
            let outward = PageRange::outward(offset, length, unit, block).unwrap();
            for page in 0..pages_in(block) {
                let start = page * PAGE_SIZE / unit * unit;
                let end = (start + unit).min(block);
                let covered = offset <= start && end <= offset + length;
                let touched = length > 0 && offset < end && start < offset + length;
                let holds = |range: &PageRange| range.first <= page && page < range.end();
                prop_assert_eq!(holds(&inward), covered, "page {} inward", page);
                prop_assert_eq!(holds(&outward), touched, "page {} outward", page);
            }
        }
    }
}
