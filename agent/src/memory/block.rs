// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A block of guest memory with its bitmaps.

use super::backing::{Backing, BackingError};
use super::bus_guard::GuardedRange;
use super::owed::OwedPages;
use pageferry_protocol::memory::{BlockGeometry, PageRange};
use pageferry_protocol::shm::{DirtyLog, MappedBitmap, MappingError};

/// A block of guest memory.
#[derive(Debug)]
pub struct Block {
    // Before the bitmap, so that the guard is dropped first.
    guard: Option<GuardedRange>,
    /// Its place in the guest's physical address space.
    pub geometry: BlockGeometry,
    /// The file that holds it.
    pub backing: Backing,
    /// The address at which the VMM has mapped it. 0 if the VMM has not.
    pub vmm_address: u64,
    /// One bit for each discarded page. Shared with the VMM, so it survives this process.
    pub discarded: MappedBitmap,
    /// Pages that are still to come for a guest that runs. Shared with the VMM, if it has such a
    /// bitmap.
    pub owed: Option<OwedPages>,
    /// Discarded pages for which the backing cannot tell a stray write from older content, because
    /// they were discarded without a punch since the last sync. See [`crate::outgoing::fixup`].
    pub unsettled: MappedBitmap,
    /// Discarded pages to which the guest wrote after the discard, according to a sync. They are
    /// migrated all the same.
    pub stray: MappedBitmap,
    /// Pages that were freed and are not known to be written since. See [`super::freed`].
    pub(super) freed: MappedBitmap,
}

/// Why a block was refused.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The memory file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The discard bitmap, or one of the agent's own bitmaps.
    #[error("discard bitmap")]
    Bitmap(#[from] MappingError),
}

impl Block {
    /// A block with the discard bitmap `discarded`. `None` if the VMM has no such bitmap.
    ///
    /// # Errors
    /// If there is no memory for its bitmaps.
    pub fn new(
        geometry: BlockGeometry, backing: Backing, vmm_address: u64,
        discarded: Option<MappedBitmap>,
    ) -> Result<Self, BlockError> {
        let pages = geometry.pages();
        let guard = discarded.as_ref().map(|bitmap| GuardedRange::of(bitmap.storage()));
        let discarded = match discarded {
            Some(bitmap) => bitmap,
            None => MappedBitmap::private(pages)?,
        };
        let unsettled = MappedBitmap::private(pages)?;
        let stray = MappedBitmap::private(pages)?;
        let freed = MappedBitmap::private(pages)?;
        let owed = None;
        Ok(Self { guard, geometry, backing, vmm_address, discarded, owed, unsettled, stray, freed })
    }

    /// The same block with a bitmap of owed pages that the VMM keeps.
    pub fn owing(self, owed: MappedBitmap) -> Self {
        Self { owed: Some(OwedPages::new(owed)), ..self }
    }

    /// All pages of the block.
    pub fn all(&self) -> PageRange {
        PageRange::new(0, self.geometry.pages())
    }

    /// The unit of discards and populates in bytes.
    pub fn discard_unit(&self) -> u64 {
        self.geometry.discard_unit(self.backing.host_page_size())
    }

    /// The block's pages as guest physical pages: its part of the dirty log.
    pub fn log_pages(&self) -> PageRange {
        PageRange::new(self.geometry.first_log_page(), self.geometry.pages())
    }

    /// True if the file under the discard bitmap was truncated. Then it is unknown which pages are
    /// discarded.
    pub fn lost_bitmap(&self) -> bool {
        self.guard.as_ref().is_some_and(GuardedRange::was_lost)
    }
}

/// The dirty log, guarded against a file that shrinks.
#[derive(Debug)]
pub struct GuestLog {
    // Before the log, so that the guard is dropped first.
    guard: GuardedRange,
    /// The log.
    pub log: DirtyLog,
}

impl GuestLog {
    /// Guards `log`.
    pub fn new(log: DirtyLog) -> Self {
        let guard = GuardedRange::of(log.bits().storage());
        Self { guard, log }
    }

    /// True if the file under the log was truncated. Then it is unknown which pages are dirty.
    pub fn was_lost(&self) -> bool {
        self.guard.was_lost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memfd;
    use pageferry_protocol::memory::PAGE_SIZE;
    use std::os::fd::AsFd;

    #[test]
    fn truncated_discard_bitmap_is_noticed() {
        let length = 8 * PAGE_SIZE * PAGE_SIZE;
        let (ram, bits) = (memfd(length), memfd(PAGE_SIZE));
        let (name, granularity) = ("ram".to_owned(), PAGE_SIZE);
        let geometry = BlockGeometry { id: 1, name, gpa: 0, length, granularity };
        let pages = geometry.pages();
        let bitmap = MappedBitmap::shared(bits.as_fd(), pages).unwrap();
        let backing = Backing::new(ram, 0, length).unwrap();
        let block = Block::new(geometry, backing, 0, Some(bitmap)).unwrap();
        block.discarded.set(block.all());
        assert!(!block.lost_bitmap());
        rustix::fs::ftruncate(&bits, 0).unwrap();
        assert_eq!(block.discarded.count(block.all()), 0);
        assert!(block.lost_bitmap());
    }
}
