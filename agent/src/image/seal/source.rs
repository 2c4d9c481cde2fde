// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the operator's key is read from: a file, or a descriptor that this process inherited.
//!
//! A key is never an argument or a variable: other processes of the host can read those. A file
//! must be one that only its owner may read. If root owns it, its group may read it, too: so the
//! service manager shows a service's credential to the user of that service.
//!
//! A descriptor of a file is read from the start of the file, so a VMM can start one agent after
//! another with the same descriptor. A pipe is read until its other end is closed, and only once.

use super::key::{DIGITS_TEXT, ImageKey, MAX_FILE};
use crate::inherited::duplicate;
use crate::opener;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot {what}")]
    Read {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The path is that of a folder, a pipe or a device.
    #[error("it is no regular file (fd:N names a pipe or a file that is open)")]
    NotAFile,
    /// Others may read it.
    #[error(
        "it has mode {mode:03o} and belongs to user {owner}, but nobody except its owner may read \
         a key (chmod 600), or the group of one that root owns (chmod 640)"
    )]
    IsOpen {
        /// Its permissions.
        mode: u32,
        /// Its owner.
        owner: u32,
    },
    /// It is too short or too long.
    #[error(
        "it has {} bytes, but a key is 32 bytes, or {DIGITS_TEXT}",
        if *found > MAX_FILE { format!("more than {MAX_FILE}") } else { found.to_string() }
    )]
    Length {
        /// Bytes that were found. Reading ends after one that is too many.
        found: usize,
    },
    /// It has the length of hexadecimal digits, and is something else.
    #[error("digit {at} is none of 0 to 9 and a to f, counted from 0")]
    NotHex {
        /// Where.
        at: usize,
    },
    /// Somebody has not written it yet.
    #[error("all of its bytes are zero, which is no secret")]
    Zero,
}

/// A file or a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// The file at a path.
    File(PathBuf),
    /// A descriptor that is open.
    Descriptor(RawFd),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Descriptor(number) => write!(f, "fd:{number}"),
        }
    }
}

impl KeySource {
    /// The source that an operator names: `fd:N`, or a path.
    ///
    /// # Errors
    /// If the number of the descriptor is none, or the path is empty.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("fd:") {
            Some(number) => match number.parse::<RawFd>() {
                Ok(number) if number >= 0 => Ok(Self::Descriptor(number)),
                _ => Err(format!("{number:?} is no number of a descriptor: fd:3, for example")),
            },
            None if text.is_empty() => Err("it is empty: name a file, or fd:N".into()),
            None => Ok(Self::File(text.into())),
        }
    }

    /// Reads the key.
    ///
    /// # Errors
    /// If it cannot be read, others may read it, or it is no key.
    pub fn read(&self) -> Result<ImageKey, KeyError> {
        match self {
            Self::File(path) => read_file(path),
            Self::Descriptor(number) => {
                let failed = |source| KeyError::Read { what: "use the descriptor", source };
                read_open(&duplicate(*number).map_err(failed)?)
            }
        }
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> KeyError {
    move |errno| KeyError::Read { what, source: errno.into() }
}

fn read_file(path: &Path) -> Result<ImageKey, KeyError> {
    // Does not wait for the other end of a pipe.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = opener::open(path, flags, Mode::empty()).map_err(failed("open it"))?;
    check_file(&rustix::fs::fstat(&file).map_err(failed("look at it"))?)?;
    read_open(&file)
}

/// Refuses a file that others may read.
fn check_file(stat: &Stat) -> Result<(), KeyError> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(KeyError::NotAFile);
    }
    let (mode, owner) = (stat.st_mode & 0o777, stat.st_uid);
    let allowed = if owner == 0 { 0o740 } else { 0o700 };
    if mode & !allowed != 0 { Err(KeyError::IsOpen { mode, owner }) } else { Ok(()) }
}

/// Reads the key from an open file, or from a pipe until its other end is closed.
pub(super) fn read_open(file: &OwnedFd) -> Result<ImageKey, KeyError> {
    // One byte more than a key has, to find out about a longer file.
    let mut content = Zeroizing::new([0; MAX_FILE + 1]);
    let mut length = 0;
    while length < content.len() {
        let rest = &mut content[length..];
        let read = match rustix::io::pread(file, &mut *rest, length as u64) {
            Err(Errno::SPIPE) => rustix::io::read(file, rest),
            read => read,
        };
        match read {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("read it")(errno)),
        }
    }
    ImageKey::parse(&content[..length])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;

    const DIGITS: &[u8] = b"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n";

    fn refused(source: &KeySource) -> String {
        crate::error::chain(&source.read().unwrap_err())
    }

    #[test]
    fn a_source_is_a_path_or_a_descriptor() {
        assert_eq!(KeySource::parse("fd:7"), Ok(KeySource::Descriptor(7)));
        assert_eq!(KeySource::parse("fd/7"), Ok(KeySource::File("fd/7".into())));
        for wrong in ["fd:", "fd:-1", "fd:x", "fd:99999999999", ""] {
            KeySource::parse(wrong).unwrap_err();
        }
        assert_eq!(KeySource::parse("fd:7").unwrap().to_string(), "fd:7");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_with_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, DIGITS).unwrap();
        let source = KeySource::File(path.clone());
        let with = |mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            source.read()
        };
        with(0o600).unwrap();
        with(0o400).unwrap();
        for mode in [0o604, 0o644, 0o660, 0o602, 0o610] {
            with(mode).unwrap_err();
            let said = refused(&source);
            assert!(said.starts_with(&format!("it has mode {mode:03o} and belongs to")), "{said}");
        }
        let mut stat = rustix::fs::stat(&path).unwrap();
        for (owner, mode, is_fine) in [(0, 0o440, true), (1000, 0o440, false), (0, 0o444, false)] {
            (stat.st_uid, stat.st_mode) = (owner, 0o100_000 | mode);
            assert_eq!(check_file(&stat).is_ok(), is_fine, "{owner} {mode:o}");
        }
    }

    #[test]
    fn a_file_that_is_missing_or_no_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = KeySource::File(folder.path().join("missing"));
        assert!(refused(&missing).starts_with("cannot open it: No such file"));
        assert!(refused(&KeySource::File(folder.path().into())).starts_with("it is no regular"));
        assert!(refused(&KeySource::Descriptor(1 << 30)).starts_with("cannot use the descriptor"));
    }

    #[test]
    fn a_long_file_is_not_read_whole() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'a'; 5000]).unwrap();
        let said = refused(&KeySource::Descriptor(file.as_raw_fd()));
        assert!(said.starts_with("it has more than 65 bytes, but a key is"), "{said}");
    }

    #[test]
    fn a_descriptor_of_a_file_is_read_from_its_start_each_time() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(DIGITS).unwrap();
        let source = KeySource::Descriptor(file.as_raw_fd());
        assert_eq!(source.read().unwrap().bytes(), source.read().unwrap().bytes());
    }

    #[test]
    fn a_pipe_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&DIGITS[..20]).unwrap();
        let rest = std::thread::spawn(move || writer.write_all(&DIGITS[20..]));
        let key = KeySource::Descriptor(reader.as_raw_fd()).read().unwrap();
        assert_eq!(key.bytes()[..2], [0, 0x11]);
        rest.join().unwrap().unwrap();
        // Nothing is left.
        assert!(refused(&KeySource::Descriptor(reader.as_raw_fd())).starts_with("it has 0 bytes"));
    }
}
