// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The block tables of source and destination must be the same.

use crate::error::size;
use crate::memory::BlockTable;

/// A difference between the block tables of source and destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableMismatch {
    /// The numbers of blocks differ.
    #[error("the source has {source_count} blocks, this side {own_count}")]
    Count {
        /// Blocks of the source.
        source_count: usize,
        /// Blocks of this side.
        own_count: usize,
    },
    /// A block is missing here.
    #[error("block {id} \"{name}\" of the source does not exist here")]
    Missing {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A field differs.
    #[error("block {id}: {field} is {theirs} at the source and {own} here")]
    Field {
        /// The block.
        id: u32,
        /// The field.
        field: &'static str,
        /// The source's value.
        theirs: String,
        /// This side's value.
        own: String,
    },
}

impl TableMismatch {
    /// The sentence for the source: the field that differs, and the value of the source. The values
    /// of this side are for its own log and operator only. Otherwise anybody who reaches the port
    /// could read the table field by field.
    pub fn for_source(&self) -> String {
        let here = "the destination's status and log say what it has";
        match self {
            Self::Count { source_count, .. } => {
                format!(
                    "the source has {source_count} blocks, the destination another number: {here}"
                )
            }
            Self::Missing { id, name } => {
                format!("block {id} \"{name}\" of the source does not exist at the destination")
            }
            Self::Field { id, field, theirs, .. } => {
                format!(
                    "block {id}: {field} is {theirs} at the source and differs at the destination: {here}"
                )
            }
        }
    }
}

/// Compares the tables of the source and of this side.
///
/// # Errors
/// The first difference.
pub fn compare_tables(theirs: &BlockTable, own: &BlockTable) -> Result<(), TableMismatch> {
    for block in theirs.blocks() {
        let Some(here) = own.get(block.id) else {
            return Err(TableMismatch::Missing { id: block.id, name: block.name.clone() });
        };
        let hex = |value: u64| format!("{value:#x}");
        let fields = [
            ("name", block.name.clone(), here.name.clone()),
            ("gpa", hex(block.gpa), hex(here.gpa)),
            ("length", size(block.length), size(here.length)),
            ("granularity", size(block.granularity), size(here.granularity)),
        ];
        if let Some((field, theirs, own)) =
            fields.into_iter().find(|(_, theirs, own)| theirs != own)
        {
            return Err(TableMismatch::Field { id: block.id, field, theirs, own });
        }
    }
    let (source_count, own_count) = (theirs.blocks().len(), own.blocks().len());
    if source_count != own_count {
        return Err(TableMismatch::Count { source_count, own_count });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::geometry::test_table as table;

    #[test]
    fn tables_that_differ_are_refused_by_field() {
        let ours = table(&[2, 3]);
        compare_tables(&ours, &ours.clone()).unwrap();
        let longer = compare_tables(&table(&[2, 4]), &ours).unwrap_err();
        assert_eq!(longer.to_string(), "block 1: length is 16 KiB at the source and 12 KiB here");
        assert!(matches!(
            compare_tables(&table(&[2, 3, 1]), &ours),
            Err(TableMismatch::Missing { id: 2, .. })
        ));
        assert!(matches!(
            compare_tables(&table(&[2]), &ours),
            Err(TableMismatch::Count { source_count: 1, own_count: 2 })
        ));
        let told = longer.for_source();
        assert!(
            told.starts_with("block 1: length is 16 KiB at the source") && !told.contains("12 KiB"),
            "{told}"
        );
    }
}
