// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free: memory that the guest gives back and uses again without notice, as with a balloon that
//! deflates by touching pages, or with free page reporting.
//!
//! # The rule
//!
//! A freed page is a hole until the guest writes to it. From then on it is ordinary memory. Nobody
//! has to report this, because the hole itself is the mark. So a free does two things:
//!
//! 1. It **punches** the page. A hole reads as zero, and every job leaves holes out: they are not
//!    read, sent, saved or allocated.
//! 2. It **marks the page in the dirty log**, because it is a write of zeroes. What a destination
//!    or the base of an increment has of the page is stale, and the next sync says so. Then the
//!    page is dirty and a hole, so it is sent as zero, and the destination makes a hole of it.
//!
//! Without an agent the client does both, and the next agent finds the result.
//!
//! A page that is discarded stays discarded, and is punched once more. During a restore, the marks
//! of discards from before the restore do not count: such a page is freed like any other.
//!
//! # Known holes
//!
//! To ask the file about every dirty page would cost more than to read the page. So each block
//! keeps a bit for each page that was freed and is not known to be written since. The bit is a
//! hint: it is cheap to look up, and a guest that frees nothing has none. A reader takes the hints
//! of the pages that it is about to read, asks the file about these pages, and puts back the hints
//! of those that are holes ([`Block::known_holes`]). These pages are zero and are not read. A hole
//! without a hint is read, which allocates nothing, and is found to be zero. So a missing hint,
//! after a free without an agent or a punch by the VMM, costs time and never correctness.
//!
//! hugetlbfs does not report holes, so it has no hints. A freed page there is read like any other,
//! reads as zero, and is not allocated by that. A bit alone could not do better: nothing watches
//! the guest's writes between jobs, and no write may be lost.
//!
//! # Order
//!
//! - Until the punch, a free takes the same steps as a discard ([`super::discard`]): the pages that
//!   a snapshot has not saved yet are captured, and missing pages are dropped.
//! - The hint and the log entry come after the punch. If they came before it, a reader could take
//!   the hint, or a sync the log entry, find the page still allocated, and send stale content.
//!   Nothing would make it look again.
//! - Then the free waits for readers once more ([`after_punch`], which a model checker covers),
//!   because there was no mark that a reader could see before the punch. A reader that published
//!   its word before this wait may have found the page allocated, and the free waits for it. A
//!   reader that publishes later finds the hint and the hole. So after the acknowledgement nobody
//!   reads the page until the guest has written to it.
//! - The instant of a snapshot may come after the free has looked for a snapshot and before the
//!   punch. Then the snapshot may count the page as pending and as protected, and the punch undoes
//!   the protection. So the free looks for a snapshot once more after the punch, and drops the page
//!   from the pending ones: it is saved as zero. The free is not acknowledged yet, so zero is as
//!   correct as the old content.
//! - A job that fills memory before its guest runs learns of frees from
//!   [`super::recorded_discards`].

use super::backing::{BackingError, BackingKind};
use super::block::Block;
use super::capture_ordering::after_punch;
use super::discard::{Checked, DiscardError, may_be_read, merged};
use super::guest_memory::GuestMemory;
use crate::waiting::may_wait;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappedBitmap;

impl GuestMemory {
    /// Frees `ranges`, rounded inward. Returns the number of freed pages. Pages that are discarded
    /// do not count: they stay discarded, and are punched once more. If the file system cannot
    /// punch, the pages stay as they were.
    ///
    /// # Errors
    /// If a range does not exist. Nothing is changed then.
    pub fn free(&self, ranges: &[BlockRange]) -> Result<u64, DiscardError> {
        may_wait("free: readers, the disk of a snapshot, the file system");
        let checked = self.check(ranges, PageRange::inward)?;
        let _giving_back = self.giving_back();
        let (discarded, freed) = self.by_kind(&checked);
        if !discarded.is_empty() {
            self.free_discarded(&discarded);
        }
        if !freed.is_empty() {
            self.free_checked(&freed);
        }
        Ok(freed.iter().map(|(_, range)| range.count).sum())
    }

    /// Splits ranges into the discarded pages and the others.
    fn by_kind(&self, checked: &[Checked]) -> (Vec<Checked>, Vec<Checked>) {
        let (mut discarded, mut others) = (Vec::new(), Vec::new());
        for (index, range) in checked {
            let mut from = range.first;
            let rest = |from: u64| PageRange::new(from, range.end() - from);
            for run in self.blocks()[*index].discarded.runs(*range) {
                others.push((*index, PageRange::new(from, run.first - from)));
                discarded.push((*index, run));
                from = run.end();
            }
            others.push((*index, rest(from)));
        }
        others.retain(|(_, range)| !range.is_empty());
        (discarded, others)
    }

    fn free_checked(&self, pages: &[Checked]) {
        let record = || {
            if let Some(recorded) = self.recorded() {
                pages.iter().for_each(|(index, range)| {
                    recorded.freed(*index).set(*range);
                });
            }
        };
        self.give_back(pages, record, || {
            merged(pages).for_each(|(index, range)| self.blocks()[index].punch_freed(range));
        });
        let announce = || {
            for (index, range) in merged(pages) {
                self.blocks()[index].hint_freed(range);
                self.mark_log(index, range);
            }
            let copier = self.marking.running_snapshot();
            if let Some(copier) = &copier {
                merged(pages).for_each(|(index, range)| copier.drop_freed(index, range));
            }
            (self.missing_pages(), copier)
        };
        after_punch(&self.readers, announce, |(missing_pages, copier), index, word| {
            may_be_read(pages, missing_pages.as_deref(), copier.as_deref(), index, word)
        });
    }

    fn mark_log(&self, index: usize, range: PageRange) {
        if let Some(log) = &self.log {
            let first = self.blocks()[index].geometry.first_log_page();
            log.log.mark(PageRange::new(first + range.first, range.count));
        }
    }
}

impl Block {
    /// A free cannot fail (`discard-cannot-fail`): if the file system cannot punch, the pages
    /// simply keep their content.
    fn punch_freed(&self, range: PageRange) {
        if let Err(error) = self.backing.punch(range) {
            let id = self.geometry.id;
            log::warn!("block {id}: freed pages stay allocated: {}", crate::error::chain(&error));
        }
    }

    /// Sets the hints of freed pages, if the file reports holes.
    pub(crate) fn hint_freed(&self, range: PageRange) {
        if self.backing.kind() != BackingKind::Hugetlb {
            self.freed.set(range);
        }
    }

    /// Those of the pages `pages` of word `word` that were freed and are still holes: they are zero
    /// and need not be read. Call this after the word is published in the fence and the tracker is
    /// cleared. Then the tracker reports a page that is written after this.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn known_holes(&self, word: u64, pages: u64) -> Result<u64, BackingError> {
        let hints = self.freed.take_bits(word, pages);
        if hints == 0 {
            return Ok(0);
        }
        let allocated = self.backing.allocated(word, hints);
        let holes = hints & !*allocated.as_ref().unwrap_or(&0);
        self.freed.or_word(word, holes);
        allocated.map(|_| holes)
    }

    /// False if nothing was freed, or all freed pages are known to be written since.
    pub fn may_have_known_holes(&self) -> bool {
        self.freed.next_set(self.all()).is_some()
    }

    /// Removes from `pages` those that were freed and are still holes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn take_known_holes(&self, pages: &MappedBitmap) -> Result<(), BackingError> {
        for (word, hints) in self.freed.nonzero_words(self.all()) {
            let suspects = hints & pages.word(word);
            if suspects != 0 {
                pages.take_bits(word, self.known_holes(word, suspects)?);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
