// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty log: one bit per guest physical page, in the layout that vhost defines for
//! `VHOST_USER_SET_LOG_BASE`:
//!
//! ```text
//! page = gpa / 4096;  log[page / 8] |= 1 << (page % 8)
//! ```
//!
//! In little-endian 64-bit words that is bit `page % 64` of word `page / 64`, so one atomic
//! operation handles 64 pages. A writer of guest memory sets the bit *after* the write. A migration
//! takes the bit *before* it reads ([`clear-then-read`](crate::invariants#clear-then-read)).

use super::bitmap::WORD_BITS;
use super::{Bitmap, MappedBitmap, MappedWords, MappingError};
use crate::memory::PageRange;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The dirty log, mapped. Indexed by guest physical page number.
#[derive(Debug)]
pub struct DirtyLog {
    bits: MappedBitmap,
}

impl DirtyLog {
    /// Maps the log that lies in `length` bytes of `fd` from `offset`.
    ///
    /// # Errors
    /// If the file is too short or cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Self, MappingError> {
        let words = MappedWords::shared(fd, offset, length)?;
        Ok(Self { bits: Bitmap::new(words, length.saturating_mul(8)) })
    }

    /// The same, for a process that harvests the log: a walk asks the file for its holes and skips
    /// them.
    ///
    /// # Errors
    /// As [`DirtyLog::map`].
    pub fn map_sparse(fd: OwnedFd, offset: u64, length: u64) -> Result<Self, MappingError> {
        let words = MappedWords::shared(fd.as_fd(), offset, length)?;
        Ok(Self { bits: Bitmap::new(words.skipping_holes_of(fd), length.saturating_mul(8)) })
    }

    /// Number of guest pages the log covers, from guest physical address zero.
    pub fn pages(&self) -> u64 {
        self.bits.pages()
    }

    /// The log as a bitmap over guest physical pages.
    pub fn bits(&self) -> &MappedBitmap {
        &self.bits
    }

    /// Marks guest pages as dirty. Call it after the write. Pages outside the log are not marked.
    ///
    /// Page numbers count from guest physical address 0 (`gpa / 4096`), not from the start of a
    /// block:
    ///
    /// ```
    /// # use pageferry_protocol::{memory::PageRange, shm::DirtyLog};
    /// # fn write(log: &DirtyLog, gpa: u64, length: u64) {
    /// let first = gpa / 4096;
    /// log.mark(PageRange::new(first, (gpa + length).div_ceil(4096) - first));
    /// # }
    /// ```
    pub fn mark(&self, pages: PageRange) {
        self.bits.set(pages);
    }

    /// Takes the bits of the guest pages `pages` and sets them in `into`, whose page 0 is
    /// `pages.first`. Bits of other guest pages, even in the same word, stay. Returns how many bits
    /// were taken.
    pub fn drain_into(&self, pages: PageRange, into: &MappedBitmap) -> u64 {
        self.drain_into_part(pages, into, 0)
    }

    /// The same, for a bitmap in which page `first` stands for `pages.first`. Several threads may
    /// drain at once, each its own pages.
    pub fn drain_into_part(&self, pages: PageRange, into: &MappedBitmap, first: u64) -> u64 {
        let mut taken = 0;
        self.drain(pages, |page, bits| {
            taken += u64::from(bits.count_ones());
            into.or_at(first + page, bits);
        });
        taken
    }

    /// Takes the bits of `pages` and hands them out, 64 at most at a time: the page (relative to
    /// `pages.first`) of bit 0, and the bits.
    fn drain(&self, pages: PageRange, mut found: impl FnMut(u64, u64)) {
        self.bits.take(pages, |index, bits| {
            let word_first = index * WORD_BITS;
            match word_first.checked_sub(pages.first) {
                Some(first) => found(first, bits),
                // The range starts inside this word, and the bits below its start do not belong to
                // it.
                None => found(0, bits >> (pages.first - word_first)),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::os::fd::AsFd;

    fn log(pages: u64) -> DirtyLog {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, pages.div_ceil(8)).unwrap();
        DirtyLog::map(fd.as_fd(), 0, pages.div_ceil(8)).unwrap()
    }

    #[test]
    fn layout_is_vhosts() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let log = DirtyLog::map(fd.as_fd(), 0, 4096).unwrap();
        log.mark(PageRange::new(77, 1));
        let mut bytes = [0u8; 16];
        rustix::io::pread(&fd, &mut bytes, 0).unwrap();
        let mut expected = [0u8; 16];
        expected[77 / 8] |= 1 << (77 % 8);
        assert_eq!(bytes, expected);
    }

    proptest! {
        #[test]
        fn drain_takes_what_is_in_the_range_and_nothing_else(
            marks in prop::collection::vec((0u64..400, 1u64..90), 0..12),
            first in 0u64..300, count in 1u64..200,
        ) {
            let log = log(512);
            let mut model = BTreeSet::new();
            for (page, length) in marks {
                log.mark(PageRange::new(page, length));
                model.extend(page..(page + length).min(512));
            }
            let into = MappedBitmap::private(count).unwrap();
            let taken = log.drain_into(PageRange::new(first, count), &into);
            let expected: Vec<u64> = model.iter().copied().filter(|page| (first..first + count).contains(page)).collect();
            prop_assert_eq!(taken, expected.len() as u64);
            let found: Vec<u64> = (0..count).filter(|page| into.contains(*page)).map(|page| page + first).collect();
            prop_assert_eq!(&found, &expected);
            for page in 0..512 {
                let stays = model.contains(&page) && !(first..first + count).contains(&page);
                prop_assert_eq!(log.bits().contains(page), stays, "page {}", page);
            }
        }
    }
}
