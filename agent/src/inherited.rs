// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptors that this process inherited, and those that its next program inherits.
//!
//! A process that executes another program hands descriptors over by variables: the process and the
//! number. A program that inherits the variable alone is another process, and ignores it.
#![allow(unsafe_code)]

use rustix::io::{FdFlags, fcntl_setfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

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

/// Lets the program have the descriptor that this process executes next. Returns the value of a
/// variable by which [`handed_over`] finds it there.
///
/// # Errors
/// If the kernel refuses.
pub fn hand_over(fd: impl AsFd) -> io::Result<String> {
    let fd = fd.as_fd();
    fcntl_setfd(fd, FdFlags::empty())?;
    Ok(format!("{}:{}", std::process::id(), fd.as_raw_fd()))
}

/// A duplicate of the descriptor that this process has handed over by this variable, before it
/// executed this program. `None` if it has not.
///
/// # Errors
/// If the descriptor is not open.
pub fn handed_over(variable: &str) -> io::Result<Option<OwnedFd>> {
    let value = std::env::var(variable).ok();
    value.as_deref().and_then(own).map(duplicate).transpose()
}

/// The number in the value of a variable, if it is one of this process.
fn own(value: &str) -> Option<RawFd> {
    let (process, number) = value.split_once(':')?;
    (process.parse() == Ok(std::process::id())).then(|| number.parse().ok())?
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

    #[test]
    fn a_variable_of_another_process_is_ignored() {
        let (reader, _writer) = io::pipe().unwrap();
        let value = hand_over(&reader).unwrap();
        assert_eq!(own(&value), Some(reader.as_raw_fd()));
        let id = std::process::id();
        for value in [format!("{}:7", id + 1), format!("{id}"), format!("{id}:x"), String::new()] {
            assert_eq!(own(&value), None, "{value}");
        }
        assert!(handed_over("PAGEFERRY_NO_SUCH_VARIABLE").unwrap().is_none());
    }
}
