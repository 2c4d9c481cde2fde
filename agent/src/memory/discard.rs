// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discard and populate: memory that the VMM unplugs, until the VMM plugs it again.
//!
//! After a discard the VMM tells the agent before the guest uses the pages again. Memory that the
//! guest frees and uses again without notice is in [`super::freed`], by the same steps.
//!
//! Three rules hold here. [`never-read`](crate::invariants#never-read): after
//! [`GuestMemory::discard`] returns, nobody reads the pages until they are populated.
//! [`discard-cannot-fail`](crate::invariants#discard-cannot-fail): a discard of pages that exist
//! cannot fail. [`round-safely`](crate::invariants#round-safely): a discard covers whole units
//! only, and a populate rounds outward.
//!
//! # Order
//!
//! Discards and populates come from one thread, that of the VMM's connection. In the meantime the
//! job's thread syncs the trackers, and workers read. This is what each bitmap means to them, and
//! why the order is right:
//!
//! - A discard sets `unsettled` before `discarded`, and clears it only after the punch. So a sync
//!   in between does not take a page that is still allocated for a stray write.
//! - A discard clears `stray` before it sets `discarded`. A worker that still saw the old stray bit
//!   has published its word, and the fence waits for this worker.
//! - `marking` is held while these three bitmaps change. A fix-up holds it, too, while it judges a
//!   page and sets `stray`: otherwise a page that is discarded again in between would become stray.
//! - A discard notes its pages in [`super::recorded_discards`] while it holds `marking`. A job that
//!   removes marks also holds it, so the job knows which marks the VMM has set since.
//! - [`GuestMemory::placing`] is locked out from before the marks until the discard is done.
//!   Otherwise a thread that places content from a peer could remove the marks between the marks
//!   and the punch, and leave a page that is zero and counts as populated.
//! - `changes` is odd from before the first mark until after the last. So a thread that has seen a
//!   mark, or a log entry of a populate, does not take the bitmaps for unchanged.
//! - Pages that a snapshot has not saved yet are captured after the marks and before the punch. See
//!   [`super::copy_before_write`].
//! - Pages that are missing (postcopy, lazy restore) are dropped after the marks, and again after
//!   the fence. Then the discard waits for the faults that were read before, and punches. See
//!   [`super::missing_pages`].
//! - A populate clears `discarded` first and marks the log after that. A sync in between may drop
//!   the pages, and the next sync finds them in the log. A populate holds `marking` during both
//!   steps, and so does the instant of a snapshot. So at the instant, a page that was discarded
//!   since the base of an increment is either discarded or in the log. It never counts as
//!   unchanged.

use super::block::Block;
use super::capture_ordering::before_punch;
use super::copy_before_write::CopyBeforeWrite;
use super::guest_memory::GuestMemory;
use super::missing_pages::MissingPages;
use crate::waiting::may_wait;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{PageRange, RangeError};
use pageferry_protocol::shm::bitmap::WORD_BITS;

/// Why a discard, free or populate was refused.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// There is no such block.
    #[error("range {index}: block {id} does not exist")]
    NoBlock {
        /// Index of the range in the request.
        index: usize,
        /// The block.
        id: u32,
    },
    /// The range is not in the block.
    #[error("range {index} of block {id}")]
    Range {
        /// Index of the range in the request.
        index: usize,
        /// The block.
        id: u32,
        /// What is wrong.
        #[source]
        source: RangeError,
    },
}

/// A checked range: index of the block, and its pages.
pub(super) type Checked = (usize, PageRange);

impl GuestMemory {
    /// Marks `ranges`, rounded inward, as discarded. With `punch`, also frees them. Returns how
    /// many pages were not discarded before.
    ///
    /// # Errors
    /// If a range does not exist. Nothing is changed then.
    pub fn discard(&self, ranges: &[BlockRange], punch: bool) -> Result<u64, DiscardError> {
        may_wait("discard: readers, the disk of a snapshot, the file system");
        let checked = self.check(ranges, PageRange::inward)?;
        let _giving_back = self.giving_back();
        Ok(self.discard_checked(&checked, punch))
    }

