// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pieces of the VMM's state and their files.
//!
//! An image has the state of the VMM in pieces with names. An import reads each piece from a file.
//! An export writes each to a new file, which gets its name only when all files are complete.

use super::error::{PieceFault, RawError};
use crate::image::Chain;
use crate::image::bytes::write_at;
use crate::image::error::kernel;
use crate::image::new_file::{FileKind, NewFile};
use crate::opener;
use pageferry_protocol::control::state_pieces::{MAX_PIECE_NAME, MAX_PIECES, MAX_STATE, PieceSize};
use rustix::fs::MemfdFlags;
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

/// A piece of the VMM's state, and its file outside of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its name in the image.
    pub name: String,
    /// The file with its bytes.
    pub path: PathBuf,
}

/// Reads pieces into a file in memory, one after another.
pub(super) fn read_pieces(pieces: &[Piece]) -> Result<(Vec<PieceSize>, OwnedFd), RawError> {
    let state = rustix::fs::memfd_create("pageferry-state", MemfdFlags::CLOEXEC);
    let state =
        state.map_err(kernel("keep the state of the VMM in memory")).map_err(RawError::Kernel)?;
    let (mut sizes, mut names, mut end) = (Vec::new(), BTreeSet::new(), 0u64);
    for Piece { name, path } in pieces {
        let mut add = || {
            if name.len() > MAX_PIECE_NAME {
                return Err(PieceFault::Name { length: name.len() });
            }
            if !names.insert(name) {
                return Err(PieceFault::DuplicateName);
            }
            if sizes.len() == MAX_PIECES {
                return Err(PieceFault::TooMany);
            }
            let bytes = opener::read(path, MAX_STATE as usize).map_err(PieceFault::Read)?;
            let length = bytes.len() as u64;
            if end + length > MAX_STATE {
                return Err(PieceFault::TooLarge);
            }
            write_at(state.as_fd(), &bytes, end)?;
            end += length;
            sizes.push(PieceSize { name: name.clone(), length });
            Ok(())
        };
        add().map_err(|fault| fault.of(name, path))?;
    }
    Ok((sizes, state))
}

/// Writes pieces of the newest image of the chain to files that have no names yet, and syncs them.
/// With `replace`, a file may replace any other that is not an image or another file of pageferry.
pub(super) fn write_pieces(
    chain: &Chain, pieces: &[Piece], replace: bool,
) -> Result<Vec<NewFile>, RawError> {
    if pieces.is_empty() {
        return Ok(Vec::new());
    }
    let state = chain.newest().state()?;
    let write = |Piece { name, path }: &Piece| {
        let write = || {
            let bytes = find(chain, name)?;
            let file = NewFile::create(path, FileKind::STATE, replace)?;
            write_at(file.as_fd(), &state[bytes], 0)?;
            file.sync()?;
            Ok(file)
        };
        write().map_err(|fault: PieceFault| fault.of(name, path))
    };
    pieces.iter().map(write).collect()
}

/// The bytes of the piece `name` in the VMM's state.
fn find(chain: &Chain, name: &str) -> Result<Range<usize>, PieceFault> {
    let pieces = &chain.newest().contents().pieces;
    let mut start = 0;
    for piece in pieces {
        let end = start + piece.length as usize;
        if piece.name == name {
            return Ok(start..end);
        }
        start = end;
    }
    let names: Vec<String> = pieces.iter().map(|piece| format!("{:?}", piece.name)).collect();
    Err(PieceFault::NotInImage { names: names.join(", ") })
}
