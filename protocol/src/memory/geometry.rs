// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a block is, and which sets of blocks are valid.
//!
//! The same check runs wherever a set of blocks is formed: when a VMM adds a block, and when the
//! table of a peer arrives.

use super::{PAGE_SIZE, pages_in};

/// Largest number of blocks in a page stream; a constant of the stream format.
pub const MAX_BLOCKS: usize = 512;

/// Largest number of blocks of a VMM: the number of memory slots that KVM offers to user space. The
/// answer to `VHOST_USER_GET_MAX_MEM_SLOTS`.
pub const MAX_MEM_SLOTS: usize = 509;

/// Longest name of a block in bytes of UTF-8.
pub const MAX_NAME: usize = 255;

/// Largest block: 2^50 bytes. Every page index then fits into the 40 bits of the agent's reader
/// fence.
pub const MAX_BLOCK_LENGTH: u64 = 1 << 50;

/// Position of a block in the guest, and the unit of its discards. Independent of the file under
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockGeometry {
    /// Chosen by the VMM. Unique among its blocks, and the same on source and destination.
    pub id: u32,
    /// For people: unique among the VMM's blocks.
    pub name: String,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
    /// Unit of discards and populates in bytes: a power of two, at least a page. If the host page
    /// of the file is larger, the host page is the unit.
    pub granularity: u64,
}

impl BlockGeometry {
    /// Number of pages in the block.
    pub fn pages(&self) -> u64 {
        pages_in(self.length)
    }

    /// Page number of the first page in the guest, which is its position in the dirty log.
    pub fn first_log_page(&self) -> u64 {
        pages_in(self.gpa)
    }

    /// The unit of discards and populates in bytes, for a file with host pages of `host_page_size`
    /// bytes. A part of a host page cannot be freed. And a tracker that reports host pages could
    /// not tell a write beside such a part from a stray write into it.
    pub fn discard_unit(&self, host_page_size: u64) -> u64 {
        self.granularity.max(host_page_size)
    }
}

/// Why a block or a set of blocks is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// `gpa`, `length` or `fd_offset` is not a multiple of the page size.
    #[error("block {id}: {field} {value:#x} is not a multiple of the page size {PAGE_SIZE:#x}")]
    Unaligned {
        /// The block.
        id: u32,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The length is zero or more than [`MAX_BLOCK_LENGTH`].
    #[error("block {id}: length {length:#x} is not in {PAGE_SIZE:#x}..={MAX_BLOCK_LENGTH:#x}")]
    Length {
        /// The block.
        id: u32,
        /// Its length in bytes.
        length: u64,
    },
    /// The block ends after the guest's address space.
    #[error("block {id}: gpa {gpa:#x} + length {length:#x} overflows")]
    Overflow {
        /// The block.
        id: u32,
        /// Its guest physical address.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The granularity is not a power of two, or less than a page.
    #[error(
        "block {id}: granularity {granularity:#x} is not a power of two of at least {PAGE_SIZE:#x}"
    )]
    Granularity {
        /// The block.
        id: u32,
        /// Its discard granularity in bytes.
        granularity: u64,
    },
    /// The name is empty or longer than [`MAX_NAME`] bytes.
    #[error("block {id}: name of {length} bytes, allowed are 1 to {MAX_NAME}")]
    Name {
        /// The block.
        id: u32,
        /// Length of the name in bytes.
        length: usize,
    },
    /// Another block has the id.
    #[error("block {id}: the id is taken by block \"{name}\"")]
    DuplicateId {
        /// The block.
        id: u32,
        /// Name of the block that has the id.
        name: String,
    },
    /// Another block has the name.
    #[error("block {id}: the name \"{name}\" is taken by block {other}")]
    DuplicateName {
        /// The block.
        id: u32,
        /// The name.
        name: String,
        /// The block that has the name.
        other: u32,
    },
    /// Two blocks share guest addresses.
    #[error(
        "block {id}: {gpa:#x} + {length:#x} overlaps block {other} at {other_gpa:#x} + {other_length:#x}"
    )]
    Overlap {
        /// The block.
        id: u32,
        /// Its guest physical address.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
        /// The block that it overlaps.
        other: u32,
        /// Guest physical address of the other.
        other_gpa: u64,
        /// Length of the other in bytes.
        other_length: u64,
    },
    /// The number of blocks is at its limit.
    #[error("block {id}: there are {limit} blocks already, which is the limit")]
    TooMany {
        /// The block.
        id: u32,
        /// The limit.
        limit: usize,
    },
}

/// A valid set of blocks: unique ids and names, and no overlap. In the order of the GPA.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockGeometry>,
}

