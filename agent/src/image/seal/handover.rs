// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The key on its way to the next program of this process, when the agent is upgraded.
//!
//! The next program has the same arguments. But the file that they name may be gone or hold another
//! key by now, and a pipe is empty. A lazy restore that goes on needs the key with which it began.
//! So this program leaves the key in a file in memory, and the next one reads it before it looks at
//! its arguments. A variable has the process and the number of the descriptor, not the key. A
//! program that inherits the variable is another process, and ignores it.

use super::key::ImageKey;
use super::source::{KeyError, read_open};
use crate::systemd::descriptor::duplicate;
use rustix::fs::MemfdFlags;
use rustix::io::{FdFlags, fcntl_setfd};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// The variable: the process, and the descriptor.
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
        fcntl_setfd(&self.0, FdFlags::empty())?;
        Ok((VARIABLE, format!("{}:{}", std::process::id(), self.0.as_raw_fd())))
    }
}

/// The key that this process had before it executed this program; `None` if it had none. The file
/// in memory is emptied.
///
/// # Errors
/// If the descriptor in the variable has no key.
pub fn kept() -> Result<Option<ImageKey>, KeyError> {
    let value = std::env::var(VARIABLE).ok();
    value.as_deref().and_then(own).map(take).transpose()
}

/// The descriptor in a value of the variable, if it is of this process.
fn own(value: &str) -> Option<RawFd> {
    let (process, number) = value.split_once(':')?;
    (process.parse() == Ok(std::process::id())).then(|| number.parse().ok())?
}

fn take(number: RawFd) -> Result<ImageKey, KeyError> {
    let unusable = |source| KeyError::Read { what: "use the descriptor", source };
    let file = duplicate(number).map_err(unusable)?;
    let key = read_open(&file)?;
    let emptied = rustix::fs::ftruncate(&file, 0);
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
        let (name, value) = kept.inherit().unwrap();
        assert_eq!(name, VARIABLE);
        let number = own(&value).unwrap();
        assert_eq!(take(number).unwrap().bytes(), key.bytes());
        assert!(matches!(take(number), Err(KeyError::Length { found: 0 })));
    }

    #[test]
    fn a_variable_of_another_process_is_ignored() {
        let id = std::process::id();
        assert_eq!(own(&format!("{id}:7")), Some(7));
        for value in [format!("{}:7", id + 1), format!("{id}"), format!("{id}:x"), String::new()] {
            assert_eq!(own(&value), None, "{value}");
        }
    }
}
