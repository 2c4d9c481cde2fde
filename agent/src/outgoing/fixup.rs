//! Asking the trackers, and clearing what is discarded. `fix-up-after-sync` lives here.
//!
//! # On dirty bits of discarded pages
//!
//! A dirty bit in a discarded range means one of two things. Either the guest wrote *before* the
//! discard, and the bit is stale: following it would read memory that was given back. Or it wrote
//! *after*, into memory that it had promised not to use: a stray write, which migrates, as it does
//! with QEMU, since a guest that does so may rely on it. The tracker cannot tell the two apart, but
//! the backing can: the discard punched the page, so if it is allocated at the sync, something
//! wrote to it since.
//!
//! That holds only for pages that were punched, on a backing that tells its holes. All others are
//! *unsettled* until a sync has come and gone: whatever that sync reports of them may be older than
//! the discard and is dropped; what the next one reports is not.
//!
//! Nor is a report believed that may mean a neighbour: write-protect scanning tells no page of a
//! transparent huge page from the others.
//!
//! The fix-up comes after the sync. Before it, the sync would bring the stale bits back. And what
//! it drops is dropped in the VMM's tracker, too, if that one does not clear by itself; otherwise
//! the same stale bit would return with every sync, and be taken for a stray write at the next.
//!
//! At the first sync all discarded pages are dropped: nothing before the start of the tracker is
//! known.
//!
//! Discards and populates go on meanwhile. See [`crate::memory::discard`] for why each interleaving
//! is right.

use super::Migration;
use super::sender::PassView;
use crate::job::{JobError, add, micros};
use crate::memory::{Block, GuestMemory};
use crate::tracking::{DirtyPages, LogTracker, Tracker, Trackers};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use pageferry_protocol::stream::payload::{MAX_RUNS, encode_runs};
use pageferry_protocol::stream::{Kind, RecordHeader};
use std::time::Instant;

/// No value that [`GuestMemory::changes`] has while nothing is under way.
const NEVER: u64 = u64::MAX;

/// What is dirty, and what the destination was told of discards.
#[derive(Debug)]
pub struct DirtyState {
    /// Pages to send.
    pub pages: DirtyPages,
    /// Pages that the destination holds as discarded.
    pub(super) announced: DirtyPages,
    /// What was unsettled when the sync began.
    settling: DirtyPages,
    /// Pages whose bit the fix-up dropped.
    dropped: DirtyPages,
    pub(super) remaining: u64,
    /// See [`GuestMemory::changes`]: when the unsettled pages were last taken, and when the
    /// destination was last told.
    settled_at: u64,
    announced_at: u64,
    /// There is something in `settling`.
    settles: bool,
    /// Stray pages were found since the destination was last told.
    found_stray: bool,
}

impl DirtyState {
    /// Nothing is dirty, and nothing was told.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn new(memory: &GuestMemory) -> Result<Self, MappingError> {
        Ok(Self {
            pages: DirtyPages::none(memory)?,
            announced: DirtyPages::none(memory)?,
            settling: DirtyPages::none(memory)?,
            dropped: DirtyPages::none(memory)?,
            remaining: 0,
            settled_at: NEVER,
            announced_at: NEVER,
            settles: false,
            found_stray: false,
        })
    }

    /// Dirty pages after the last sync.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Drops the stale bits of one block, in the tracker, too, if that does not do so by itself.
    fn fix_up(
        &mut self, memory: &GuestMemory, at: usize, trackers: &Trackers, first_sync: bool,
    ) -> Result<(), JobError> {
        let block = &memory.blocks()[at];
        let (dirty, settling, dropped) =
            (self.pages.block(at), self.settling.block(at), self.dropped.block(at));
        let mut any = false;
        // What is dirty is little; what is discarded may be most of the guest.
        for (word, dirty_pages) in dirty.nonzero_words(block.all()) {
            let suspects = dirty_pages & block.discarded.word(word);
            if suspects == 0 {
                continue;
            }
            // A discard has marked all of its pages, or none.
            let _marking = memory.marking.hold();
            let unsure = settling.word(word) | block.unsettled.word(word);
            let known = suspects & block.stray.word(word);
            let mut stray = 0;
            if !first_sync {
                let written = written_since(block, word, suspects & !unsure & !known)?;
                // Where the tracker may mean a neighbour the discard is believed: what is discarded
                // is not read on a suspicion.
                stray = known | written & !trackers.imprecise(block, word, written)?;
            }
            self.found_stray |= block.stray.or_word(word, stray) != 0;
            dropped.or_word(word, dirty.take_bits(word, suspects & !stray));
            any = true;
        }
        if any {
            if let Some(lazy) = trackers.lazy_clear() {
                lazy.clear(block.geometry.id, dropped, block.all())?;
            }
            dropped.clear(block.all());
        }
        Ok(())
    }
}

