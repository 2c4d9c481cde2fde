// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What every tracker does.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use crate::memory::GuestMemory;

/// A source of dirty pages.
pub trait Tracker: Send + Sync {
    /// Starts to report writes.
    ///
    /// # Errors
    /// If the tracker cannot start.
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError>;

    /// Sets all pages in `dirty` that were written since the last sync, or since the start. Up to
    /// `threads` threads share the work.
    ///
    /// # Errors
    /// If the tracker cannot report. The job must not trust `dirty` any more.
    fn sync(
        &mut self, memory: &GuestMemory, dirty: &DirtyPages, threads: usize,
    ) -> Result<(), TrackingError>;

    /// Stops to report. Also called after a failure, and possibly without a start.
    fn stop(&mut self);

    /// Those of the pages `pages` of word `word` of the block at index `at` that the last sync has
    /// reported although perhaps only a neighbour was written.
    fn imprecise(&self, at: usize, word: u64, pages: u64) -> u64 {
        let _ = (at, word, pages);
        0
    }

    /// A background snapshot uses the VMM's mappings from now on. A tracker that needs them sees no
    /// writes until [`Tracker::resume`], so it must report every page at each sync until then, and
    /// at the first sync after it.
    fn suspend(&mut self) {}

    /// True if the next sync reports every page, because a snapshot has used the VMM's mappings
    /// since the last one.
    fn has_missed_writes(&self) -> bool {
        false
    }

    /// The snapshot does not use the mappings any more.
    fn resume(&mut self) {}
}