    /// Discards pages. The caller holds [`GuestMemory::giving_back`].
    pub(super) fn discard_checked(&self, checked: &[Checked], punch: bool) -> u64 {
        let _change = self.change();
        let mark = || {
            let mut changed = 0;
            let recorded = self.recorded();
            for (index, range) in checked {
                if let Some(recorded) = &recorded {
                    recorded.discarded(*index).set(*range);
                }
                let block = &self.blocks()[*index];
                block.unsettled.set(*range);
                block.stray.clear(*range);
                changed += block.discarded.set(*range);
            }
            changed
        };
        self.give_back(checked, mark, || {
            if punch {
                self.punch_marked(checked);
            }
        })
    }

    /// Frees pages that were found discarded, and does not mark them. A job that fills the memory
    /// may have removed their marks since; they are freed all the same.
    pub(super) fn free_discarded(&self, checked: &[Checked]) {
        let _change = self.change();
        let mark = || {
            let recorded = self.recorded();
            for (index, range) in checked {
                if let Some(recorded) = &recorded {
                    recorded.freed(*index).set(*range);
                }
                let block = &self.blocks()[*index];
                block.unsettled.set(*range);
                block.stray.clear(*range);
            }
        };
        self.give_back(checked, mark, || self.punch_marked(checked));
    }

    fn punch_marked(&self, checked: &[Checked]) {
        merged(checked).for_each(|(index, range)| punch_marked(&self.blocks()[index], range));
    }

    /// The steps of a discard and of a free: `mark` sets the marks; `punch` frees the pages, when
    /// no thread reads or places them any more. Returns the result of `mark`.
    pub(super) fn give_back<R>(
        &self, checked: &[Checked], mark: impl FnOnce() -> R, punch: impl Fn(),
    ) -> R {
        let (marked, copier) = self.marking.mark_discarded(mark);
        for (index, range) in checked {
            self.blocks()[*index].owed.iter().for_each(|owed| owed.forget(*range));
        }
        let (missing_pages, copier) = (self.missing_pages(), copier.as_deref());
        let missing_pages = missing_pages.as_deref();
        let drop_missing = || {
            if let Some(missing_pages) = missing_pages {
                checked
                    .iter()
                    .for_each(|(index, range)| missing_pages.drop_missing(*index, *range));
            }
        };
        let capture = || {
            if let Some(copier) = copier {
                merged(checked).for_each(|(index, range)| {
                    copier.copy_before_discard(&self.readers, index, range)
                });
            }
            drop_missing();
        };
        before_punch(&self.readers, capture, |index, word| {
            may_be_read(checked, missing_pages, copier, index, word)
        });
        drop_missing();
        let seen = missing_pages.map(MissingPages::wait_for_fault_handlers);
        punch();
        if let Some((missing_pages, seen)) = missing_pages.zip(seen)
            && missing_pages.were_faults_handled_since(seen)
        {
            // A fault whose thread was served before the punch can be read late, and zero is then
            // placed behind the punch. The discard is not acknowledged yet, so the guest uses none
            // of these pages, and they can be punched again.
            missing_pages.wait_for_fault_handlers();
            punch();
        }
        if let Some(observer) = self.discard_observer() {
            checked.iter().for_each(|(index, range)| observer.on_freed(*index, *range));
        }
        if let Some(missing_pages) = missing_pages {
            checked.iter().for_each(|(index, range)| missing_pages.wake_waiting(*index, *range));
        }
        marked
    }

