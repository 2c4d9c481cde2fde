// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Comparing two sets of blocks that must be the same.
//!
//! The sets are those of an increment and its base, or of a VMM and an image. [`compare`] returns
//! the first difference, with the block, the field and both values.

use pageferry_protocol::error::size;
use pageferry_protocol::memory::BlockTable;

/// A difference between the blocks of an increment and those of its base.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlocksDifference {
    /// A block of the base is missing.
    #[error("block {id} \"{name}\" is only in the base")]
    OnlyInBase {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A block is not in the base.
    #[error("block {id} \"{name}\" is not in the base")]
    NotInBase {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A field of a block differs.
    #[error("block {id}: {field} is {here}, but {there} in the base")]
    Field {
        /// The block.
        id: u32,
        /// The field that differs.
        field: &'static str,
        /// The value in the first set.
        here: String,
        /// The value in the base.
        there: String,
    },
}

/// Compares two sets of blocks by their ids, names, guest physical addresses and lengths. With
/// `all`, compares also the granularities of discards, which the guest does not see.
///
/// # Errors
/// The first difference.
pub fn compare(here: &BlockTable, there: &BlockTable, all: bool) -> Result<(), BlocksDifference> {
    for block in there.blocks() {
        let (id, name) = (block.id, block.name.clone());
        let Some(own) = here.get(id) else { return Err(BlocksDifference::OnlyInBase { id, name }) };
        let hex = |value: u64| format!("{value:#x}");
        let quoted = |name: &String| format!("{name:?}");
        let fields = [
            ("name", quoted(&own.name), quoted(&name)),
            ("gpa", hex(own.gpa), hex(block.gpa)),
            ("length", size(own.length), size(block.length)),
            ("granularity", size(own.granularity), size(block.granularity)),
        ];
        let compared = if all { fields.len() } else { fields.len() - 1 };
        let mut compared = fields.into_iter().take(compared);
        if let Some((field, here, there)) = compared.find(|(_, here, there)| here != there) {
            return Err(BlocksDifference::Field { id, field, here, there });
        }
    }
    match here.blocks().iter().find(|block| there.get(block.id).is_none()) {
        Some(block) => Err(BlocksDifference::NotInBase { id: block.id, name: block.name.clone() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};

    fn table(blocks: &[(u32, u64)]) -> BlockTable {
        let mut table = BlockTable::new();
        for (id, granularity) in blocks {
            let (name, gpa) = (format!("ram{id}"), u64::from(*id) << 30);
            let block = BlockGeometry {
                id: *id,
                name,
                gpa,
                length: 16 * PAGE_SIZE,
                granularity: *granularity,
            };
            table.insert(block, 512).unwrap();
        }
        table
    }

    #[test]
    fn a_difference_names_the_block_the_field_and_both_values() {
        let here = table(&[(1, 0x1000), (2, 0x1000)]);
        let sentence = |there| compare(&here, &table(there), true).unwrap_err().to_string();
        assert_eq!(compare(&here, &here, true), Ok(()));
        let large = &[(1, 0x1000), (2, 0x20_0000)];
        assert_eq!(sentence(large), "block 2: granularity is 4 KiB, but 2 MiB in the base");
        assert_eq!(compare(&here, &table(large), false), Ok(()));
        assert_eq!(sentence(&[(1, 0x1000)]), "block 2 \"ram2\" is not in the base");
        assert_eq!(
            sentence(&[(1, 0x1000), (2, 0x1000), (3, 0x1000)]),
            "block 3 \"ram3\" is only in the base"
        );
    }
}
