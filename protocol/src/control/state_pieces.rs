// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The list of the pieces in which a VMM saves its state.
//!
//! The pieces themselves lie one after another in a file. The list has their names and lengths. It
//! travels with the hooks that save and load the state, and stands in every image.

use super::codec::{DecodeError, Decoder, Encoder};
use std::collections::BTreeSet;

/// Largest number of pieces of state.
pub const MAX_PIECES: usize = 1024;
/// Longest name of a piece of state in bytes.
pub const MAX_PIECE_NAME: usize = 255;
/// Largest number of bytes of state in all pieces together: 1 GiB.
pub const MAX_STATE: u64 = 1 << 30;

/// A piece of the state of the VMM: its name, and its length in the file that comes with the frame.
/// The pieces lie one after another in that file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceSize {
    /// Chosen by the VMM.
    pub name: String,
    /// Length in bytes.
    pub length: u64,
}

/// The list as it travels and as it stands in an image: the number of pieces (4 bytes), and for
/// each its length (8) and name.
pub(crate) fn encode_pieces(pieces: &[PieceSize], encoder: Encoder) -> Encoder {
    pieces.iter().fold(encoder.u32(pieces.len() as u32), |encoder, piece| {
        encoder.u64(piece.length).text(&piece.name)
    })
}

/// Decodes what [`encode_pieces`] wrote.
///
/// # Errors
/// The field that is wrong, and its value.
pub(crate) fn decode_pieces(decoder: &mut Decoder<'_>) -> Result<Vec<PieceSize>, DecodeError> {
    let count = decoder.u32("pieces")?;
    if count as usize > MAX_PIECES {
        return Err(DecodeError::InvalidValue {
            field: "pieces",
            value: count.into(),
            allowed: "at most 1024",
        });
    }
    let (mut total, mut names) = (0u64, BTreeSet::new());
    let mut piece = |_| {
        let length = decoder.u64("length of a piece")?;
        total = total.saturating_add(length);
        if total > MAX_STATE {
            let allowed = "1 GiB in all pieces together";
            return Err(DecodeError::InvalidValue {
                field: "length of a piece",
                value: length,
                allowed,
            });
        }
        let name = decoder.text("name of a piece", MAX_PIECE_NAME)?;
        // A VMM finds its pieces by their names.
        if !names.insert(name) {
            return Err(DecodeError::Duplicate {
                field: "name of a piece",
                value: name.to_owned(),
            });
        }
        Ok(PieceSize { name: name.to_owned(), length })
    };
    (0..count).map(&mut piece).collect()
}
