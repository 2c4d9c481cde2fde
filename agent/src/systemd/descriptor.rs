// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Takes a descriptor that this process inherited, by its number.
#![allow(unsafe_code)]

use rustix::io::{FdFlags, fcntl_setfd};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// A duplicate of the descriptor `number`. The descriptor itself stays open, and is closed in
/// programs that this process starts.
///
/// # Errors
/// If it is not open.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is used only within this function, and only to duplicate it. If it is
    // not open, the kernel says so. If the number is wrong, the caller gets a duplicate of another
    // descriptor, and that one stays as it is.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_setfd(inherited, FdFlags::CLOEXEC)?;
    inherited.try_clone_to_owned()
}

/// Closes all descriptors that this process inherited, but for the three that every process has.
/// To be called before this process opens any.
///
/// # Errors
/// If the kernel refuses.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: no value of this process owns one of these descriptors yet.
    let closed = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if closed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_descriptor_that_is_open_is_duplicated() {
        let (mut reader, writer) = io::pipe().unwrap();
        let duplicate_of = duplicate(writer.as_raw_fd()).unwrap();
        drop(writer);
        std::fs::File::from(duplicate_of).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(duplicate(1 << 30).is_err());
        assert!(duplicate(-1).is_err());
    }
}
