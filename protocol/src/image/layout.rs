// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Offsets of pages and sections in an image.
//!
//! The header is followed, from 2 MiB on, by the blocks in the order of the table, each rounded up
//! to whole extents. Then the sections follow, each at a multiple of 4 KiB: the checksums of pages,
//! the states, the checksums of extents, the contents, and the state of the VMM.
//!
//! In a sealed image the seals of pages are in the place of their checksums. There are no checksums
//! of extents, and each other section has the seals of its pieces.
//!
//! All offsets but the ends of the last two sections follow from the lengths of the blocks. So
//! images of the same blocks have each page at the same offset.

use super::sealing::{SEAL_SIZE, sealed_size};
use super::states::states_size;
use super::{EXTENT_PAGES, EXTENT_SIZE, MAX_MEMORY};
use crate::error::size;
use crate::memory::{BlockTable, PAGE_SIZE};

/// The offsets in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    blocks: Vec<Place>,
    is_sealed: bool,
    /// First byte after the pages, where the checksums of pages begin.
    page_sums: u64,
    states: u64,
    extent_sums: u64,
    contents: u64,
}

/// The offsets of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    pages: u64,
    /// Byte of its first page.
    data: u64,
    /// Extents of the blocks before it.
    extents_before: u64,
    /// Bytes of the states of the blocks before it.
    states_before: u64,
}

/// Blocks that are too large for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("blocks of {} together, an image holds at most {}", size(*bytes), size(MAX_MEMORY))]
pub struct TooLarge {
    /// Bytes of all blocks.
    pub bytes: u64,
}

impl Layout {
    /// The offsets for these blocks, in a sealed image or in one in plain text.
    ///
    /// # Errors
    /// If the blocks are too large for one image.
    pub fn new(table: &BlockTable, is_sealed: bool) -> Result<Self, TooLarge> {
        let bytes = table.blocks().iter().fold(0u64, |sum, block| sum.saturating_add(block.length));
        if bytes > MAX_MEMORY {
            return Err(TooLarge { bytes });
        }
        let (mut extents, mut states) = (0u64, 0);
        let mut blocks = Vec::with_capacity(table.blocks().len());
        for block in table.blocks() {
            let data = EXTENT_SIZE * (1 + extents);
            blocks.push(Place {
                pages: block.pages(),
                data,
                extents_before: extents,
                states_before: states,
            });
            extents += block.pages().div_ceil(EXTENT_PAGES);
            states += states_size(block.pages());
        }
        let aligned = |offset: u64| offset.next_multiple_of(PAGE_SIZE);
        let page_sums = EXTENT_SIZE * (1 + extents);
        let mut layout =
            Self { blocks, is_sealed, page_sums, states: 0, extent_sums: 0, contents: 0 };
        layout.states = aligned(page_sums + layout.page_sums_size());
        layout.extent_sums = aligned(layout.states + layout.states_size());
        layout.contents = aligned(layout.extent_sums + layout.extent_sums_size());
        Ok(layout)
    }

    /// Bytes of a section with `length` bytes of content.
    pub fn section_size(&self, length: u64) -> u64 {
        if self.is_sealed { sealed_size(length) } else { length }
    }

    /// Bytes of a page's checksum, or of its seal.
    pub fn page_sum_size(&self) -> u64 {
        if self.is_sealed { SEAL_SIZE } else { 4 }
    }

    /// Byte of page `page` of the block at index `at` of the table.
    pub fn page(&self, at: usize, page: u64) -> u64 {
        self.blocks[at].data + page * PAGE_SIZE
    }

    /// Extents of the block at index `at`.
    pub fn extents(&self, at: usize) -> u64 {
        self.blocks[at].pages.div_ceil(EXTENT_PAGES)
    }

    /// Extents of all blocks.
    pub fn all_extents(&self) -> u64 {
        (self.page_sums - EXTENT_SIZE) / EXTENT_SIZE
    }

    /// The number of extent `extent` of the block at index `at` among those of all blocks: its
    /// place among the extents' checksums.
    pub fn extent(&self, at: usize, extent: u64) -> u64 {
        self.blocks[at].extents_before + extent
    }

    /// Byte of the checksum, or of the seal, of page `page` of the block at index `at`.
    pub fn page_sum(&self, at: usize, page: u64) -> u64 {
        let before = self.blocks[at].extents_before * EXTENT_PAGES;
        self.page_sums + (before + page) * self.page_sum_size()
    }

    /// First byte after the pages, and of the pages' checksums.
    pub fn page_sums(&self) -> u64 {
        self.page_sums
    }

    /// Bytes of the pages' checksums.
    pub fn page_sums_size(&self) -> u64 {
        self.all_extents() * EXTENT_PAGES * self.page_sum_size()
    }

    /// Byte of the states.
    pub fn states(&self) -> u64 {
        self.states
    }

