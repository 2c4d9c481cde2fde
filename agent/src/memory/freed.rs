//! Memory that the guest frees and uses again without a word: a balloon that deflates by touching,
//! free page reporting.
//!
//! # The rule
//!
//! A freed page is a hole until the guest writes into it. From then on it is ordinary memory.
//! Nobody has to say so: the hole itself is the mark. So a free is two things:
//!
//! 1. it **punches** the page. A hole reads as zero, and every job leaves holes out: they are not
//!    read, sent, saved or allocated;
//! 2. it **marks the page in the dirty log**: it is a write of zeroes. What a destination has of
//!    the page, or the base of an increment, is stale, and the next sync says so. Then the page is
//!    dirty and a hole, and is announced as zero; the destination makes a hole of it.
//!
//! Both happen as well if there is no agent: the client does them, and the next agent finds them.
//!
//! A page that is discarded stays discarded, and is punched once more. While a restore fills the
//! memory, what was discarded of the guest before does not count: a page of it that is freed is
//! freed, as any other.
//!
//! # Holes that are known
//!
//! To ask the file about every dirty page would cost more than to read it. So each block keeps a
//! bit for each page that was freed and not found written since. It is a hint, and asking by it is
//! cheap: a guest that frees nothing has none. A reader takes the hints of the pages that it is
//! about to read, asks the file, and puts those back that are holes ([`Block::known_holes`]): those
//! are zero, and are not read. Where there is no hint a hole is read, which allocates nothing, and
//! is found to be zero: so a hint that is missing (a free without an agent, a VMM that punches by
//! itself) costs time, and no correctness.
//!
//! hugetlbfs does not tell its holes, so there are no hints for it. A freed page is read like any
//! other, reads as zero, and is not allocated by that. No bit could do better: nothing watches the
//! guest's writes between jobs, and a write must never be lost.
//!
//! # Order
//!
//! - A free goes the way of a discard ([`super::discard`]) until the page is punched: what a
//!   snapshot has still to save is saved, and what is still to come of a guest in postcopy is
//!   dropped, before the punch.
//! - The hint and the log come after the punch. Before it, a reader could take the hint, or a sync
//!   the mark, find the page allocated, and send what is stale; nobody would look again.
//! - Then the free waits for readers once more ([`after_punch`], which a model checker goes
//!   through). There is no mark that a reader could have seen before the punch. One that published
//!   its word before this wait may have found the page allocated, and is waited for; one that
//!   publishes later finds the hint and the hole. So nobody reads the page after the free is
//!   acknowledged, until the guest has written it.
//! - The instant of a snapshot may come between the first look for one and the punch. It may take
//!   the page for one that is to be saved, and for protected, which the punch undoes. So after the
//!   punch the free looks once more, and what is pending of the page is dropped: it is saved as
//!   zero. The guest has not heard yet that its free was done, so that is as right as what it held
//!   before.
//! - A job that fills memory for a guest that does not run yet is told by
//!   [`super::recorded_discards`].

use super::backing::{BackingError, BackingKind};
use super::block::{Block, GuestMemory};
use super::capture_steps::after_punch;
use super::discard::{Checked, DiscardError, may_be_read, merged};
use crate::waiting::may_wait;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappedBitmap;

impl GuestMemory {
    /// Frees `ranges`, rounded inward. Returns how many pages that are; those that are discarded
    /// are none of them, stay discarded, and are punched once more. If the file system cannot
    /// punch, the pages are as they were.
    ///
    /// # Errors
    /// If a range does not exist; nothing is changed then.
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

    /// Splits ranges into what is discarded and what is not.
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
        let note = || {
            if let Some(noted) = self.recorded() {
                pages.iter().for_each(|(index, range)| {
                    noted.freed(*index).set(*range);
                });
            }
        };
        self.give_back(pages, note, || {
            merged(pages).for_each(|(index, range)| self.blocks()[index].punch_freed(range));
        });
        let tell = || {
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
        after_punch(&self.readers, tell, |(missing_pages, copier), index, word| {
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
    /// A free cannot fail (`discard-cannot-fail`): if the file system cannot punch, nothing has
    /// happened to the pages.
    fn punch_freed(&self, range: PageRange) {
        if let Err(error) = self.backing.punch(range) {
            let id = self.geometry.id;
            log::warn!("block {id}: freed pages stay allocated: {}", crate::error::chain(&error));
        }
    }

    /// Says that freed pages are holes, as far as the file tells.
    fn hint_freed(&self, range: PageRange) {
        if self.backing.kind() != BackingKind::Hugetlb {
            self.freed.set(range);
        }
    }

    /// Those of the pages `pages` of word `word` that were freed, and are holes still: they are
    /// zero, and need not be read. To be called after the word was published in the fence, and
    /// after a tracker was cleared: a page that is written after this is reported.
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

    /// False if nothing was freed, or all of it was found written since.
    pub fn may_have_known_holes(&self) -> bool {
        self.freed.next_set(self.all()).is_some()
    }

    /// Takes those pages out of `pages` that were freed, and are holes still.
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
