// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The contents of an image besides its pages: the blocks, the base of an increment, and the list
//! of the pieces of the VMM's state.
//!
//! Little-endian numbers one after another:
//!
//! - the number of blocks (4 bytes), and for each its id (4), zero (4), GPA (8), length (8),
//!   granularity (8) and name;
//! - the name of the base, which is an absolute path or one relative to the folder of the image;
//!   empty if there is no base;
//! - the number of pieces of state (4), and for each its length (8) and name.
//!
//! A name is its length (4) and that many bytes of UTF-8. The blocks are in the order of their GPA,
//! which is the order of their pages in the file; any other order is refused.

use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::control::state_pieces::{PieceSize, decode_pieces, encode_pieces};
use crate::memory::geometry::{GeometryError, MAX_BLOCKS, MAX_NAME};
use crate::memory::{BlockGeometry, BlockTable};

/// Longest name of a base in bytes.
pub const MAX_BASE_NAME: usize = 4096;
/// Largest length of the contents in bytes.
pub const MAX_CONTENTS: u64 = 1 << 20;

/// The contents of an image besides its pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// The blocks.
    pub table: BlockTable,
    /// Path of the base when the increment was made; empty if there is none.
    pub base_name: String,
    /// The pieces of the VMM's state.
    pub pieces: Vec<PieceSize>,
}

