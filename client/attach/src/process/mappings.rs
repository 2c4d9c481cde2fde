// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a process maps: `/proc/PID/maps`, and the descriptors that the mappings come from.
//!
//! The file is described in `Documentation/filesystems/proc.rst`. It is a snapshot: the process can
//! map and unmap at any time.

use super::target::{ProcessError, TargetProcess};
use rustix::fs::{AtFlags, Dev, Dir, Mode, OFlags, major, makedev, minor};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A line that is not as documented.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the mappings is malformed: \"{text}\"")]
pub struct MalformedLine {
    /// Its number; the first is 1.
    pub line: usize,
    /// Its beginning.
    pub text: String,
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The address after its last.
    pub end: u64,
    /// Others who map the file see what is written here (`MAP_SHARED`).
    pub shared: bool,
    /// It can be written.
    pub writable: bool,
    /// Offset in the file in bytes.
    pub offset: u64,
    /// Device of the file; 0 if there is no file.
    ///
    /// It is the device of the file system. stat(2) reports another one for a file on btrfs.
    pub device: Dev,
    /// Inode of the file; 0 if there is no file.
    pub inode: u64,
    /// The path, or a name such as `[vdso]` or `/memfd:ram`. A newline in it is written as `\012`.
    pub path: Option<PathBuf>,
    /// The file has no name any more. (Or its name ends in " (deleted)", which looks the same.)
    pub deleted: bool,
}

impl Mapping {
    /// Parses one line without its newline.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut rest = line;
        let (start, end) = split(field(&mut rest)?, b'-')?;
        let &[_, write, _, sharing] = field(&mut rest)? else { return None };
        let offset = hexadecimal(field(&mut rest)?)?;
        let (major, minor) = split(field(&mut rest)?, b':')?;
        let device = makedev(u32::try_from(major).ok()?, u32::try_from(minor).ok()?);
        let inode = std::str::from_utf8(field(&mut rest)?).ok()?.parse().ok()?;
        let shared = match sharing {
            b's' => true,
            b'p' => false,
            _ => return None,
        };
        let name = &rest[rest.iter().take_while(|byte| **byte == b' ').count()..];
        let (name, deleted) = match name.strip_suffix(b" (deleted)") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let path = (!name.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(name)));
        let writable = write == b'w';
        (start < end).then_some(Self {
            start,
            end,
            shared,
            writable,
            offset,
            device,
            inode,
            path,
            deleted,
        })
    }
}

/// Takes the bytes before the next space from `rest`.
fn field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
    let field = &rest[..end];
    *rest = rest.get(end + 1..).unwrap_or_default();
    (!field.is_empty()).then_some(field)
}

/// Two hexadecimal numbers with `separator` between them.
fn split(field: &[u8], separator: u8) -> Option<(u64, u64)> {
    let at = field.iter().position(|byte| *byte == separator)?;
    Some((hexadecimal(&field[..at])?, hexadecimal(&field[at + 1..])?))
}

fn hexadecimal(field: &[u8]) -> Option<u64> {
    // from_str_radix() alone would accept a sign.
    let digits = field.iter().all(u8::is_ascii_hexdigit);
    digits.then(|| u64::from_str_radix(std::str::from_utf8(field).ok()?, 16).ok())?
}

/// All mappings of a process, by address.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Parses the content of `/proc/PID/maps`.
    ///
    /// # Errors
    /// If a line is malformed, or the lines are not in the order of their addresses.
    pub fn parse(text: &[u8]) -> Result<Self, MalformedLine> {
        /// How much of a malformed line is kept.
        const KEPT: usize = 200;
        let mut mappings: Vec<Mapping> = Vec::new();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let after = mappings.last().map_or(0, |mapping| mapping.end);
            match Mapping::parse(line) {
                Some(mapping) if mapping.start >= after => mappings.push(mapping),
                _ => {
                    let text = String::from_utf8_lossy(&line[..line.len().min(KEPT)]).into_owned();
                    return Err(MalformedLine { line: index + 1, text });
                }
            }
        }
        Ok(Self(mappings))
    }

    /// The mappings.
    pub fn iter(&self) -> std::slice::Iter<'_, Mapping> {
        self.0.iter()
    }

    /// True if every byte of `length` bytes from `start` on is mapped.
    ///
    /// UFFDIO_REGISTER reports success for a range with a hole, and registers the rest.
    pub fn is_mapped(&self, start: u64, length: u64) -> bool {
        let Some(end) = start.checked_add(length) else { return false };
        let first = self.0.partition_point(|mapping| mapping.end <= start);
        let mut reached = start;
        for mapping in &self.0[first..] {
            if reached >= end || mapping.start > reached {
                break;
            }
            reached = mapping.end;
        }
        reached >= end
    }
}

