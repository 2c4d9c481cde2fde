// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks of single pieces of a file, among processes.
//!
//! A piece is locked by the byte with its number in a file (`F_OFD_SETLK`). The kernel gives a lock
//! up with the process that has it, however that ends.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// The file with the locks. Locks of one value never exclude each other: its owner keeps its own
/// threads apart.
#[derive(Debug)]
pub struct PieceLocks(OwnedFd);

impl PieceLocks {
    /// The locks in `file`, which no other value of this process has open.
    pub fn new(file: OwnedFd) -> Self {
        Self(file)
    }

    /// Locks a piece; false if another process has it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn try_lock(&self, piece: u64) -> io::Result<bool> {
        match self.set(piece, libc::F_WRLCK) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives a piece up.
    pub fn unlock(&self, piece: u64) {
        if let Err(error) = self.set(piece, libc::F_UNLCK) {
            log::warn!("piece {piece} stays locked until this process ends: {error}");
        }
    }

    fn set(&self, piece: u64, kind: libc::c_int) -> io::Result<()> {
        let mut lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: piece.cast_signed(),
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open as long as this value, and the kernel reads and writes
        // only the structure, which lives until the call returns.
        let set =
            unsafe { libc::fcntl(self.0.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_locked_once_and_only_that_piece() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path.path());
            PieceLocks::new(file.unwrap().into())
        };
        let (one, other) = (open(), open());
        assert!(one.try_lock(7).unwrap() && !other.try_lock(7).unwrap());
        assert!(other.try_lock(8).unwrap() && !one.try_lock(8).unwrap());
        one.unlock(7);
        assert!(other.try_lock(7).unwrap());
        drop(other);
        assert!(one.try_lock(7).unwrap() && one.try_lock(8).unwrap());
    }
}
