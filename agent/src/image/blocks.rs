//! Two sets of blocks that are to be the same: those of a VMM and of an image, or of an increment
//! and of its base.

use pageferry_protocol::memory::BlockTable;

/// How two sets of blocks differ, of which one is here and the other that of a base.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// A block of the other is not here.
    #[error("block {id} \"{name}\" is in the base alone")]
    Missing {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A block that is here is not in the other.
    #[error("block {id} \"{name}\" is not in the base")]
    Surplus {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A block is another.
    #[error("block {id}: {field} is {here}, and {there} in the base")]
    Field {
        /// The block.
        id: u32,
        /// What differs.
        field: &'static str,
        /// As it is here.
        here: String,
        /// As it is in the other.
        there: String,
    },
}

/// Compares two sets of blocks: names, places and lengths; with `all` also what discards are
/// rounded to, of which a guest does not know.
///
/// # Errors
/// The first difference.
pub fn compare(here: &BlockTable, there: &BlockTable, all: bool) -> Result<(), Difference> {
    for block in there.blocks() {
        let (id, name) = (block.id, block.name.clone());
        let Some(own) = here.get(id) else { return Err(Difference::Missing { id, name }) };
        let hex = |value: u64| format!("{value:#x}");
        let quoted = |name: &String| format!("{name:?}");
        let fields = [
            ("name", quoted(&own.name), quoted(&name)),
            ("gpa", hex(own.gpa), hex(block.gpa)),
            ("length", hex(own.length), hex(block.length)),
            ("granularity", hex(own.granularity), hex(block.granularity)),
        ];
        let compared = if all { fields.len() } else { fields.len() - 1 };
        let mut compared = fields.into_iter().take(compared);
        if let Some((field, here, there)) = compared.find(|(_, here, there)| here != there) {
            return Err(Difference::Field { id, field, here, there });
        }
    }
    match here.blocks().iter().find(|block| there.get(block.id).is_none()) {
        Some(block) => Err(Difference::Surplus { id: block.id, name: block.name.clone() }),
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
    fn a_difference_from_a_base_is_named_by_block_field_and_values() {
        let here = table(&[(1, 0x1000), (2, 0x1000)]);
        let sentence = |there| compare(&here, &table(there), true).unwrap_err().to_string();
        assert_eq!(compare(&here, &here, true), Ok(()));
        let large = &[(1, 0x1000), (2, 0x20_0000)];
        assert_eq!(sentence(large), "block 2: granularity is 0x1000, and 0x200000 in the base");
        assert_eq!(compare(&here, &table(large), false), Ok(()));
        assert_eq!(sentence(&[(1, 0x1000)]), "block 2 \"ram2\" is not in the base");
        assert_eq!(
            sentence(&[(1, 0x1000), (2, 0x1000), (3, 0x1000)]),
            "block 3 \"ram3\" is in the base alone"
        );
    }
}
