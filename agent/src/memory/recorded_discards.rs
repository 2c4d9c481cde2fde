// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Recorded discards: the pages that the VMM has discarded or freed since a job started to record.
//!
//! A job that fills memory changes the discard marks by itself, so the marks alone do not show what
//! the VMM has discarded since. A freed page has no mark at all. So while a job records, each
//! discard and each free also notes its pages here. It does so while it holds
//! [`GuestMemory::marking`](super::GuestMemory::marking), and before it waits in the fence. So a
//! worker that has published its word either sees the note, or the discard waits for this worker.

use super::block::Block;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use std::sync::Arc;

/// Pages that were discarded or freed, in the order of the memory's blocks.
#[derive(Debug)]
pub struct RecordedDiscards {
    discarded: Vec<MappedBitmap>,
    freed: Vec<MappedBitmap>,
}

impl RecordedDiscards {
    pub(super) fn none(blocks: &[Arc<Block>]) -> Result<Self, MappingError> {
        let bitmaps = || -> Result<Vec<_>, MappingError> {
            blocks.iter().map(|block| MappedBitmap::private(block.geometry.pages())).collect()
        };
        Ok(Self { discarded: bitmaps()?, freed: bitmaps()? })
    }

    /// True if no page of this block was discarded or freed.
    pub fn is_empty(&self, at: usize) -> bool {
        [&self.discarded[at], &self.freed[at]]
            .iter()
            .all(|pages| pages.next_set(pages.all()).is_none())
    }

    /// Pages that were discarded, including those that were discarded already before the recording,
    /// and those that are not discarded any more.
    pub fn discarded(&self, at: usize) -> &MappedBitmap {
        &self.discarded[at]
    }

    /// Pages that were freed.
    pub fn freed(&self, at: usize) -> &MappedBitmap {
        &self.freed[at]
    }

    /// Forgets what was recorded of the pages `range`.
    pub fn forget(&self, at: usize, range: PageRange) {
        self.discarded[at].clear(range);
        self.freed[at].clear(range);
    }
}
