// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the VMM as it travels: a memfd with the pieces one after another, and a list of
//! their names and lengths.

use super::api::StatePiece;
use super::error::HookError;
use pageferry_protocol::control::state_pieces::{MAX_PIECE_NAME, MAX_PIECES, MAX_STATE, PieceSize};
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::{Errno, pread, pwrite};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Writes the pieces into a file, if they are within the limits of the protocol.
pub(super) fn write_pieces(pieces: &[StatePiece]) -> Result<(Vec<PieceSize>, OwnedFd), HookError> {
    if pieces.len() > MAX_PIECES {
        return Err(HookError::new(format!(
            "{} pieces of state, allowed are {MAX_PIECES}",
            pieces.len()
        )));
    }
    let total: u64 = pieces.iter().map(|piece| piece.bytes.len() as u64).sum();
    if total > MAX_STATE {
        return Err(HookError::new(format!(
            "{total:#x} bytes of state, allowed are {MAX_STATE:#x}"
        )));
    }
    let file = memfd_create("pageferry-state", MemfdFlags::CLOEXEC)?;
    let mut offset = 0;
    let mut sizes = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if piece.name.len() > MAX_PIECE_NAME {
            let length = piece.name.len();
            return Err(HookError::new(format!(
                "name of a piece of {length} bytes, allowed are {MAX_PIECE_NAME}"
            )));
        }
        write_all(&file, &piece.bytes, offset)?;
        let length = piece.bytes.len() as u64;
        offset += length;
        sizes.push(PieceSize { name: piece.name.clone(), length });
    }
    Ok((sizes, file))
}

/// Reads the pieces from a file. The lengths are within the limits of the protocol. The length of
/// the file is checked before anything is allocated.
pub(super) fn read_pieces(
    sizes: Vec<PieceSize>, file: BorrowedFd<'_>,
) -> Result<Vec<StatePiece>, HookError> {
    let total: u64 = sizes.iter().map(|piece| piece.length).sum();
    let size = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
    if total > size {
        return Err(HookError::new(format!(
            "pieces of {total:#x} bytes in a file of {size:#x} bytes"
        )));
    }
    let mut offset = 0;
    let mut pieces = Vec::with_capacity(sizes.len());
    for PieceSize { name, length } in sizes {
        let mut bytes = vec![0; usize::try_from(length)?];
        read_exact(file, &mut bytes, offset)?;
        offset += length;
        pieces.push(StatePiece { name, bytes });
    }
    Ok(pieces)
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> Result<(), HookError> {
    while !bytes.is_empty() {
        match pwrite(file, bytes, offset) {
            Ok(0) => return Err(HookError::new("the file of the state takes no more")),
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn read_exact(
    file: BorrowedFd<'_>, mut bytes: &mut [u8], mut offset: u64,
) -> Result<(), HookError> {
    while !bytes.is_empty() {
        match pread(file, &mut *bytes, offset) {
            Ok(0) => {
                return Err(HookError::new(format!("the file of the state ends at {offset:#x}")));
            }
            Ok(read) => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn piece(name: &str, bytes: &[u8]) -> StatePiece {
        StatePiece { name: name.to_owned(), bytes: bytes.to_vec() }
    }

    #[test]
    fn pieces_come_back_as_they_were() {
        let pieces = vec![piece("vcpu0", &[1; 5000]), piece("", &[]), piece("net", b"state")];
        let (sizes, file) = write_pieces(&pieces).unwrap();
        assert_eq!(read_pieces(sizes, file.as_fd()).unwrap(), pieces);
    }

    #[test]
    fn no_pieces_are_fine() {
        let (sizes, file) = write_pieces(&[]).unwrap();
        assert_eq!(read_pieces(sizes, file.as_fd()).unwrap(), []);
    }

    #[test]
    fn what_is_over_a_limit_is_refused_with_the_number() {
        let many = vec![piece("x", &[]); MAX_PIECES + 1];
        assert!(write_pieces(&many).unwrap_err().sentence().contains("1025 pieces"));
        let long = [piece(&"x".repeat(256), &[])];
        assert!(write_pieces(&long).unwrap_err().sentence().contains("256 bytes"));
    }

    #[test]
    fn a_short_file_is_refused_before_anything_is_allocated() {
        let (_, file) = write_pieces(&[piece("a", &[1; 100])]).unwrap();
        let lying = vec![PieceSize { name: "a".into(), length: MAX_STATE }];
        let error = read_pieces(lying, file.as_fd()).unwrap_err();
        assert!(
            error.sentence().contains("0x40000000") && error.sentence().contains("0x64"),
            "{error:?}"
        );
    }
}
