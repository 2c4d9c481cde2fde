// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A raw file that is read, and which of its pages have data.
//!
//! The file is read with `pread` and never mapped: if it is truncated meanwhile, a read fails, and
//! no signal ends this process.

use super::error::{RawError, RawFault};
use crate::image::bytes::data_in;
use crate::image::error::{ImageFault, kernel};
use crate::opener;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};
use pageferry_protocol::shm::MappedBitmap;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A raw file that is open for reading.
#[derive(Debug)]
pub struct RawFile {
    path: PathBuf,
    file: OwnedFd,
    /// As it was when the file was opened.
    stat: Stat,
}

impl RawFile {
    /// Opens the raw file at `path`.
    ///
    /// # Errors
    /// If it cannot be read, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self, RawError> {
        let open = || {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = opener::open(path, flags, Mode::empty()).map_err(kernel("open it"))?;
            let stat = rustix::fs::fstat(&file).map_err(kernel("look at it"))?;
            if !FileType::from_raw_mode(stat.st_mode).is_file() {
                return Err(ImageFault::NotARegularFile);
            }
            Ok(Self { path: path.to_owned(), file, stat })
        };
        open().map_err(|fault| RawFault::from(fault).of(path))
    }

    /// The path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes, as it was when the file was opened.
    pub fn length(&self) -> u64 {
        u64::try_from(self.stat.st_size).unwrap_or(0)
    }

    /// The pages of the file that have data; all others are holes.
    ///
    /// The file is searched once from its start to its end. On tmpfs, a search for the next hole
    /// visits all pages up to it, so a search for each chunk would take very long.
    pub(super) fn pages_with_data(&self) -> Result<MappedBitmap, ImageFault> {
        let data = MappedBitmap::private(self.length().div_ceil(PAGE_SIZE))?;
        for bytes in data_in(self.as_fd(), 0..self.length()) {
            let first = pages_in(bytes.start);
            data.set(PageRange::new(first, bytes.end.div_ceil(PAGE_SIZE) - first));
        }
        Ok(data)
    }

    /// Checks that nobody has changed the file since it was opened, as far as the kernel notices: a
    /// file that became shorter reads as a hole at its end. Writes through a mapping may go
    /// unnoticed.
    pub(super) fn check_unchanged(&self) -> Result<(), RawFault> {
        let now = rustix::fs::fstat(&self.file).map_err(kernel("look at it"))?;
        let of = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
        if of(&now) == of(&self.stat) { Ok(()) } else { Err(RawFault::Changed) }
    }
}

impl AsFd for RawFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
