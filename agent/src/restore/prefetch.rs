// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Prefetch: reading the pages that the guest does not wait for yet (lazy restore).
//!
//! 1. The working set comes first, from before the VMM loads its state. All workers read it at
//!    normal priority, in the order in which it lies in the image.
//! 2. All other pages follow once the gate opens: when the guest runs, and is idle if its touches
//!    are recorded. The workers continue behind the last fault, and at a lower priority, so that
//!    they do not delay the pages that the guest waits for.
//!
//! All reads count towards the bandwidth limit of the job. While there is one, a store is not asked
//! for more than what is read.

use super::image_pages::ImagePages;
use super::queues::{PrefetchGate, WorkingSetPieces};
use crate::image::chain::in_extents;
use crate::job::{JobError, add};
use crate::memory::PageBuffer;
use crate::memory::runs::{NEAR, join_near_runs};
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};

/// A worker that prefetches.
#[derive(Debug)]
pub struct Prefetcher<'a> {
    pages: &'a ImagePages<'a>,
    /// Its number among all threads of the restore, which is also its slot in the fence.
    worker: usize,
    buffer: PageBuffer,
    /// The runs of host pages that it has claimed. Kept between pieces to reuse the memory.
    runs: Vec<PageRange>,
}

impl<'a> Prefetcher<'a> {
    /// The worker with the number `worker`.
    pub fn new(pages: &'a ImagePages<'a>, worker: usize) -> Self {
        Self { pages, worker, buffer: PageBuffer::new(EXTENT_SIZE as usize), runs: Vec::new() }
    }

    /// Prefetches the working set `pieces`, and after `gate` opens all other pages, until no page
    /// is unread or the restore has ended.
    ///
    /// # Errors
    /// If the image cannot be read or is damaged, or if a page cannot be placed.
    pub fn run(&mut self, pieces: &WorkingSetPieces, gate: &PrefetchGate) -> Result<(), JobError> {
        let pages = self.pages;
        while !pages.has_ended()
            && let Some((at, piece)) = pieces.claim()
        {
            let placed = self.fetch(at, pages.unread.block(at).covering(piece))?;
            add(&pages.job.live.working_set_pages, placed);
        }
        if !gate.wait() {
            return Ok(());
        }
        crate::priority::lower();
        while !pages.has_ended()
            && let Some((at, host_pages)) = pages.cursor.claim(&pages.unread)
        {
            self.fetch(at, host_pages)?;
        }
        Ok(())
    }

    /// Reads and places those of the host pages `host_pages` that are unread and still missing.
    /// Returns the number of pages placed.
    fn fetch(&mut self, at: usize, host_pages: PageRange) -> Result<u64, JobError> {
        let Self { pages, worker, buffer, runs } = self;
        let (unread, missing) = (pages.unread.block(at), pages.missing_pages.missing().block(at));
        pages.unread.take_range(at, host_pages, |word, bits| {
            // A page that is not missing any more, for example discarded, need not be read.
            runs.extend(runs_of_word(word * WORD_BITS, bits & missing.bits().word(word)));
        });
        let mut placed = 0;
        for run in join_near_runs(runs.drain(..), NEAR / unread.unit()) {
            for range in in_extents(unread.pages(run)) {
                pages.job.check()?;
                pages.job.limiter.wait(range.bytes() as usize, &pages.job.cancel)?;
                if pages.has_ended() {
                    return Ok(placed);
                }
                let Some(base) = pages.missing_pages.base(at) else {
                    let content = pages.read(at, range, buffer)?;
                    placed += pages.place(*worker, at, range, content)?;
                    continue;
                };
                let _reading = base.read_alone(range.first, || pages.has_ended());
                for run in pages.leave_to_base(*worker, at, range, &mut placed) {
                    let content = pages.read(at, run, buffer)?;
                    placed += pages.place(*worker, at, run, content)?;
                }
            }
        }
        Ok(placed)
    }
}
