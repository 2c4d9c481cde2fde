// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which guest memory is at which offset of a raw file.
//!
//! A layout has the blocks of the guest, and the parts of the file. Each part is a range of guest
//! addresses that lies in one block. Most layouts have one part for each block. A block may have
//! several, or places that are in no part: unplugged memory, which reads as zero.
//!
//! `RawLayout::place` finds the parts in the blocks of an image. `Chunks` splits them into the
//! units of work of an import or an export.

use pageferry_protocol::image::EXTENT_PAGES;
use pageferry_protocol::memory::{
    BlockGeometry, BlockTable, GeometryError, MAX_BLOCKS, PAGE_SIZE, PageRange, pages_in,
};

/// Why a layout is not possible, or does not fit an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A block, or the set of blocks, is not valid.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// There is no memory.
    #[error("the layout has no memory")]
    Empty,
    /// A part is empty, or its address, length or offset is not a multiple of the page size.
    #[error(
        "memory {gpa:#x} + {length:#x} at byte {offset:#x}: address, length and offset must be \
         multiples of {PAGE_SIZE:#x}, and the length not 0"
    )]
    Unaligned {
        /// Guest physical address of the part.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
        /// Its offset in bytes.
        offset: u64,
    },
    /// A part ends after the largest offset or address.
    #[error("memory {gpa:#x} + {length:#x} at byte {offset:#x} ends after the largest number")]
    Overflow {
        /// Guest physical address of the part.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
        /// Its offset in bytes.
        offset: u64,
    },
    /// Two parts share bytes of the file, or guest memory.
    #[error("memory {gpa:#x} + {length:#x} and {other:#x} + {other_length:#x} share {what}")]
    Overlap {
        /// What they share.
        what: &'static str,
        /// Guest physical address of the first part.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
        /// Guest physical address of the second part.
        other: u64,
        /// Its length in bytes.
        other_length: u64,
    },
    /// A part does not lie in one block.
    #[error("memory {gpa:#x} + {length:#x} does not lie in one block, but the blocks are {blocks}")]
    Outside {
        /// Guest physical address of the part.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
        /// The addresses and lengths of the blocks.
        blocks: String,
    },
    /// An export would lose content.
    #[error(
        "the layout has no place for {pages} of the pages with content of block {id} \"{name}\""
    )]
    LeftOut {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
        /// Number of its pages that have content and are in no part.
        pages: u64,
    },
    /// The length of the file cannot be that of a guest's memory.
    #[error(
        "the file has {length:#x} bytes, but memory has a multiple of {PAGE_SIZE:#x}, and not 0"
    )]
    NoMemory {
        /// Length of the file in bytes.
        length: u64,
    },
}

/// A range of guest memory in a raw file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in the file in bytes.
    pub offset: u64,
}

/// A block that is one part of a raw file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawBlock {
    /// The block.
    pub block: BlockGeometry,
    /// Its offset in the file in bytes.
    pub offset: u64,
}

/// Which guest memory is at which offset of a raw file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawLayout {
    table: BlockTable,
    /// In the order of the file.
    parts: Vec<Part>,
    length: u64,
}

impl RawLayout {
    /// A layout of blocks with one part each.
    ///
    /// # Errors
    /// If blocks or parts are not valid, or overlap.
    pub fn new(blocks: impl IntoIterator<Item = RawBlock>) -> Result<Self, LayoutError> {
        let (mut table, mut parts) = (BlockTable::new(), Vec::new());
        for RawBlock { block, offset } in blocks {
            parts.push(Part { gpa: block.gpa, length: block.length, offset });
            table.insert(block, MAX_BLOCKS)?;
        }
        Self::of_parts(table, parts)
    }

    /// All blocks one after another, in the order of their addresses.
    ///
    /// # Errors
    /// If there are no blocks, or the file would be too long.
    pub fn dense(table: &BlockTable) -> Result<Self, LayoutError> {
        let ranges = table.blocks().iter().map(|block| (block.gpa, block.length));
        Self::of_ranges(table.clone(), ranges)
    }