/// Those of the pages `suspects`, all discarded and settled, that the guest wrote into since.
fn written_since(block: &Block, word: u64, suspects: u64) -> Result<u64, JobError> {
    if !block.backing.tells_holes() {
        return Ok(suspects);
    }
    block
        .backing
        .allocated(word, suspects)
        .map_err(|source| JobError::Backing { id: block.geometry.id, source })
}

impl Migration {
    /// Starts the trackers. What they report by now is older than the start, and pass 0 adds all
    /// that is allocated, chunk by chunk.
    pub(super) fn start_tracking(&mut self) -> Result<(), JobError> {
        let memory = self.job.memory.clone();
        for block in memory.blocks() {
            block.stray.clear(block.all());
        }
        self.trackers.start(&memory)?;
        self.ask_trackers()?;
        self.clear_discarded(true)?;
        // For whoever watches: what pass 0 will find is known when it has.
        self.dirty.remaining =
            memory.blocks().iter().map(|block| block.backing.allocated_pages()).sum();
        Ok(())
    }

    /// Asks the trackers what was written since the last time.
    pub(super) fn sync(&mut self) -> Result<(), JobError> {
        self.ask_trackers()?;
        self.clear_discarded(false)
    }

    fn ask_trackers(&mut self) -> Result<(), JobError> {
        self.job.check()?;
        let started = Instant::now();
        let memory = self.job.memory.clone();
        let changes = memory.changes();
        if !memory.is_unchanged(self.dirty.settled_at) {
            for (at, block) in memory.blocks().iter().enumerate() {
                let settling = self.dirty.settling.block(at);
                // Only what is still waiting for its first sync; what a discard that is under way
                // sets after this is looked at where it is.
                block.unsettled.take(block.all(), |word, bits| {
                    settling.or_word(word, bits);
                });
            }
            (self.dirty.settled_at, self.dirty.settles) = (changes, true);
        }
        self.trackers.sync(&memory, &self.dirty.pages)?;
        self.pace.synced(started.elapsed());
        Ok(())
    }

    fn clear_discarded(&mut self, first_sync: bool) -> Result<(), JobError> {
        let memory = self.job.memory.clone();
        let started = Instant::now();
        for (at, block) in memory.blocks().iter().enumerate() {
            self.dirty.fix_up(&memory, at, &self.trackers, first_sync)?;
            if self.dirty.settles {
                self.dirty.settling.block(at).clear(block.all());
            }
        }
        self.dirty.settles = false;
        self.dirty.remaining = self.dirty.pages.count();
        self.pace.synced_more(started.elapsed());
        let (remaining, sync) = (self.dirty.remaining, self.pace.sync_time());
        self.job.count(|counters| {
            counters.remaining_pages = remaining;
            counters.sync_us = micros(sync);
        });
        Ok(())
    }

    /// Tells the destination what is discarded and what it does not know yet; stray pages are none
    /// of it. Comes before the pages of a pass.
    pub(super) fn send_discards(&mut self) -> Result<(), JobError> {
        let memory = self.job.memory.clone();
        let changes = memory.changes();
        // With neither discards nor populates nor stray pages since the last time there is no news,
        // and the fix-up has left no dirty page that was told.
        if memory.is_unchanged(self.dirty.announced_at) && !self.dirty.found_stray {
            return Ok(());
        }
        (self.dirty.announced_at, self.dirty.found_stray) = (changes, false);
        for (at, block) in memory.blocks().iter().enumerate() {
            let told = self.dirty.announced.block(at);
            let news = &self.dirty.dropped.block(at);
            find_new_discards(block, told, news, self.dirty.pages.block(at));
            let runs: Vec<PageRange> = news.runs(block.all()).collect();
            news.clear(block.all());
            for part in runs.chunks(MAX_RUNS) {
                self.send_runs(block.geometry.id, part)?;
            }
        }
        Ok(())
    }

    /// The guest stands still, and its last pass has arrived: tells the destination what the VMM
    /// freed since the last sync. It would keep pages there that are holes here (`never-populate`).
    pub(super) fn send_late_frees(&mut self) -> Result<(), JobError> {
        let job = self.job.clone();
        if !job.memory.blocks().iter().any(|block| block.may_have_known_holes()) {
            return Ok(());
        }
        LogTracker.sync(&job.memory, &self.dirty.pages)?;
        let view = PassView { job: &job, limiter: &job.limiter, send_zeros: true };
        for (at, block) in job.memory.blocks().iter().enumerate() {
            self.streams.senders[0].send_known_holes(&view, block, self.dirty.pages.block(at))?;
        }
        Ok(())
    }

