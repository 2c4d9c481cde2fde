//! What an image holds, apart from its pages: the blocks, the base of an increment, and the pieces of the VMM's state.
//!
//! Little-endian numbers one after another: the number of blocks (4 bytes), and for each its id (4), zero (4), GPA (8), length (8), granularity (8) and name; the
//! base's name; the number of pieces of state (4), and for each its length (8) and name. A name is its length (4) and that many bytes of UTF-8. The blocks are in the
//! order of their GPA, which is that of their pages in the file. The base's name is a path from the image's own folder, or one from the root; empty if there is none.

use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::control::hook::{MAX_PIECE_NAME, MAX_PIECES, MAX_STATE, PieceSize};
use crate::memory::geometry::{GeometryError, MAX_BLOCKS, MAX_NAME};
use crate::memory::{BlockGeometry, BlockTable};

/// Longest name of a base in bytes.
pub const MAX_BASE_NAME: usize = 4096;
/// Most bytes of the contents.
pub const MAX_CONTENTS: u64 = 1 << 20;

/// What an image holds, apart from its pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// The blocks.
    pub table: BlockTable,
    /// Where the base was when the increment was made; empty if there is none.
    pub base_name: String,
    /// The VMM's state.
    pub pieces: Vec<PieceSize>,
}

/// Why bytes are not the contents of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContentsError {
    /// A field is wrong.
    #[error("contents")]
    Field(#[from] DecodeError),
    /// The blocks are no valid set.
    #[error("contents")]
    Geometry(#[from] GeometryError),
}

impl Contents {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let block = |encoder: Encoder, block: &BlockGeometry| {
            let encoder = encoder.u32(block.id).u32(0).u64(block.gpa).u64(block.length).u64(block.granularity);
            encoder.text(&block.name)
        };
        let encoder = Encoder::new().u32(self.table.blocks().len() as u32);
        let encoder = self.table.blocks().iter().fold(encoder, block);
        let encoder = encoder.text(&self.base_name).u32(self.pieces.len() as u32);
        let piece = |encoder: Encoder, piece: &PieceSize| encoder.u64(piece.length).text(&piece.name);
        self.pieces.iter().fold(encoder, piece).finish()
    }

    /// The contents in these bytes.
    ///
    /// # Errors
    /// The field that is wrong, and its value.
    pub fn decode(bytes: &[u8]) -> Result<Self, ContentsError> {
        let mut decoder = Decoder::new(bytes);
        let count = decoder.u32("blocks")?;
        if count as usize > MAX_BLOCKS {
            return Err(DecodeError::Value { field: "blocks", value: count.into(), allowed: "at most 512" }.into());
        }
        let mut table = BlockTable::new();
        for _ in 0..count {
            let id = decoder.u32("id")?;
            decoder.u32("zero")?;
            let (gpa, length) = (decoder.u64("gpa")?, decoder.u64("length")?);
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

fn decode_pieces(decoder: &mut Decoder<'_>) -> Result<Vec<PieceSize>, DecodeError> {
    let count = decoder.u32("pieces")?;
    if count as usize > MAX_PIECES {
        return Err(DecodeError::Value { field: "pieces", value: count.into(), allowed: "at most 1024" });
    }
    let mut total = 0u64;
    let mut piece = |_| {
        let length = decoder.u64("length of a piece")?;
        total = total.saturating_add(length);
        if total > MAX_STATE {
            let allowed = "1 GiB in all pieces together";
            return Err(DecodeError::Value { field: "length of a piece", value: length, allowed });
        }
        Ok(PieceSize { name: decoder.text("name of a piece", MAX_PIECE_NAME)?.to_owned(), length })
    };
    (0..count).map(&mut piece).collect()
}
