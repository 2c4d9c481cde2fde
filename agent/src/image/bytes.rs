// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads and writes at an offset of a file, and the data ranges of a file.
//!
//! [`read_at`] and [`write_at`] repeat short reads and writes until all bytes are done. The error
//! names the offset.

use super::error::{ImageFault, kernel};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Writes all of `bytes` to offset `at` of the file.
///
/// # Errors
/// If the file system refuses or has no space. Some of the bytes may be written then.
pub fn write_at(file: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> Result<(), ImageFault> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(ImageFault::KernelAt { what: "write", at, source: Errno::NOSPC }),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(source) => return Err(ImageFault::KernelAt { what: "write", at, source }),
        }
    }
    Ok(())
}

/// Fills `bytes` from offset `at` of the file.
///
/// # Errors
/// If the file cannot be read, or ends too early.
pub fn read_at(file: BorrowedFd<'_>, mut bytes: &mut [u8], mut at: u64) -> Result<(), ImageFault> {
    while !bytes.is_empty() {
        match rustix::io::pread(file, &mut *bytes, at) {
            Ok(0) => {
                // The error names the real end of the file. It may lie far before `at`.
                let stat = rustix::fs::fstat(file).map_err(|source| ImageFault::KernelAt {
                    what: "read",
                    at,
                    source,
                })?;
                return Err(ImageFault::UnexpectedEof {
                    end: u64::try_from(stat.st_size).unwrap_or(0),
                    at,
                });
            }
            Ok(read) => {
                bytes = &mut bytes[read..];
                at += read as u64;
            }
            Err(Errno::INTR) => {}
            Err(source) => return Err(ImageFault::KernelAt { what: "read", at, source }),
        }
    }
    Ok(())
}

/// Random bytes from the kernel.
///
/// # Errors
/// If the kernel gives none.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ImageFault> {
    let failed = kernel("get random bytes");
    let mut bytes = [0; N];
    // As a whole what has at most 256 bytes.
    match getrandom(&mut bytes, GetRandomFlags::empty()).map_err(&failed)? {
        count if count == N => Ok(bytes),
        _ => Err(failed(Errno::IO)),
    }
}

/// The parts of `range` in which the file has data, in order; the rest is holes. If the file system
/// does not report holes, all of `range` counts as data.
pub(crate) fn data_in(file: BorrowedFd<'_>, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        // `seek` moves the position of the file. All reads and writes use their own offsets, so
        // this does no harm.
        let start = match rustix::fs::seek(file, SeekFrom::Data(next)) {
            Ok(start) => start.max(next),
            Err(Errno::NXIO) => range.end,
            Err(_) => next,
        };
        if start >= range.end {
            next = range.end;
            return None;
        }
        next = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end.min(range.end),
            _ => range.end,
        };
        Some(start..next)
    })
}