    fn send_runs(&mut self, block: u32, runs: &[PageRange]) -> Result<(), JobError> {
        let payload = encode_runs(runs);
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        let header =
            RecordHeader::new(Kind::Discard, 0, block, PageRange::new(0, pages), payload.len());
        let primary = &mut self.streams.senders[0];
        primary.write(&self.job, header, &payload)?;
        primary.totals.discarded_pages += pages;
        add(&self.job.live.discarded_pages, pages);
        Ok(())
    }
}

/// Sets in `news` what is discarded and was not told, and keeps in `told` only what still holds.
///
/// What is told, now or before, is not sent in the pass that follows, even if it is populated
/// meanwhile: the two records would travel on different streams, and the destination would hold
/// content that this side takes for told. The populate has marked the log, so the pass after has
/// it.
fn find_new_discards(
    block: &Block, told: &MappedBitmap, news: &MappedBitmap, dirty: &MappedBitmap,
) {
    for (word, known) in told.nonzero_words(block.all()) {
        let holds = block.discarded.word(word) & !block.stray.word(word);
        told.take_bits(word, known & !holds);
    }
    for (word, discarded) in block.discarded.nonzero_words(block.all()) {
        let stays = discarded & !block.stray.word(word);
        let fresh = told.or_word(word, stays);
        dirty.take_bits(word, stays);
        news.or_word(word, fresh);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::Hooks;
    use crate::job::Deadline;
    use crate::memory::test_support::memory;
    use crate::tracking::TrackerChoice;
    use pageferry_protocol::memory::PAGE_SIZE;
    use std::sync::Arc;
    use std::time::Duration;

    fn bitmap(pages: &[u64]) -> MappedBitmap {
        let bitmap = MappedBitmap::private(128).unwrap();
        pages.iter().for_each(|page| _ = bitmap.set(PageRange::new(*page, 1)));
        bitmap
    }

    fn pages(bitmap: &MappedBitmap) -> Vec<u64> {
        bitmap.runs(bitmap.all()).flat_map(|run| run.first..run.end()).collect()
    }

    /// Pages 64 to 68 are discarded. 66 was written after that, 67 may have been, and 68 was found
    /// to be stray before.
    #[test]
    fn a_dirty_page_that_is_discarded_is_dropped_unless_it_was_written_since() {
        for (first_sync, dirty, stray) in
            [(true, vec![62, 63], vec![68]), (false, vec![62, 63, 66, 68], vec![66, 68])]
        {
            let memory = memory(&[128]);
            let block = &memory.blocks()[0];
            block.discarded.set(PageRange::new(64, 5));
            for page in [66, 67] {
                block.backing.write(page * PAGE_SIZE, &[1]).unwrap();
            }
            block.unsettled.set(PageRange::new(67, 1));
            block.stray.set(PageRange::new(68, 1));
            let mut state = DirtyState::new(&memory).unwrap();
            state.pages.block(0).set(PageRange::new(62, 7));
            let trackers = Trackers::new(
                &TrackerChoice::default(),
                &Arc::new(Hooks::new(None)),
                Duration::ZERO,
                &Deadline::default(),
            );
            state.fix_up(&memory, 0, &trackers, first_sync).unwrap();
            assert_eq!(pages(state.pages.block(0)), dirty, "first sync: {first_sync}");
            assert_eq!(pages(&block.stray), stray, "first sync: {first_sync}");
            assert_eq!(state.found_stray, !first_sync);
            assert_eq!(state.dropped.count(), 0, "that is for the next");
        }
    }

    #[test]
    fn what_is_told_is_what_is_discarded_and_is_not_sent() {
        let memory = memory(&[128]);
        let block = &memory.blocks()[0];
        for page in [2, 3, 4, 5, 70] {
            block.discarded.set(PageRange::new(page, 1));
        }
        // These were written since.
        for page in [3, 5] {
            block.stray.set(PageRange::new(page, 1));
        }
        let (told, news, dirty) = (bitmap(&[1, 2, 3]), bitmap(&[]), bitmap(&[1, 2, 3, 4, 5, 70]));
        find_new_discards(block, &told, &news, &dirty);
        assert_eq!(pages(&told), [2, 4, 70]);
        assert_eq!(pages(&news), [4, 70]);
        assert_eq!(pages(&dirty), [1, 3, 5]);
    }
}
