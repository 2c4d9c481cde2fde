// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is wrong with a raw file, or with a file of the VMM's state.

use super::layout::LayoutError;
use crate::image::{ImageError, ImageFault};
use pageferry_protocol::control::state_pieces::{MAX_PIECE_NAME, MAX_PIECES, MAX_STATE};
use std::path::{Path, PathBuf};

/// Why an import or an export failed.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// The image cannot be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A system call failed that is not about a file.
    #[error(transparent)]
    Kernel(ImageFault),
    /// The raw file cannot be read or written, or does not have the layout.
    #[error("memory file {}", path.display())]
    File {
        /// The raw file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        fault: RawFault,
    },
    /// A piece of the VMM's state cannot be read or written.
    #[error("state {name:?}, file {}", path.display())]
    Piece {
        /// Name of the piece.
        name: String,
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        fault: Box<PieceFault>,
    },
}

/// What is wrong with a raw file.
#[derive(Debug, thiserror::Error)]
pub enum RawFault {
    /// A system call failed, the file is truncated, or it may not be replaced.
    #[error(transparent)]
    Io(#[from] ImageFault),
    /// The layout is not possible, or does not fit the image.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The file is shorter or longer than its layout.
    #[error("the file has {found:#x} bytes, but this layout needs exactly {expected:#x}")]
    Length {
        /// Length of the file in bytes.
        found: u64,
        /// Length of the layout in bytes.
        expected: u64,
    },
    /// The file was changed during the import, so the image would show no instant of the guest.
    #[error(
        "the file was changed while it was read: pause or end whatever writes to it, and try again"
    )]
    Changed,
}

/// What is wrong with a piece of the VMM's state.
#[derive(Debug, thiserror::Error)]
pub enum PieceFault {
    /// The file cannot be read.
    #[error("cannot read it")]
    Read(#[source] std::io::Error),
    /// The file cannot be written, or may not be replaced.
    #[error(transparent)]
    Io(#[from] ImageFault),
    /// The name is too long.
    #[error("its name has {length} bytes, allowed are at most {MAX_PIECE_NAME}")]
    Name {
        /// Length of the name in bytes.
        length: usize,
    },
    /// Another piece has the name.
    #[error("another piece of state has this name")]
    DuplicateName,
    /// There are too many pieces.
    #[error("there are more than {MAX_PIECES} pieces of state")]
    TooMany,
    /// The pieces are too large.
    #[error("all pieces of state together have more than {MAX_STATE:#x} bytes")]
    TooLarge,
    /// Another file of the same export has the path.
    #[error("another file of this export has the same path")]
    SamePath,
    /// The image has no such piece.
    #[error("the image has no such state, but: {}", if names.is_empty() { "none" } else { names })]
    NotInImage {
        /// The names of the pieces that it has.
        names: String,
    },
}

impl RawFault {
    /// The fault with the path of the raw file.
    pub fn of(self, path: &Path) -> RawError {
        RawError::File { path: path.to_owned(), fault: self }
    }
}

impl PieceFault {
    /// The fault with the name and the path of the piece.
    pub(super) fn of(self, name: &str, path: &Path) -> RawError {
        RawError::Piece { name: name.to_owned(), path: path.to_owned(), fault: Box::new(self) }
    }
}