    /// Ranges of guest memory one after another, in this order: addresses and lengths.
    ///
    /// # Errors
    /// If a range is not valid, lies in no block, or overlaps another.
    pub fn of_ranges(
        table: BlockTable, ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, LayoutError> {
        let mut offset = 0u64;
        let part = |(gpa, length)| {
            let part = Part { gpa, length, offset };
            // A sum that is too large is an overflow of the next part, or of this one.
            offset = offset.saturating_add(length);
            part
        };
        Self::of_parts(table, ranges.into_iter().map(part).collect())
    }

    fn of_parts(table: BlockTable, mut parts: Vec<Part>) -> Result<Self, LayoutError> {
        parts.iter().try_for_each(check_part)?;
        parts.sort_by_key(|part| part.gpa);
        check_order(&parts, |part| part.gpa, "guest memory")?;
        parts.sort_by_key(|part| part.offset);
        check_order(&parts, |part| part.offset, "bytes of the file")?;
        let length = parts.last().map(|part| part.offset + part.length);
        let layout = Self { table, parts, length: length.ok_or(LayoutError::Empty)? };
        layout.place(&layout.table)?;
        Ok(layout)
    }

    /// The blocks of the guest.
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// The parts of the file, in the order of their offsets.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Bytes of a block that are in the file. Parts do not overlap, and each lies in one block.
    pub(super) fn bytes_of(&self, block: &BlockGeometry) -> u64 {
        let addresses = block.gpa..block.gpa + block.length;
        let parts = self.parts.iter().filter(|part| addresses.contains(&part.gpa));
        parts.map(|part| part.length).sum()
    }

    /// Length of the file in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Finds the parts in the blocks of `table`.
    ///
    /// # Errors
    /// If a part does not lie in one block.
    pub(super) fn place(&self, table: &BlockTable) -> Result<Vec<PlacedPart>, LayoutError> {
        let blocks = table.blocks();
        let place = |part: &Part| {
            let at = blocks.partition_point(|block| block.gpa <= part.gpa).checked_sub(1);
            let found = at.map(|at| (at, &blocks[at]));
            let (at, block) = found
                .filter(|(_, block)| part.gpa + part.length <= block.gpa + block.length)
                .ok_or_else(|| LayoutError::Outside {
                    gpa: part.gpa,
                    length: part.length,
                    blocks: ranges_of(table),
                })?;
            let pages = PageRange::new(pages_in(part.gpa - block.gpa), pages_in(part.length));
            Ok(PlacedPart { at, pages, offset: part.offset })
        };
        self.parts.iter().map(place).collect()
    }
}

/// Pages of a block in a raw file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlacedPart {
    /// Index of the block in the table.
    pub(super) at: usize,
    /// Pages of the block.
    pub(super) pages: PageRange,
    /// Offset of the first page in the file in bytes.
    pub(super) offset: u64,
}

impl PlacedPart {
    /// The offset of a page of this part in the file.
    pub(super) fn offset_of(&self, page: u64) -> u64 {
        self.offset + (page - self.pages.first) * PAGE_SIZE
    }
}

/// The parts of a layout, split at the ends of the extents of the image, and numbered.
#[derive(Debug)]
pub(super) struct Chunks<'a> {
    parts: &'a [PlacedPart],
    /// Number of the first chunk of each part.
    first: Vec<u64>,
    /// Number of all chunks.
    pub(super) count: u64,
}

impl<'a> Chunks<'a> {
    pub(super) fn of(parts: &'a [PlacedPart]) -> Self {
        let mut count = 0;
        let first = parts.iter().map(|part| {
            let first = count;
            count += part.pages.end().div_ceil(EXTENT_PAGES) - part.pages.first / EXTENT_PAGES;
            first
        });
        let first = first.collect();
        Self { parts, first, count }
    }

    /// The chunk of this number.
    pub(super) fn get(&self, number: u64) -> PlacedPart {
        let at = self.first.partition_point(|first| *first <= number).saturating_sub(1);
        let part = &self.parts[at];
        let extent = part.pages.first / EXTENT_PAGES + (number - self.first[at]);
        let pages = PageRange::new(extent * EXTENT_PAGES, EXTENT_PAGES).intersection(&part.pages);
        PlacedPart { at: part.at, pages, offset: part.offset_of(pages.first) }
    }
}

/// Checks the numbers of a part.
fn check_part(&Part { gpa, length, offset }: &Part) -> Result<(), LayoutError> {
    if length == 0 || [gpa, length, offset].iter().any(|value| value % PAGE_SIZE != 0) {
        return Err(LayoutError::Unaligned { gpa, length, offset });
    }
    // The kernel has no offsets from 2^63 on.
    let end = offset.checked_add(length).filter(|end| i64::try_from(*end).is_ok());
    match (end, gpa.checked_add(length)) {
        (Some(_), Some(_)) => Ok(()),
        _ => Err(LayoutError::Overflow { gpa, length, offset }),
    }
}

/// Checks that parts, which are sorted by `start`, do not overlap there.
fn check_order(
    parts: &[Part], start: impl Fn(&Part) -> u64, what: &'static str,
) -> Result<(), LayoutError> {
    let mut pairs = parts.windows(2).filter_map(|pair| pair.first().zip(pair.get(1)));
    match pairs.find(|(one, other)| start(other) < start(one) + one.length) {
        None => Ok(()),
        Some((one, other)) => Err(LayoutError::Overlap {
            what,
            gpa: one.gpa,
            length: one.length,
            other: other.gpa,
            other_length: other.length,
        }),
    }
}

/// The addresses and lengths of blocks, for an error.
fn ranges_of(table: &BlockTable) -> String {
    let range = |block: &BlockGeometry| format!("{:#x} + {:#x}", block.gpa, block.length);
    table.blocks().iter().map(range).collect::<Vec<_>>().join(", ")
}
