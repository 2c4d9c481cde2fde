//! Reading and writing at a place in a file, all or nothing; and where a file has data.

use super::Fault;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Writes all of `bytes`.
pub fn write_at(file: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> Result<(), Fault> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(Fault::At { what: "write", at, source: Errno::NOSPC }),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(source) => return Err(Fault::At { what: "write", at, source }),
        }
    }
    Ok(())
}

/// Fills `bytes`.
pub fn read_at(file: BorrowedFd<'_>, mut bytes: &mut [u8], mut at: u64) -> Result<(), Fault> {
    while !bytes.is_empty() {
        match rustix::io::pread(file, &mut *bytes, at) {
            Ok(0) => {
                // Not where this read begins: that may lie far behind it.
                let stat = rustix::fs::fstat(file).map_err(|source| Fault::At {
                    what: "read",
                    at,
                    source,
                })?;
                return Err(Fault::Ends { end: u64::try_from(stat.st_size).unwrap_or(0), at });
            }
            Ok(read) => {
                bytes = &mut bytes[read..];
                at += read as u64;
            }
            Err(Errno::INTR) => {}
            Err(source) => return Err(Fault::At { what: "read", at, source }),
        }
    }
    Ok(())
}

/// Where the file has data in `range`, in order; the rest is holes. Where the file system cannot
/// tell, all of it counts as data.
pub(super) fn data_in(file: BorrowedFd<'_>, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        // Reads and writes are at places of their own, so it does no harm to move the file's.
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
