// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Prefetch: reading the pages that the guest does not wait for yet (lazy restore).
//!
//! 1. The working set comes first, from before the VMM loads its state. All workers read it at
//!    normal priority, in the order in which it lies in the image.
//! 2. All other pages follow once the gate opens: when the guest runs, and is idle if its touches
//!    are recorded. The workers continue behind the last fault, and at a lower priority, so that
//!    they do not delay the pages that the guest waits for.
//!
//! All reads count towards the bandwidth limit of the job.

use super::lazy_restore::LazyRestore;
use crate::image::chain::in_extents;
use crate::job::{JobError, add};
use crate::memory::PageBuffer;
use crate::memory::runs::{NEAR, join_near_runs};
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};

impl LazyRestore<'_> {
    /// Runs one worker: prefetches until no page is unread or the restore has ended.
    ///
    /// # Errors
    /// If the image cannot be read or is damaged, or if a page cannot be placed.
    pub fn prefetch(&self, worker: usize) -> Result<(), JobError> {
        let mut reader = Reader {
            restore: self,
            worker,
            buffer: PageBuffer::new(EXTENT_SIZE as usize),
            runs: Vec::new(),
        };
        while !self.has_ended()
            && let Some((at, pages)) = self.pieces.claim()
        {
            let placed = reader.fetch(at, self.unread.block(at).covering(pages))?;
            add(&self.job.live.working_set_pages, placed);
        }
        if !self.gate.wait() {
            return Ok(());
        }
        crate::priority::lower();
        while !self.has_ended()
            && let Some((at, host_pages)) = self.cursor.claim(&self.unread)
        {
            reader.fetch(at, host_pages)?;
        }
        Ok(())
    }
}

/// What one worker needs to read and place pages.
struct Reader<'a> {
    restore: &'a LazyRestore<'a>,
    /// Its number among all threads of the restore, which is also its slot in the fence.
    worker: usize,
    buffer: PageBuffer,
    /// The runs of host pages that it has claimed. Kept between pieces to reuse the memory.
    runs: Vec<PageRange>,
}

impl Reader<'_> {
    /// Reads and places those of the host pages `host_pages` that are unread and still missing.
    /// Returns the number of pages placed.
    fn fetch(&mut self, at: usize, host_pages: PageRange) -> Result<u64, JobError> {
        let Self { restore, worker, buffer, runs } = self;
        let (unread, missing) =
            (restore.unread.block(at), restore.missing_pages.missing().block(at));
        restore.unread.take_range(at, host_pages, |word, bits| {
            // A page that is not missing any more, for example discarded, need not be read.
            runs.extend(runs_of_word(word * WORD_BITS, bits & missing.bits().word(word)));
        });
        let mut placed = 0;
        for run in join_near_runs(runs.drain(..), NEAR / unread.unit()) {
            for range in in_extents(unread.pages(run)) {
                restore.job.check()?;
                restore.job.limiter.wait(range.bytes() as usize, &restore.job.cancel)?;
                if restore.has_ended() {
                    return Ok(placed);
                }
                let content = restore.read(at, range, buffer)?;
                placed += restore.place(*worker, at, range, content)?;
            }
        }
        Ok(placed)
    }
}
