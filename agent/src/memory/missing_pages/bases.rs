// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The missing pages of clones, which come into their bases.

use super::{MissingPages, words_of};
use crate::memory::base_placer::BasePlacer;
use crate::memory::fence::Readers;
use crate::memory::page_placer::PlaceError;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use std::sync::Arc;

impl MissingPages {
    /// The pages of the blocks that are clones' come into these bases.
    #[must_use]
    pub fn with_bases(mut self, bases: Vec<Option<Arc<BasePlacer>>>) -> Self {
        self.placer.set_bases(bases);
        self
    }

    /// The base of the block at index `at`, if it is a clone's.
    pub fn base(&self, at: usize) -> Option<&Arc<BasePlacer>> {
        self.placer.base(at)
    }

    /// The base has the pages `range`, from another agent: as [`MissingPages::place_pages`],
    /// without their content.
    pub fn found_in_base(
        &self, readers: &Readers, worker: usize, at: usize, range: PageRange,
    ) -> u64 {
        let mut used = 0;
        for (word, mask) in words_of(range) {
            let _reading = readers.reading(worker, at, word);
            let taken = self.missing.take(at, word, mask);
            for run in runs_of_word(word * WORD_BITS, taken) {
                // If this fails, a touch of the page is a fault of its own.
                let _ = self.placer.map_base(at, run);
            }
            self.finish_placed(at, word, taken, &mut used);
        }
        if used > 0 && self.missing.remaining_pages() == 0 {
            self.notify();
        }
        used
    }

    /// Makes zero of all pages of a clone that are not `present` in the image, so that what has no
    /// page is known by its entry ([`crate::memory::clone_view`]).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn fill_holes(&self, at: usize, present: &MappedBitmap) -> Result<(), PlaceError> {
        /// What one call fills at most: other threads that change mappings wait for it.
        const STEP: u64 = (64 << 20) / PAGE_SIZE;
        let fill = |from: u64, to: u64| {
            let mut first = from;
            while first < to {
                let run = PageRange::new(first, STEP.min(to - first));
                self.placer.fill_zero(at, run).map_err(self.placer.failed(at))?;
                first = run.end();
            }
            Ok(())
        };
        let mut next = 0;
        for run in present.runs(present.all()) {
            fill(next, run.first)?;
            next = run.end();
        }
        fill(next, present.all().end())
    }
}