impl<'a> IntoIterator for &'a Mappings {
    type Item = &'a Mapping;
    type IntoIter = std::slice::Iter<'a, Mapping>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl TargetProcess {
    /// Copies a descriptor that this process holds of the file `inode` of `device`, and that is
    /// open for reading and writing.
    ///
    /// # Errors
    /// If it has none, or ours may not copy it.
    pub fn descriptor_of(&self, device: Dev, inode: u64) -> Result<OwnedFd, ProcessError> {
        let action = "list the descriptors of";
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(self.folder(), "fd", flags, Mode::empty())
            .map_err(|source| self.refused(action, source))?;
        let entries = Dir::read_from(&folder).map_err(|source| self.refused(action, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| self.refused(action, source))?;
            let number = entry.file_name().to_str().ok().and_then(|name| name.parse().ok());
            let Some(number) = number else { continue };
            // The process opens and closes files meanwhile, so a look at the link does not last:
            // the copy is what counts.
            match rustix::fs::statat(&folder, entry.file_name(), AtFlags::empty()) {
                Ok(file) if file.st_dev == device && file.st_ino == inode => {}
                _ => continue,
            }
            let copy = match self.file(number) {
                Ok(copy) => copy,
                Err(ProcessError::NoDescriptor { .. }) => continue,
                Err(error) => return Err(error),
            };
            if is_file(&copy, device, inode).map_err(|source| self.refused(action, source))? {
                return Ok(copy);
            }
        }
        if self.has_exited()? {
            return Err(ProcessError::Gone { pid: self.pid() });
        }
        let (pid, major, minor) = (self.pid(), major(device), minor(device));
        Err(ProcessError::NoDescriptorOfFile { pid, major, minor, inode })
    }
}

/// True if `copy` is that file, open for reading and writing.
fn is_file(copy: &OwnedFd, device: Dev, inode: u64) -> Result<bool, Errno> {
    let file = rustix::fs::fstat(copy)?;
    let flags = rustix::fs::fcntl_getfl(copy)?;
    let both = flags & OFlags::ACCMODE == OFlags::RDWR && !flags.contains(OFlags::PATH);
    Ok(file.st_dev == device && file.st_ino == inode && both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_file_of_the_kernel_is_understood() {
        let text =
            b"7f00-8f00 rw-s 00100000 fd:01 4711                 /memfd:guest ram (deleted)\n\
            9000-a000 r--p 00000000 00:00 0 \n\
            a000-b000 r-xp 00000000 00:00 0                          [vdso]\n";
        let mappings = Mappings::parse(text).unwrap();
        let lines: Vec<_> = mappings.iter().collect();
        let expected = Mapping {
            start: 0x7f00,
            end: 0x8f00,
            shared: true,
            writable: true,
            offset: 0x10_0000,
            device: makedev(0xfd, 1),
            inode: 4711,
            path: Some("/memfd:guest ram".into()),
            deleted: true,
        };
        assert_eq!(lines[0], &expected);
        assert!(lines[1].path.is_none() && !lines[1].writable && !lines[1].shared);
        assert_eq!(lines[2].path.as_deref(), Some("[vdso]".as_ref()));
        // Neighbours cover a range together; a hole does not.
        assert!(mappings.is_mapped(0x9000, 0x2000));
        assert!(mappings.is_mapped(0x9800, 0x1000));
        assert!(!mappings.is_mapped(0x8000, 0x2000));
        assert!(!mappings.is_mapped(0xa000, 0x1001));
        assert!(!mappings.is_mapped(0xa000, u64::MAX));
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in [
            "",
            "x",
            "1000-2000",
            "2000-1000 rw-p 0 0:0 0",
            "+100-2000 rw-p 0 0:0 0",
            "1000-2000 rw-x 0 0:0 0",
            "1000-2000 rw-p 0 0:0 -1",
            "1000-2000 rw-p 0 1ffffffff:0 1",
            "1000-fffffffffffffffff rw-p 0 0:0 0",
        ] {
            assert_eq!(Mapping::parse(line.as_bytes()), None, "{line}");
        }
        let error = Mappings::parse(b"2000-3000 rw-p 0 0:0 0\n1000-2000 rw-p 0 0:0 0\n");
        assert_eq!(error.unwrap_err().line, 2);
    }

    #[test]
    fn the_descriptor_of_a_file_is_found_if_it_can_be_written() {
        let own = TargetProcess::open(std::process::id()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = std::fs::File::open(file.path()).unwrap();
        let stat = rustix::fs::fstat(&read_only).unwrap();
        let copy = own.descriptor_of(stat.st_dev, stat.st_ino).unwrap();
        assert_ne!(copy.as_raw_fd(), read_only.as_raw_fd());
        drop(copy);
        drop(file);
        let error = own.descriptor_of(stat.st_dev, stat.st_ino).unwrap_err();
        assert!(matches!(error, ProcessError::NoDescriptorOfFile { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Mappings::parse(&text);
        }

        #[test]
        fn almost_valid_lines_never_panic(
            range in "[0-9a-f]{0,17}-[0-9a-f]{0,17}", access in "[rwxsp-]{0,5}",
            file in "[0-9a-f]{0,17} [0-9a-f]{0,9}:[0-9a-f]{0,9} [0-9]{0,21}", name in " {0,3}[ -~]*",
        ) {
            let _ = Mappings::parse(format!("{range} {access} {file}{name}").as_bytes());
        }

        #[test]
        fn is_mapped_agrees_with_a_look_at_every_byte(
            steps in proptest::collection::vec((0_u64..4, 1_u64..4), 0..6),
            start in 0_u64..40, length in 1_u64..12,
        ) {
            let (mut text, mut bytes, mut at) = (String::new(), vec![false; 64], 0);
            for (gap, size) in steps {
                let (from, to) = (at + gap, at + gap + size);
                text += &format!("{from:x}-{to:x} rw-p 0 0:0 0\n");
                (from..to).for_each(|byte| bytes[byte as usize] = true);
                at = to;
            }
            let mappings = Mappings::parse(text.as_bytes()).unwrap();
            let all = (start..start + length).all(|byte| bytes[byte as usize]);
            prop_assert_eq!(mappings.is_mapped(start, length), all);
        }
    }
}