    /// Marks `ranges`, rounded outward, as populated. Returns how many pages were discarded before.
    /// These count as written, because the destination's content of them, if it has any, is stale.
    ///
    /// # Errors
    /// If a range does not exist. Nothing is changed then.
    pub fn populate(&self, ranges: &[BlockRange]) -> Result<u64, DiscardError> {
        may_wait("populate: the instant of a snapshot");
        let checked = self.check(ranges, PageRange::outward)?;
        let _giving_back = self.giving_back();
        let _change = self.change();
        let mut changed = 0;
        let _marking = self.marking.lock();
        let observer = self.discard_observer();
        for (index, range) in checked {
            // A VMM that punches by itself has done so since the discard: its observer must hear of
            // it, too.
            if let Some(observer) = &observer {
                observer.on_freed(index, range);
            }
            let block = &self.blocks()[index];
            let first_log_page = block.geometry.first_log_page();
            block.discarded.take(range, |word, bits| {
                changed += u64::from(bits.count_ones());
                if let Some(log) = &self.log {
                    log.log.bits().or_at(first_log_page + word * WORD_BITS, bits);
                }
            });
            block.stray.clear(range);
            block.unsettled.clear(range);
        }
        Ok(changed)
    }

    /// Finds the blocks of `ranges`, and rounds the ranges.
    pub(super) fn check(
        &self, ranges: &[BlockRange],
        round: fn(u64, u64, u64, u64) -> Result<PageRange, RangeError>,
    ) -> Result<Vec<Checked>, DiscardError> {
        let check_one = |(index, range): (usize, &BlockRange)| {
            let id = range.block;
            let (at, block) = self.find(id).ok_or(DiscardError::NoBlock { index, id })?;
            let geometry = &block.geometry;
            let pages = round(range.offset, range.length, block.discard_unit(), geometry.length)
                .map_err(|source| DiscardError::Range { index, id, source })?;
            Ok((at, pages))
        };
        ranges.iter().enumerate().map(check_one).collect()
    }
}

/// True if a thread that has published word `word` of the block at index `index` may be reading or
/// placing a page of these ranges.
pub(super) fn may_be_read(
    checked: &[Checked], missing_pages: Option<&MissingPages>, copier: Option<&CopyBeforeWrite>,
    index: usize, word: u64,
) -> bool {
    let read = match (missing_pages, copier) {
        (Some(missing_pages), _) => missing_pages.published_pages(index, word),
        (None, Some(copier)) => copier.published_pages(index, word),
        (None, None) => PageRange::new(word * WORD_BITS, WORD_BITS),
    };
    checked.iter().any(|(other, range)| *other == index && range.overlaps(&read))
}

/// Merges neighbouring ranges. A balloon gives pages back one by one, and one call to the kernel,
/// or to the disk, is enough for all of them.
pub(super) fn merged(ranges: &[Checked]) -> impl Iterator<Item = Checked> + '_ {
    let mut rest = ranges.iter().filter(|(_, range)| !range.is_empty()).peekable();
    std::iter::from_fn(move || {
        let (index, mut range) = *rest.next()?;
        while let Some((_, next)) =
            rest.next_if(|(other, next)| *other == index && next.first == range.end())
        {
            range.count += next.count;
        }
        Some((index, range))
    })
}

/// Frees the backing of pages that are marked. A discard cannot fail
/// ([`discard-cannot-fail`](crate::invariants#discard-cannot-fail)): if the file system cannot
/// punch, the pages stay allocated, unsettled and discarded.
fn punch_marked(block: &Block, range: PageRange) {
    match block.backing.punch(range) {
        Ok(freed) if block.backing.tells_holes() => {
            block.unsettled.clear(freed);
        }
        // A sync between the marks and the punch has taken the unsettled mark, and the next sync
        // may report what the punch did to the mapping. So the pages must stay unsettled until
        // after that sync.
        Ok(_) => {
            block.unsettled.set(range);
        }
        Err(error) => {
            log::warn!(
                "block {}: discarded pages stay allocated: {}",
                block.geometry.id,
                crate::error::chain(&error)
            );
        }
    }
}

#[cfg(test)]
mod tests;