/// Why bytes are not valid contents.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContentsError {
    /// A field is wrong.
    #[error("contents")]
    Field(#[from] DecodeError),
    /// The blocks are not a valid set.
    #[error("contents")]
    Geometry(#[from] GeometryError),
}

impl Contents {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let block = |encoder: Encoder, block: &BlockGeometry| {
            let encoder = encoder
                .u32(block.id)
                .u32(0)
                .u64(block.gpa)
                .u64(block.length)
                .u64(block.granularity);
            encoder.text(&block.name)
        };
        let encoder = Encoder::new().u32(self.table.blocks().len() as u32);
        let encoder = self.table.blocks().iter().fold(encoder, block);
        encode_pieces(&self.pieces, encoder.text(&self.base_name)).finish()
    }

    /// The contents in these bytes.
    ///
    /// # Errors
    /// The field that is wrong, and its value.
    pub fn decode(bytes: &[u8]) -> Result<Self, ContentsError> {
        let mut decoder = Decoder::new(bytes);
        let count = decoder.u32("blocks")?;
        if count as usize > MAX_BLOCKS {
            return Err(DecodeError::InvalidValue {
                field: "blocks",
                value: count.into(),
                allowed: "at most 512",
            }
            .into());
        }
        let mut table = BlockTable::new();
        for _ in 0..count {
            let id = decoder.u32("id")?;
            decoder.u32("zero")?;
            let (gpa, length) = (decoder.u64("gpa")?, decoder.u64("length")?);
            // The table would sort another order, and the pages would then be at other offsets than
            // those that the writer used.
            if table.blocks().last().is_some_and(|last: &BlockGeometry| gpa < last.gpa) {
                let allowed = "at least that of the block before";
                return Err(DecodeError::InvalidValue { field: "gpa", value: gpa, allowed }.into());
            }
            let granularity = decoder.u64("granularity")?;
            let name = decoder.text("name", MAX_NAME)?.to_owned();
            table.insert(BlockGeometry { id, name, gpa, length, granularity }, MAX_BLOCKS)?;
        }
        let base_name = decoder.text("base name", MAX_BASE_NAME)?.to_owned();
        let pieces = decode_pieces(&mut decoder)?;
        decoder.finish()?;
        Ok(Self { table, base_name, pieces })
    }

    /// Bytes of the VMM's state.
    pub fn state_size(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.length).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::state_pieces::{MAX_PIECE_NAME, MAX_PIECES, MAX_STATE};
    use crate::memory::PAGE_SIZE;
    use crate::memory::geometry::MAX_BLOCK_LENGTH;
    use proptest::prelude::*;
    use std::error::Error;

    /// One block after another, each at some distance from the one before.
    fn table(blocks: Vec<(u64, u64, u32, String)>) -> BlockTable {
        let (mut table, mut gpa) = (BlockTable::new(), 0);
        for ((distance, pages, shift, name), id) in
            blocks.into_iter().zip((0..1000).rev().step_by(7))
        {
            gpa += distance * PAGE_SIZE;
            let (name, length) = (format!("{name}{id}"), pages * PAGE_SIZE);
            let block = BlockGeometry { id, name, gpa, length, granularity: PAGE_SIZE << shift };
            table.insert(block, MAX_BLOCKS).unwrap();
            gpa += length;
        }
        table
    }

    fn any_contents() -> impl Strategy<Value = Contents> {
        let blocks = prop::collection::vec((0u64..3, 1u64..1 << 20, 0u32..20, ".{0,40}"), 0..8);
        let piece =
            (".{0,60}", 0u64..1 << 25).prop_map(|(name, length)| PieceSize { name, length });
        let pieces = prop::collection::vec(piece, 0..8).prop_map(|mut pieces| {
            // No two have one name.
            pieces.sort_by(|one: &PieceSize, other| one.name.cmp(&other.name));
            pieces.dedup_by(|one, other| one.name == other.name);
            pieces
        });
        (blocks, ".{0,80}", pieces).prop_map(|(blocks, base_name, pieces)| Contents {
            table: table(blocks),
            base_name,
            pieces,
        })
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_and_nothing_shorter_or_longer(contents in any_contents(), cut in any::<prop::sample::Index>()) {
            let mut bytes = contents.encode();
            prop_assert_eq!(Contents::decode(&bytes), Ok(contents));
            prop_assert!(Contents::decode(&bytes[..cut.index(bytes.len())]).is_err());
            bytes.push(0);
            let longer = ContentsError::Field(DecodeError::TrailingBytes { extra: 1 });
            prop_assert_eq!(Contents::decode(&bytes), Err(longer));
        }
    }

    /// The sentence below "contents".
    fn refused(bytes: &[u8]) -> String {
        let error = Contents::decode(bytes).unwrap_err();
        assert_eq!(error.to_string(), "contents");
        error.source().unwrap().to_string()
    }

    fn block(id: u32, gpa: u64, name: &str) -> Vec<u8> {
        Encoder::new().u32(id).u32(0).u64(gpa).u64(PAGE_SIZE).u64(PAGE_SIZE).text(name).finish()
    }

    fn blocks(blocks: &[Vec<u8>]) -> Vec<u8> {
        [&(blocks.len() as u32).to_le_bytes()[..], &blocks.concat(), &[0; 8]].concat()
    }

    fn pieces(count: u32, pieces: &[(u64, &str)]) -> Vec<u8> {
        let encoder = Encoder::new().u32(0).text("").u32(count);
        pieces
            .iter()
            .fold(encoder, |encoder, (length, name)| encoder.u64(*length).text(name))
            .finish()
    }

    #[test]
    fn the_bytes_are_those_of_the_example_in_the_documentation() {
        let mut table = BlockTable::new();
        let (ram, rom) = (("ram", 0, 0x40_0000, 0x20_0000), ("rom", 0x40_0000, 0x1000, 0x1000));
        for (id, (name, gpa, length, granularity)) in [(3, ram), (4, rom)] {
            table
                .insert(
                    BlockGeometry { id, name: name.into(), gpa, length, granularity },
                    MAX_BLOCKS,
                )
                .unwrap();
        }
        let pieces = vec![PieceSize { name: "vcpu".into(), length: 5 }];
        let contents = Contents { table, base_name: String::new(), pieces };
        let bytes = [
            &[2, 0, 0, 0][..],
            &[3, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0x40, 0, 0, 0, 0, 0],
            &[0, 0, 0x20, 0, 0, 0, 0, 0],
            b"\x03\0\0\0ram",
            &[4, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0x40, 0, 0, 0, 0, 0],
            &[0, 0x10, 0, 0, 0, 0, 0, 0],
            &[0, 0x10, 0, 0, 0, 0, 0, 0],
            b"\x03\0\0\0rom",
            &[0, 0, 0, 0],
            &[1, 0, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0],
            b"\x04\0\0\0vcpu",
        ]
        .concat();
        assert_eq!(bytes.len(), 0x6a);
        assert_eq!(contents.encode(), bytes);
        assert_eq!(Contents::decode(&bytes), Ok(contents));
    }

    #[test]
    fn numbers_and_names_beyond_the_limits_are_refused_by_field() {
        let long = |limit: usize| "n".repeat(limit + 1);
        let starts = |bytes: &[u8], start: &str| {
            let error = refused(bytes);
            assert!(error.starts_with(start), "{error}");
        };
        starts(&Encoder::new().u32(513).finish(), "blocks is 0x201, allowed: at most 512");
        starts(&blocks(&[block(0, 0, &long(MAX_NAME))]), "name has 256 bytes, allowed are 255");
        starts(
            &Encoder::new().u32(0).text(&long(MAX_BASE_NAME)).finish(),
            "base name has 4097 bytes, allowed are 4096",
        );
        starts(&pieces(1025, &[]), "pieces is 0x401, allowed: at most 1024");
        starts(
            &pieces(1, &[(0, &long(MAX_PIECE_NAME))]),
            "name of a piece has 256 bytes, allowed are 255",
        );
        for lengths in [[MAX_STATE, 1], [7, MAX_STATE - 6], [1, u64::MAX]] {
            let error = format!(
                "length of a piece is {:#x}, allowed: 1 GiB in all pieces together",
                lengths[1]
            );
            starts(&pieces(2, &lengths.map(|length| (length, ""))), &error);
        }
        assert!(Contents::decode(&pieces(2, &[(MAX_STATE - 1, "a"), (1, "b")])).is_ok());
    }

    #[test]
    fn names_that_are_no_text_are_refused_by_field() {
        let invalid = |before: Vec<u8>| refused(&[before, vec![1, 0, 0, 0, 0xff]].concat());
        let mut unnamed = block(0, 0, "");
        unnamed.truncate(unnamed.len() - 4);
        assert_eq!(invalid([vec![1, 0, 0, 0], unnamed].concat()), "name is not UTF-8");
        assert_eq!(invalid(vec![0; 4]), "base name is not UTF-8");
        assert_eq!(
            invalid(Encoder::new().u32(0).text("").u32(1).u64(0).finish()),
            "name of a piece is not UTF-8"
        );
    }

    #[test]
    fn blocks_that_no_guest_has_are_refused() {
        let error = refused(&blocks(&[block(0, 0, "low"), block(0, PAGE_SIZE, "high")]));
        assert_eq!(error, "block 0: the id is taken by block \"low\"");
        let error = refused(&blocks(&[block(0, 1, "odd")]));
        assert_eq!(error, "block 0: gpa 0x1 is not a multiple of the page size 0x1000");
        let error = refused(&blocks(&[block(3, PAGE_SIZE, "high"), block(4, 0, "low")]));
        assert_eq!(error, "gpa is 0x0, allowed: at least that of the block before");
        let error = refused(&blocks(&[block(3, PAGE_SIZE, "one"), block(4, PAGE_SIZE, "other")]));
        assert!(error.starts_with("block 4: 0x1000 + 0x1000 overlaps block 3"), "{error}");
    }

    #[test]
    fn a_count_of_more_than_the_bytes_hold_is_refused_where_they_end() {
        assert_eq!(
            refused(&Encoder::new().u32(512).finish()),
            "body ends in field id: 4 bytes needed, 0 left"
        );
        let one_of_many = [vec![0, 2, 0, 0], block(0, 0, "ram")].concat();
        assert_eq!(refused(&one_of_many), "body ends in field id: 4 bytes needed, 0 left");
        let error = refused(&pieces(1024, &[(5, "vcpu")]));
        assert_eq!(error, "body ends in field length of a piece: 8 bytes needed, 0 left");
        let error = refused(&Encoder::new().u32(0).u32(4096).finish());
        assert_eq!(error, "body ends in field base name: 4096 bytes needed, 0 left");
    }

    #[test]
    fn the_largest_contents_fit() {
        let name = |id: usize, longest: usize| format!("{id:0longest$}");
        let blocks = (0..MAX_BLOCKS).map(|id| BlockGeometry {
            id: id as u32,
            name: name(id, MAX_NAME),
            gpa: id as u64 * MAX_BLOCK_LENGTH,
            length: MAX_BLOCK_LENGTH,
            granularity: 1 << 63,
        });
        let mut table = BlockTable::new();
        blocks.for_each(|block| table.insert(block, MAX_BLOCKS).unwrap());
        let piece = |id| PieceSize {
            name: name(id, MAX_PIECE_NAME),
            length: MAX_STATE / MAX_PIECES as u64,
        };
        let pieces: Vec<PieceSize> = (0..MAX_PIECES).map(piece).collect();
        let contents = Contents { table, base_name: name(0, MAX_BASE_NAME), pieces };
        let bytes = contents.encode();
        assert!(bytes.len() as u64 <= MAX_CONTENTS, "{:#x}", bytes.len());
        assert_eq!(contents.state_size(), MAX_STATE);
        assert_eq!(Contents::decode(&bytes), Ok(contents));
    }
}
