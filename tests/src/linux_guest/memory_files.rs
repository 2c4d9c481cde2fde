// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files of a QEMU's guest memory, to compare the two ends of a migration.
//!
//! They are opened through /proc while QEMU runs, and stay readable after its end. A look at them
//! allocates no memory.

use crate::Error;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const PAGE: u64 = 4096;
/// How a memory file of `pageferry qemu run` begins in /proc.
const PREFIX: &str = "/memfd:pageferry-";

/// Memory files by their names, such as `pageferry-ram`.
#[derive(Debug)]
pub struct MemoryFiles(BTreeMap<String, File>);

/// What is different between two ends, in pages.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Holes at the source that have data at the destination.
    pub populated_holes: u64,
    /// Pages with data at the source that are a hole at the destination, and are not zero.
    pub lost: u64,
    /// Pages with data at both ends, which differ.
    pub changed: u64,
}

impl MemoryFiles {
    /// Those of the QEMU with this process id, which `pageferry qemu` has started.
    ///
    /// # Errors
    /// If it has none, or the system refuses.
    pub fn of(pid: u32) -> Result<Self, Error> {
        let folder = format!("/proc/{pid}/fd");
        let entries = std::fs::read_dir(&folder).map_err(Error::io(format!("read {folder}")))?;
        let mut files = BTreeMap::new();
        for entry in entries.flatten() {
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            let Some(name) = name(&target) else {
                continue;
            };
            let path = entry.path();
            let opened =
                File::open(&path).map_err(Error::io(format!("open {}", path.display())))?;
            files.insert(name, opened);
        }
        match files.is_empty() {
            true => Err(Error::Argument(format!("process {pid} has no memory of pageferry"))),
            false => Ok(Self(files)),
        }
    }

    /// Bytes that are allocated.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn allocated(&self) -> Result<u64, Error> {
        use std::os::unix::fs::MetadataExt;
        let size = |file: &File| file.metadata().map(|metadata| metadata.blocks() * 512);
        self.0.values().map(size).sum::<Result<u64, _>>().map_err(Error::io("look at memory"))
    }

    /// Compares this source with its destination. Both guests must be paused.
    ///
    /// The source may have more files: a QEMU inherits its memory files, and keeps those of memory
    /// that was plugged out.
    ///
    /// # Errors
    /// If the source lacks a file, or the system refuses.
    pub fn compare(&self, destination: &Self) -> Result<Difference, Error> {
        let mut found = Difference::default();
        for (name, there) in &destination.0 {
            let here = self.0.get(name);
            let here = here.ok_or_else(|| Error::Mismatch(format!("{name} is new: {self:?}")))?;
            compare(here, there, &mut found)?;
        }
        Ok(found)
    }
}

fn name(target: &Path) -> Option<String> {
    let name = target.to_str()?.strip_prefix(PREFIX)?;
    Some(name.trim_end_matches(" (deleted)").to_owned())
}

fn compare(source: &File, destination: &File, found: &mut Difference) -> Result<(), Error> {
    if length(source)? != length(destination)? {
        return Err(Error::Mismatch("memory files of different lengths".to_owned()));
    }
    let (here, there) = (populated(source)?, populated(destination)?);
    let mut pages = [[0; PAGE as usize]; 2];
    for (page, is_populated) in here.iter().zip(&there).enumerate() {
        let read = |file: &File, into: &mut [u8]| {
            file.read_exact_at(into, page as u64 * PAGE).map_err(Error::io("read memory"))
        };
        match is_populated {
            (false, false) => {}
            (false, true) => found.populated_holes += 1,
            (true, false) => {
                read(source, &mut pages[0])?;
                found.lost += u64::from(pages[0].iter().any(|byte| *byte != 0));
            }
            (true, true) => {
                read(source, &mut pages[0])?;
                read(destination, &mut pages[1])?;
                found.changed += u64::from(pages[0] != pages[1]);
            }
        }
    }
    Ok(())
}

fn length(file: &File) -> Result<u64, Error> {
    file.metadata().map(|metadata| metadata.len()).map_err(Error::io("look at memory"))
}

/// For each page whether it is allocated.
fn populated(file: &File) -> Result<Vec<bool>, Error> {
    let length = length(file)?;
    let mut pages = vec![false; (length / PAGE) as usize];
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // There is no data behind `at`.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(Error::kernel("look for holes")(errno)),
        };
        at = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(errno) => return Err(Error::kernel("look for holes")(errno)),
        };
        pages[(start / PAGE) as usize..at.div_ceil(PAGE) as usize].fill(true);
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn file(pages: &[Option<u8>]) -> MemoryFiles {
        let file = File::from(memfd_create("a", MemfdFlags::empty()).unwrap());
        file.set_len(pages.len() as u64 * PAGE).unwrap();
        for (page, byte) in pages.iter().enumerate() {
            let Some(byte) = byte else { continue };
            file.write_all_at(&[*byte; PAGE as usize], page as u64 * PAGE).unwrap();
        }
        MemoryFiles(BTreeMap::from([("a".to_owned(), file)]))
    }

    #[test]
    fn each_kind_of_difference_is_counted() {
        let source = file(&[None, None, Some(0), Some(1), Some(2), Some(3), None]);
        let destination = file(&[None, Some(0), None, None, Some(2), Some(4), None]);
        let expected = Difference { populated_holes: 1, lost: 1, changed: 1 };
        assert_eq!(source.compare(&destination).unwrap(), expected);
        assert_eq!(source.compare(&source).unwrap(), Difference::default());
        assert_eq!(source.allocated().unwrap(), 4 * PAGE);
    }
}
