//! Discarding and populating: memory that the VMM unplugs, until it says that it is plugged again.
//! What the guest frees and then uses again without a word is in [`super::freed`], by the same
//! steps.
//!
//! `never-read`: once [`GuestMemory::discard`] returned, nobody reads the pages until they are
//! populated. `discard-cannot-fail`: it cannot fail for pages that exist; `round-safely`: it covers
//! whole units only, and a populate rounds outward.
//!
//! Discards and populates come from one thread, that of the VMM's connection, while the job's
//! thread syncs and its workers read. What each bitmap means to them, and why the order below is
//! right:
//!
//! - `unsettled` is set before `discarded`, and cleared only after the punch: a sync in between
//!   does not take what is still allocated for a stray write.
//! - `stray` is cleared before `discarded` is set: a worker that still saw the old stray bit has
//!   published its word, and the fence waits for it.
//! - `marking` is held while these three are set, and while a fix-up judges a page and sets
//!   `stray`: or a page that is discarded once more between the two would be stray again.
//! - what [`super::recorded_discards`] has of it is noted with `marking` held, too: whoever takes
//!   marks back with it held knows which of them are the VMM's word since.
//! - [`GuestMemory::placing`] is kept out from before the marks until all is done. Whoever places
//!   what a peer sent takes marks back: between the marks and the punch that would leave a page
//!   that is zero, and populated.
//! - `changes` is odd from before the first mark until after the last: whoever saw a mark, or what
//!   a populate wrote into the log, does not take the bitmaps for unchanged.
//! - what is still to be saved as it was is saved after the marks and before the punch; see
//!   [`super::copy_before_write`];
//! - what is still to come of a guest in postcopy is dropped after the marks and again behind the
//!   fence, before the punch, and so are faults waited for that were read before; see
//!   [`super::missing_pages`];
//! - a populate clears `discarded` first and marks the log after: a sync that comes between them
//!   may drop the pages, and finds them in the log the next time. It does both with `marking` held:
//!   at the instant of a snapshot, which is taken with it held, a page that was discarded since the
//!   base of an increment is either discarded or in the log, and never as in the base.

use super::block::{Block, GuestMemory};
use super::capture_steps::before_punch;
use super::copy_before_write::CopyBeforeWrite;
use super::missing_pages::MissingPages;
use crate::waiting::may_wait;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::{PageRange, RangeError};
use pageferry_protocol::shm::bitmap::WORD_BITS;

/// A range that does not exist.
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
    #[error("range {index} of block {id}: {source}")]
    Range {
        /// Index of the range in the request.
        index: usize,
        /// The block.
        id: u32,
        /// What is wrong.
        source: RangeError,
    },
}

/// A checked range: index of the block, and its pages.
pub(super) type Checked = (usize, PageRange);

impl GuestMemory {
    /// Marks `ranges`, rounded inward, as discarded; with `punch` frees them. Returns how many
    /// pages were not discarded before.
    ///
    /// # Errors
    /// If a range does not exist; nothing is changed then.
    pub fn discard(&self, ranges: &[BlockRange], punch: bool) -> Result<u64, DiscardError> {
        may_wait("discard: readers, the disk of a snapshot, the file system");
        let checked = self.check(ranges, PageRange::inward)?;
        let _giving_back = self.giving_back();
        Ok(self.discard_checked(&checked, punch))
    }

    /// Discards pages. Nothing that came is between its write and its marks.
    pub(super) fn discard_checked(&self, checked: &[Checked], punch: bool) -> u64 {
        let _change = self.change();
        let mark = || {
            let mut changed = 0;
            let noted = self.recorded();
            for (index, range) in checked {
                if let Some(noted) = &noted {
                    noted.discarded(*index).set(*range);
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

    /// Frees pages that are discarded, and sets no mark. A job that fills the memory may have found
    /// meanwhile that they are not discarded any more; then they are freed.
    pub(super) fn free_discarded(&self, checked: &[Checked]) {
        let _change = self.change();
        let mark = || {
            let noted = self.recorded();
            for (index, range) in checked {
                if let Some(noted) = &noted {
                    noted.freed(*index).set(*range);
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

    /// The steps of both kinds of discard: `mark` sets the marks, and `punch` frees the pages once
    /// they are in nobody's hands any more. Returns what `mark` does.
    pub(super) fn give_back<R>(
        &self, checked: &[Checked], mark: impl FnOnce() -> R, punch: impl FnOnce(),
    ) -> R {
        let (marked, copier) = self.marking.discard(mark);
        let (missing_pages, copier) = (self.missing_pages(), copier.as_deref());
        let missing_pages = missing_pages.as_deref();
        let drop_owed = || {
            if let Some(missing_pages) = missing_pages {
                checked
                    .iter()
                    .for_each(|(index, range)| missing_pages.drop_missing(*index, *range));
            }
        };
        let rescue = || {
            if let Some(copier) = copier {
                merged(checked)
                    .for_each(|(index, range)| copier.copy_before_discard(self, index, range));
            }
            drop_owed();
        };
        before_punch(&self.readers, rescue, |index, word| {
            may_be_read(checked, missing_pages, copier, index, word)
        });
        drop_owed();
        if let Some(missing_pages) = missing_pages {
            missing_pages.wait_for_fault_handlers();
        }
        punch();
        if let Some(freed) = self.discard_observer() {
            checked.iter().for_each(|(index, range)| freed.on_freed(*index, *range));
        }
        if let Some(missing_pages) = missing_pages {
            checked.iter().for_each(|(index, range)| missing_pages.resolve_waiting(*index, *range));
        }
        marked
    }

    /// Marks `ranges`, rounded outward, as populated. Returns how many pages were discarded before.
    /// They count as written: what the destination has of them, if anything, is stale.
    ///
    /// # Errors
    /// If a range does not exist; nothing is changed then.
    pub fn populate(&self, ranges: &[BlockRange]) -> Result<u64, DiscardError> {
        may_wait("populate: the instant of a snapshot");
        let checked = self.check(ranges, PageRange::outward)?;
        let _change = self.change();
        let mut changed = 0;
        let _marking = self.marking.hold();
        let freed = self.discard_observer();
        for (index, range) in checked {
            // If the VMM frees by itself it did so since the discard.
            if let Some(freed) = &freed {
                freed.on_freed(index, range);
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

    /// Finds the blocks of `ranges`, and rounds them.
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

/// True if whoever has published word `word` of the block at index `index` may be at a page of
/// these ranges.
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

/// Ranges that touch, made one: a balloon gives pages back one by one, and the kernel, or the disk,
/// is asked once.
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

/// Frees the backing of pages that are marked. A discard cannot fail (`discard-cannot-fail`): if
/// the file system cannot punch, the pages stay allocated and unsettled, and are no less discarded.
fn punch_marked(block: &Block, range: PageRange) {
    match block.backing.punch(range) {
        Ok(freed) if block.backing.tells_holes() => {
            block.unsettled.clear(freed);
        }
        // A sync that came between the marks and the punch took the mark, and its successor finds
        // what the punch did to the mapping.
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
