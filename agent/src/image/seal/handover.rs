// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The key on its way to the next program of this process, when the agent is upgraded.
//!
//! The next program has the same arguments. But the file that they name may be gone or hold another
//! key by now, and a pipe is empty. A lazy restore that goes on needs the key with which it began.
//! So this program leaves the key in a file in memory, and the next one reads it before it looks at
//! its arguments.

use super::key::ImageKey;
use super::source::{KeyError, read_open};
use crate::inherited::{hand_over, handed_over};
use rustix::fs::MemfdFlags;
use std::io;
use std::os::fd::OwnedFd;

/// The variable by which the next program finds the file.
pub const VARIABLE: &str = "PAGEFERRY_IMAGE_KEY_FD";

/// A key for the next program of this process.
#[derive(Debug)]
pub struct KeptKey(OwnedFd);

impl KeptKey {
    /// Keeps `key` in a file that only this process has.
    ///
    /// # Errors
    /// If the kernel has no memory for it.
    pub fn new(key: &ImageKey) -> io::Result<Self> {
        let file = rustix::fs::memfd_create("pageferry-image-key", MemfdFlags::CLOEXEC)?;
        // A few bytes are written to memory as a whole, or not at all.
        match rustix::io::pwrite(&file, key.bytes(), 0)? {
            written if written == key.bytes().len() => Ok(Self(file)),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Lets the program have it that this process executes next. Returns the variable for it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn inherit(&self) -> io::Result<(&'static str, String)> {
        Ok((VARIABLE, hand_over(&self.0)?))
    }
}

/// The key that this process had before it executed this program; `None` if it had none. The file
/// in memory is emptied.
///
/// # Errors
/// If the descriptor in the variable has no key.
pub fn kept() -> Result<Option<ImageKey>, KeyError> {
    let file = handed_over(VARIABLE);
    let file = file.map_err(|source| KeyError::Read { what: "use the descriptor", source })?;
    file.as_ref().map(take).transpose()
}

fn take(file: &OwnedFd) -> Result<ImageKey, KeyError> {
    let key = read_open(file)?;
    let emptied = rustix::fs::ftruncate(file, 0);
    emptied.map_err(|errno| KeyError::Read { what: "empty it", source: errno.into() })?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_program_reads_the_key_once() {
        let key = ImageKey::parse(&[9; 32]).unwrap();
        let kept = KeptKey::new(&key).unwrap();
        assert_eq!(take(&kept.0).unwrap().bytes(), key.bytes());
        assert!(matches!(take(&kept.0), Err(KeyError::Length { found: 0 })));
    }
}
