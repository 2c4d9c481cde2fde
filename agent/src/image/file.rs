// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file of an image that is read: a file of this machine, or one of the cache for an image in a
//! store, whose bytes come from there before they are read.

use super::bytes;
use super::error::{ImageFault, kernel};
use crate::opener;
use crate::store::{self, StoredFile};
use rustix::fs::{Advice, Mode, OFlags};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The file of an image.
#[derive(Debug)]
pub enum ImageFile {
    /// A file of this machine.
    Local(OwnedFd),
    /// An image in a store.
    Stored(StoredFile),
}

impl From<OwnedFd> for ImageFile {
    fn from(file: OwnedFd) -> Self {
        Self::Local(file)
    }
}

impl ImageFile {
    /// Opens the file or the object at `path`. Returns it with its length in bytes.
    ///
    /// # Errors
    /// If there is none, or it is no regular file.
    pub(super) fn open(path: &Path) -> Result<(Self, u64), ImageFault> {
        if store::is_stored(path) {
            let file = StoredFile::open(path)?;
            let length = file.length();
            return Ok((Self::Stored(file), length));
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = opener::open(path, flags, Mode::empty()).map_err(kernel("open it"))?;
        let stat = rustix::fs::fstat(&file).map_err(kernel("look at it"))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(ImageFault::NotARegularFile);
        }
        Ok((Self::Local(file), u64::try_from(stat.st_size).unwrap_or(0)))
    }

    /// True if it is in a store.
    pub fn is_stored(&self) -> bool {
        matches!(self, Self::Stored(_))
    }

    /// Fills `into` from offset `at`.
    ///
    /// # Errors
    /// If the file cannot be read, or ends too early.
    pub fn read_at(&self, into: &mut [u8], at: u64) -> Result<(), ImageFault> {
        self.ensure(at..at.saturating_add(into.len() as u64))?;
        bytes::read_at(self.fd(), into, at)
    }

    /// The parts of `range` that have data, in order; the rest is holes. What does not come from
    /// the store counts as data: whoever reads it gets the error.
    pub fn data_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let (known, unknown) = match self.ensure(range.clone()) {
            Ok(()) => (range, None),
            Err(_) => (0..0, Some(range)),
        };
        bytes::data_in(self.fd(), known).chain(unknown)
    }

    /// Asks the kernel to read this part into the page cache, or the store for it. Does not wait.
    pub(super) fn will_need(&self, offset: u64, length: u64) {
        match self {
            Self::Local(file) => {
                // If this fails, the later read waits for the disk. No more is lost.
                let length = NonZeroU64::new(length);
                let _ = rustix::fs::fadvise(file, offset, length, Advice::WillNeed);
            }
            Self::Stored(file) => file.will_need(offset..offset.saturating_add(length)),
        }
    }

    /// Bytes on the disk of this machine.
    pub fn disk_bytes(&self) -> u64 {
        let stat = rustix::fs::fstat(self.fd());
        stat.map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    /// What no other file has at the same time: its device and its number. A file of this machine
    /// that was changed since has other numbers; one of the cache gets its content by and by.
    pub fn identity(&self) -> [u64; 5] {
        let Ok(stat) = rustix::fs::fstat(self.fd()) else { return [0; 5] };
        let (device, number, size) = (stat.st_dev, stat.st_ino, stat.st_size.cast_unsigned());
        match self {
            Self::Local(_) => {
                let (seconds, nanoseconds) = (stat.st_mtime, stat.st_mtime_nsec);
                [device, number, size, seconds.cast_unsigned(), nanoseconds]
            }
            Self::Stored(_) => [device, number, size, 0, 0],
        }
    }

    fn ensure(&self, range: Range<u64>) -> Result<(), ImageFault> {
        match self {
            Self::Local(_) => Ok(()),
            Self::Stored(file) => Ok(file.ensure(range)?),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Local(file) => file.as_fd(),
            Self::Stored(file) => file.as_fd(),
        }
    }
}