impl BlockTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// The blocks in order of their GPA.
    pub fn blocks(&self) -> &[BlockGeometry] {
        &self.blocks
    }

    /// The block with this id.
    pub fn get(&self, id: u32) -> Option<&BlockGeometry> {
        self.blocks.iter().find(|block| block.id == id)
    }

    /// Adds a block, if the set stays valid and no larger than `limit`.
    ///
    /// # Errors
    /// The first rule that the block breaks; the table is then unchanged.
    pub fn insert(&mut self, block: BlockGeometry, limit: usize) -> Result<(), GeometryError> {
        check_fields(&block)?;
        let id = block.id;
        if self.blocks.len() >= limit {
            return Err(GeometryError::TooMany { id, limit });
        }
        if let Some(other) = self.get(id) {
            return Err(GeometryError::DuplicateId { id, name: other.name.clone() });
        }
        if let Some(other) = self.blocks.iter().find(|other| other.name == block.name) {
            return Err(GeometryError::DuplicateName { id, name: block.name, other: other.id });
        }
        let at = self.blocks.partition_point(|other| other.gpa < block.gpa);
        let neighbours = self.blocks[at.saturating_sub(1)..].iter().take(2);
        for other in neighbours {
            if block.gpa < other.gpa + other.length && other.gpa < block.gpa + block.length {
                return Err(GeometryError::Overlap {
                    id,
                    gpa: block.gpa,
                    length: block.length,
                    other: other.id,
                    other_gpa: other.gpa,
                    other_length: other.length,
                });
            }
        }
        self.blocks.insert(at, block);
        Ok(())
    }

    /// Removes the block with this id.
    pub fn remove(&mut self, id: u32) -> Option<BlockGeometry> {
        let at = self.blocks.iter().position(|block| block.id == id)?;
        Some(self.blocks.remove(at))
    }
}

fn check_fields(block: &BlockGeometry) -> Result<(), GeometryError> {
    let id = block.id;
    for (field, value) in [("gpa", block.gpa), ("length", block.length)] {
        if value % PAGE_SIZE != 0 {
            return Err(GeometryError::Unaligned { id, field, value });
        }
    }
    if block.length == 0 || block.length > MAX_BLOCK_LENGTH {
        return Err(GeometryError::Length { id, length: block.length });
    }
    if block.gpa.checked_add(block.length).is_none() {
        return Err(GeometryError::Overflow { id, gpa: block.gpa, length: block.length });
    }
    if !block.granularity.is_power_of_two() || block.granularity < PAGE_SIZE {
        return Err(GeometryError::Granularity { id, granularity: block.granularity });
    }
    if block.name.is_empty() || block.name.len() > MAX_NAME {
        return Err(GeometryError::Name { id, length: block.name.len() });
    }
    Ok(())
}

/// A table of adjacent blocks of these numbers of pages, for unit tests.
#[cfg(test)]
pub(crate) fn test_table(pages: &[u64]) -> BlockTable {
    let mut table = BlockTable::new();
    let mut gpa = 0;
    for (id, pages) in (0..).zip(pages) {
        let (name, length) = (format!("ram{id}"), pages * PAGE_SIZE);
        let block = BlockGeometry { id, name, gpa, length, granularity: PAGE_SIZE };
        table.insert(block, MAX_BLOCKS).unwrap();
        gpa += length;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(id: u32, gpa: u64, length: u64) -> BlockGeometry {
        BlockGeometry { id, name: format!("ram{id}"), gpa, length, granularity: PAGE_SIZE }
    }

    fn refused(table: &mut BlockTable, new: BlockGeometry) -> GeometryError {
        let before = table.clone();
        let error = table.insert(new, 3).unwrap_err();
        assert_eq!(*table, before, "a refused block changes nothing");
        error
    }

    #[test]
    fn blocks_that_touch_are_accepted_in_any_order() {
        let mut table = BlockTable::new();
        for (id, gpa) in [(1, 0x3000), (2, 0x1000), (3, 0x2000)] {
            table.insert(block(id, gpa, 0x1000), 3).unwrap();
        }
        let order: Vec<u32> = table.blocks().iter().map(|block| block.id).collect();
        assert_eq!(order, [2, 3, 1]);
        assert!(matches!(
            refused(&mut table, block(4, 0x9000, 0x1000)),
            GeometryError::TooMany { limit: 3, .. }
        ));
    }

    #[test]
    fn what_breaks_a_rule_is_refused_with_its_numbers() {
        let mut table = BlockTable::new();
        table.insert(block(1, 0x10000, 0x10000), 3).unwrap();
        for (gpa, length) in
            [(0x8000, 0x9000), (0x1f000, 0x1000), (0x14000, 0x1000), (0x8000, 0x20000)]
        {
            let error = refused(&mut table, block(2, gpa, length));
            assert!(matches!(error, GeometryError::Overlap { other: 1, .. }), "{error}");
            assert!(error.to_string().contains(&format!("{gpa:#x}")), "{error}");
        }
        assert!(matches!(
            refused(&mut table, block(1, 0, 0x1000)),
            GeometryError::DuplicateId { .. }
        ));
        let twin = BlockGeometry { name: "ram1".into(), ..block(2, 0, 0x1000) };
        assert!(matches!(refused(&mut table, twin), GeometryError::DuplicateName { other: 1, .. }));
        assert!(matches!(
            refused(&mut table, block(2, 0x10, 0x1000)),
            GeometryError::Unaligned { field: "gpa", .. }
        ));
        assert!(matches!(
            refused(&mut table, block(2, 0, 0x10)),
            GeometryError::Unaligned { field: "length", .. }
        ));
        assert!(matches!(refused(&mut table, block(2, 0, 0)), GeometryError::Length { .. }));
        assert!(matches!(
            refused(&mut table, block(2, !0xfff, 0x2000)),
            GeometryError::Overflow { .. }
        ));
        let odd = BlockGeometry { granularity: 0x3000, ..block(2, 0, 0x1000) };
        assert!(matches!(refused(&mut table, odd), GeometryError::Granularity { .. }));
        let unnamed = BlockGeometry { name: String::new(), ..block(2, 0, 0x1000) };
        assert!(matches!(refused(&mut table, unnamed), GeometryError::Name { length: 0, .. }));
    }
}