    /// Where the states of the block at index `at` begin, in bytes from those of the first. In a
    /// sealed image, seals are between them.
    pub fn states_of(&self, at: usize) -> u64 {
        self.blocks[at].states_before
    }

    /// Bytes of the section of the states.
    pub fn states_size(&self) -> u64 {
        let states =
            self.blocks.last().map_or(0, |last| last.states_before + states_size(last.pages));
        self.section_size(states)
    }

    /// Byte of the extents' checksums.
    pub fn extent_sums(&self) -> u64 {
        self.extent_sums
    }

    /// Bytes of the extents' checksums. A sealed image has none.
    pub fn extent_sums_size(&self) -> u64 {
        if self.is_sealed { 0 } else { self.all_extents() * 4 }
    }

    /// Byte of the contents.
    pub fn contents(&self) -> u64 {
        self.contents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BlockGeometry;

    fn table(lengths: &[u64]) -> BlockTable {
        let mut table = BlockTable::new();
        let mut gpa = 0;
        for (id, length) in (0..).zip(lengths) {
            let block = BlockGeometry {
                id,
                name: format!("{id}"),
                gpa,
                length: *length,
                granularity: PAGE_SIZE,
            };
            table.insert(block, 512).unwrap();
            gpa += length;
        }
        table
    }

    #[test]
    fn places_follow_from_the_blocks_and_do_not_overlap() {
        let layout =
            Layout::new(&table(&[PAGE_SIZE, 3 * EXTENT_SIZE + PAGE_SIZE, EXTENT_SIZE]), false)
                .unwrap();
        assert_eq!(
            (layout.page(0, 0), layout.page(1, 0), layout.page(2, 1)),
            (2 << 20, 4 << 20, (12 << 20) + 4096)
        );
        assert_eq!(
            (layout.extents(0), layout.extents(1), layout.extents(2), layout.all_extents()),
            (1, 4, 1, 6)
        );
        assert_eq!((layout.extent(1, 0), layout.extent(2, 0)), (1, 5));
        assert_eq!(layout.page_sums(), 14 << 20);
        assert_eq!(layout.page_sum(1, 3), (14 << 20) + (512 + 3) * 4);
        assert_eq!(layout.states(), (14 << 20) + 6 * 2048);
        assert_eq!((layout.states_of(1), layout.states_of(2)), (16, 16 + 25 * 16));
        assert_eq!(layout.states_size(), 16 + 25 * 16 + 8 * 16);
        assert_eq!(layout.extent_sums(), layout.states() + 4096);
        assert_eq!(layout.contents(), layout.extent_sums() + 4096);
    }

    #[test]
    fn the_example_of_the_document_is_right() {
        let layout = Layout::new(&table(&[2 * EXTENT_SIZE, PAGE_SIZE]), false).unwrap();
        assert_eq!(
            (layout.page(0, 0), layout.page(0, 5), layout.page(1, 0)),
            (0x20_0000, 0x20_5000, 0x60_0000)
        );
        assert_eq!((layout.page_sums(), layout.page_sums_size()), (0x80_0000, 0x1800));
        assert_eq!((layout.page_sum(0, 5), layout.page_sum(1, 0)), (0x80_0014, 0x80_1000));
        assert_eq!(
            (layout.states(), layout.states_size(), layout.states_of(1)),
            (0x80_2000, 0x110, 0x100)
        );
        assert_eq!((layout.extent_sums(), layout.extent_sums_size()), (0x80_3000, 0xc));
        assert_eq!(layout.contents(), 0x80_4000);
    }

    #[test]
    fn a_sealed_image_has_larger_sections_and_pages_at_the_same_places() {
        let table = table(&[2 * EXTENT_SIZE, PAGE_SIZE]);
        let (plain, layout) =
            (Layout::new(&table, false).unwrap(), Layout::new(&table, true).unwrap());
        assert_eq!((layout.page(0, 5), layout.page(1, 0)), (plain.page(0, 5), plain.page(1, 0)));
        assert_eq!((layout.page_sums(), layout.page_sums_size()), (0x80_0000, 0x9000));
        assert_eq!((layout.page_sum(0, 5), layout.page_sum(1, 0)), (0x80_0078, 0x80_6000));
        assert_eq!((layout.states(), layout.states_size()), (0x80_9000, 0x110 + 24));
        assert_eq!((layout.extent_sums(), layout.extent_sums_size()), (0x80_a000, 0));
        assert_eq!(layout.contents(), 0x80_a000);
    }

    #[test]
    fn what_no_file_can_hold_is_refused() {
        let bytes = MAX_MEMORY + PAGE_SIZE;
        assert_eq!(
            Layout::new(&table(&[PAGE_SIZE, MAX_MEMORY]), false).unwrap_err(),
            TooLarge { bytes }
        );
        assert!(Layout::new(&table(&[MAX_MEMORY]), false).is_ok());
    }
}
