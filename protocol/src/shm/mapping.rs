// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory under a bitmap: anonymous pages, or a memfd shared between a VMM and its agent.
//!
//! An access to a mapping whose file was truncated raises SIGBUS. So the size of the file is
//! checked first, and the side that does not trust the other requires `F_SEAL_SHRINK` or guards the
//! mapping (see the bus guard of the agent).
#![allow(unsafe_code)]

use super::bitmap::Words;
use super::touched::Touched;
use rustix::fs::OFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ops::{Deref, Range};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why memory for a bitmap could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The file ends before the mapping would.
    #[error("file of {size:#x} bytes is shorter than offset {offset:#x} + length {length:#x}")]
    TooShort {
        /// Size of the file in bytes.
        size: u64,
        /// Offset of the mapping in bytes.
        offset: u64,
        /// Length of the mapping in bytes.
        length: u64,
    },
    /// The descriptor is not open for both reading and writing.
    #[error("fd is not open for reading and writing (O_RDWR)")]
    NotReadWrite,
    /// The offset is not a multiple of the page size.
    #[error("offset {offset:#x} is not a multiple of the page size")]
    UnalignedOffset {
        /// Offset of the mapping in bytes.
        offset: u64,
    },
    /// The length is zero or not addressable.
    #[error("length {length:#x} cannot be mapped")]
    InvalidLength {
        /// Length in bytes.
        length: u64,
    },
    /// The kernel refused.
    #[error("cannot map {length:#x} bytes")]
    Kernel {
        /// Length in bytes.
        length: u64,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
}

/// Atomic words in mapped memory, unmapped on drop.
#[derive(Debug)]
pub struct MappedWords {
    start: *mut AtomicU64,
    words: usize,
    touched: Touched,
    /// Offset of the mapping in its file in bytes.
    offset: u64,
}

// SAFETY: the memory is only reached as atomics, which any thread may use, and stays mapped until
// drop.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// `words` zero words in private memory. Pages are allocated when they are first written.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn anonymous(words: u64) -> Result<Self, MappingError> {
        let length = words.max(1).saturating_mul(8);
        let bytes = addressable(length)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
        };
        let start = start.map_err(|source| MappingError::Kernel { length, source })?;
        Ok(Self {
            start: start.cast(),
            words: bytes / 8,
            touched: Touched::summary(bytes as u64 / 8),
            offset: 0,
        })
    }

    /// The words of `length` bytes of `fd` from `offset`, shared with every process that maps the
    /// file. A length that is not a multiple of 8 is rounded up; the rest lies in the same page of
    /// the file and reads as zero.
    ///
    /// # Errors
    /// If the descriptor is not open for reading and writing, the file is shorter than that, the
    /// offset is not a multiple of the page size, or the kernel refuses.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Self, MappingError> {
        let flags = rustix::fs::fcntl_getfl(fd)
            .map_err(|source| MappingError::Kernel { length, source })?;
        // All else that may be set on it, such as O_APPEND, changes nothing for a mapping.
        if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE != OFlags::RDWR {
            return Err(MappingError::NotReadWrite);
        }
        Self::map_shared(fd, offset, length, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn map_shared(
        fd: BorrowedFd<'_>, offset: u64, length: u64, protection: ProtFlags,
    ) -> Result<Self, MappingError> {
        if !offset.is_multiple_of(crate::memory::PAGE_SIZE) {
            return Err(MappingError::UnalignedOffset { offset });
        }
        let kernel = |source| MappingError::Kernel { length, source };
        let stat = rustix::fs::fstat(fd).map_err(kernel)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(MappingError::TooShort { size, offset, length });
        }
        let bytes = addressable(length.next_multiple_of(8))?;
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let start =
            unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, offset) };
        Ok(Self {
            start: start.map_err(kernel)?.cast(),
            words: bytes / 8,
            touched: Touched::Unknown,
            offset,
        })
    }

    /// The same mapping, and a walk over it skips the holes of `file`, which must be its file.
    /// Reading a hole is slower and would allocate it.
    #[must_use]
    pub fn skipping_holes_of(mut self, file: OwnedFd) -> Self {
        self.touched = Touched::file(file, self.offset);
        self
    }

    /// The addresses of the mapping, for a guard against truncation.
    pub fn address_range(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start + self.words * 8
    }
}

/// One word of shared memory that this process may only read, unmapped on drop.
#[derive(Debug)]
pub struct ReadOnlyWord(MappedWords);

impl ReadOnlyWord {
    /// The word at byte 0 of `fd`. The mapping cannot be written to, so a file that is sealed
    /// against writing (`F_SEAL_FUTURE_WRITE`) can be mapped, too.
    ///
    /// # Errors
    /// As [`MappedWords::shared`].
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, MappingError> {
        MappedWords::map_shared(fd, 0, 8, ProtFlags::READ).map(Self)
    }

    /// The value. Everything that its writer did before it stored the value is visible after this.
    pub fn load(&self) -> u64 {
        self.0[0].load(Ordering::Acquire)
    }

    /// The addresses of the mapping, for a guard against truncation.
    pub fn address_range(&self) -> Range<usize> {
        self.0.address_range()
    }
}

fn addressable(length: u64) -> Result<usize, MappingError> {
    match usize::try_from(length) {
        Ok(bytes) if bytes > 0 && bytes <= isize::MAX as usize => Ok(bytes),
        _ => Err(MappingError::InvalidLength { length }),
    }
}

impl Deref for MappedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and mapped for `words` words until drop, readable, and
        // writable but for a [`ReadOnlyWord`], which only loads. Everything that reaches it, here
        // or in another process, does so by atomic operations or the kernel's copies.
        unsafe { std::slice::from_raw_parts(self.start, self.words) }
    }
}

impl Words for MappedWords {
    fn next_touched(&self, span: Range<u64>) -> Option<Range<u64>> {
        self.touched.next(span)
    }

    #[inline]
    fn touched(&self, index: u64) {
        self.touched.set(index);
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no borrow of it outlives `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.words * 8) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}
