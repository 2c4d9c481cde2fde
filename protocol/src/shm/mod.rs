// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bitmaps of atomic words, in private memory or in memory shared between a VMM and its agent.
//!
//! - [`bitmap`]: [`Bitmap`], one bit per page, for any number of threads and processes at once;
//! - [`mapping`]: [`MappedWords`], the memory under a bitmap: anonymous, or a memfd that the VMM
//!   shares;
//! - [`log`]: [`DirtyLog`], the bitmap over guest physical pages in the log layout of vhost;
//! - [`fence`]: which agent is the current one.

pub mod bitmap;
pub mod fence;
pub mod log;
pub mod mapping;
// Which words were ever set, so that empty ones are skipped.
mod touched;

pub use bitmap::Bitmap;
pub use fence::{FenceView, FenceWord};
pub use log::DirtyLog;
pub use mapping::{MappedWords, MappingError, ReadOnlyWord};

// `bitmap.rs` takes these from its parent, so that the model checker can put its own atomics in
// their place.
use crate::memory::PageRange;
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

/// A bitmap over mapped words, as both processes use it outside of model checks.
pub type MappedBitmap = Bitmap<MappedWords>;

impl MappedBitmap {
    /// An all-clear bitmap of `pages` bits in private memory, which costs nothing until it is
    /// written.
    ///
    /// # Errors
    /// If the kernel has no address space or memory for it.
    pub fn private(pages: u64) -> Result<Self, MappingError> {
        Ok(Bitmap::new(MappedWords::anonymous(words_for(pages))?, pages))
    }

    /// The bitmap of `pages` bits that starts at byte 0 of `fd`.
    ///
    /// # Errors
    /// If the file is too short, or cannot be mapped.
    pub fn shared(fd: std::os::fd::BorrowedFd<'_>, pages: u64) -> Result<Self, MappingError> {
        Ok(Bitmap::new(MappedWords::shared(fd, 0, words_for(pages) * 8)?, pages))
    }

    /// The same, for a process that walks bitmaps of large guests: a walk asks the file for its
    /// holes and skips them.
    ///
    /// # Errors
    /// As [`MappedBitmap::shared`].
    pub fn shared_sparse(fd: std::os::fd::OwnedFd, pages: u64) -> Result<Self, MappingError> {
        let words = MappedWords::shared(std::os::fd::AsFd::as_fd(&fd), 0, words_for(pages) * 8)?;
        Ok(Bitmap::new(words.skipping_holes_of(fd), pages))
    }
}

/// Number of 64-bit words that hold `pages` bits.
pub const fn words_for(pages: u64) -> u64 {
    pages.div_ceil(64)
}

/// Size in bytes of the file under a shared bitmap of `pages` bits: whole words.
pub const fn bitmap_bytes(pages: u64) -> u64 {
    words_for(pages) * 8
}
