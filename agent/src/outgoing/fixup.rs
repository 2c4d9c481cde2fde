// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Syncing the trackers, and clearing discarded pages from the dirty bitmap
//! ([`fix-up-after-sync`](crate::invariants#fix-up-after-sync)).
//!
//! # On dirty bits of discarded pages
//!
//! A dirty bit in a discarded range can mean two things. If the guest wrote *before* the discard,
//! the bit is stale. If it wrote *after* the discard, into memory that it had promised not to use,
//! the write is a *stray write*. The tracker cannot tell the two apart.
//!
//! - Sending all such pages would be wrong: the agent would read memory that was given back.
//! - Dropping all such pages would be wrong, too. QEMU migrates stray writes, and a guest that
//!   makes them may rely on that.
//!
//! So the fix-up asks the file. The discard punched the page. If the page is allocated at the sync,
//! something has written to it since, and it is sent. Three cases need more care:
//!
//! - The answer holds only for pages that were punched, in a file that reports its holes. All other
//!   discarded pages are *unsettled* until one sync has passed. What that sync reports of them may
//!   be older than the discard, so it is dropped. What the next sync reports is not.
//! - A report is not believed if it may mean a neighbour: write-protect scanning reports all pages
//!   of a transparent huge page together.
//! - At the first sync all discarded pages are dropped: nothing is known from before the start of
//!   the trackers.
//!
//! # Order
//!
//! The fix-up comes after the sync. If it came before, the sync would bring the stale bits back.
//! What it drops, it also clears in a tracker whose sync does not clear by itself. Otherwise every
//! later sync would report the same stale bit, and the next one would take it for a stray write.
//!
//! Discards and populates happen at the same time. [`crate::memory::discard`] explains why every
//! interleaving is right.

use super::migration::Migration;
use super::sender::SendContext;
use crate::job::{JobError, add, micros};
use crate::memory::MemoryError;
use crate::memory::chunks::Chunks;
use crate::memory::{Block, GuestMemory};
use crate::tracking::{DirtyPages, LogTracker, Tracker, Trackers};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::stream::payload::{MAX_RUNS, encode_runs};
use pageferry_protocol::stream::{Kind, RecordHeader};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Pages of a chunk in a walk over bitmaps: 16 GiB, whose bitmap has 512 KiB.
const WALK_PAGES: u64 = (16 << 30) / PAGE_SIZE;
/// An odd value: [`GuestMemory::changes`] is even whenever nothing is changing.
const NEVER: u64 = u64::MAX;

/// The dirty pages, and the discards that were announced to the destination.
#[derive(Debug)]
pub struct DirtyState {
    /// Pages to send.
    pub pages: DirtyPages,
    /// Pages that the destination has as discarded.
    pub(super) announced: DirtyPages,
    /// Pages that were unsettled when the sync began.
    settling: DirtyPages,
    /// Pages whose bit the fix-up dropped.
    dropped: DirtyPages,
    pub(super) remaining: u64,
    /// The value of [`GuestMemory::changes`] when the unsettled pages were last taken, and when
    /// discards were last announced.
    settled_at: u64,
    announced_at: u64,
    /// `settling` has pages.
    settles: bool,
    /// Stray pages were found since the last announcement.
    found_stray: AtomicBool,
}

impl DirtyState {
    /// The state at the start: no page is dirty, and no discard was announced.
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
            found_stray: AtomicBool::new(false),
        })
    }

    /// Number of dirty pages after the last sync.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Drops the stale bits of all blocks, also in a tracker whose sync does not clear by itself.
    /// Up to `threads` threads share the work. Returns how many pages are dirty.
    fn fix_up(
        &self, memory: &GuestMemory, trackers: &Trackers, first_sync: bool, threads: usize,
    ) -> Result<u64, JobError> {
        let dirty = AtomicU64::new(0);
        // Walk over the dirty pages, not the discarded: those may be most of the guest.
        let chunks =
            Chunks::new(memory, WALK_PAGES).only(|at, pages| self.pages.block(at).next_set(pages));
        chunks.share(threads, |at, chunk| {
            dirty.fetch_add(
                self.fix_up_chunk(memory, at, chunk, trackers, first_sync)?,
                Ordering::Relaxed,
            );
            Ok::<(), JobError>(())
        })?;
        Ok(dirty.into_inner())
    }

    /// The same for a chunk of the block at index `at`.
    fn fix_up_chunk(
        &self, memory: &GuestMemory, at: usize, chunk: PageRange, trackers: &Trackers,
        first_sync: bool,
    ) -> Result<u64, JobError> {
        let block = &memory.blocks()[at];
        let (dirty, settling, dropped) =
            (self.pages.block(at), self.settling.block(at), self.dropped.block(at));
        let (mut any, mut remaining) = (false, 0);
        for (word, dirty_pages) in dirty.nonzero_words(chunk) {
            remaining += u64::from(dirty_pages.count_ones());
            let suspects = dirty_pages & block.discarded.word(word);
            if suspects == 0 {
                continue;
            }
            // A discard sets all its marks under this lock, so here it has set all of them or none.
            let _marking = memory.marking.share();
            let unsure = settling.word(word) | block.unsettled.word(word);
            let known = suspects & block.stray.word(word);
            let mut stray = 0;
            if !first_sync {
                let written = written_since(block, word, suspects & !unsure & !known)?;
                // Where the report may mean a neighbour, the discard counts: a discarded page is
                // not read on a suspicion.
                stray = known | written & !trackers.imprecise(at, word, written);
            }
            if block.stray.or_word(word, stray) != 0 {
                self.found_stray.store(true, Ordering::Relaxed);
            }
            let stale = dirty.take_bits(word, suspects & !stray);
            remaining -= u64::from(stale.count_ones());
            dropped.or_word(word, stale);
            any = true;
        }
        if any {
            if let Some(lazy) = trackers.lazy_clear() {
                lazy.clear(block.geometry.id, dropped, chunk)?;
            }
            dropped.clear(chunk);
        }
        Ok(remaining)
    }
}

/// Those of the pages `suspects` that the guest wrote to since the discard. All of them are
/// discarded and settled.
fn written_since(block: &Block, word: u64, suspects: u64) -> Result<u64, MemoryError> {
    if !block.backing.tells_holes() {
        return Ok(suspects);
    }
    block
        .backing
        .allocated(word, suspects)
        .map_err(|source| MemoryError::Backing { id: block.geometry.id, source })
}

impl Migration {
    /// Starts the trackers and syncs them once. Their first reports are older than the start, so
    /// they do not matter: pass 0 adds all allocated pages, chunk by chunk.
    pub(super) fn start_tracking(&mut self) -> Result<(), JobError> {
        let memory = self.job.memory.clone();
        for block in memory.blocks() {
            block.stray.clear(block.all());
        }
        self.trackers.start(&memory)?;
        self.ask_trackers()?;
        self.clear_discarded(true)?;
        // An estimate for the status: the exact number is known when pass 0 has looked.
        self.expect_pages(
            memory.blocks().iter().map(|block| block.backing.allocated_pages()).sum(),
        );
        Ok(())
    }

    /// Asks the trackers for the pages that were written since the last sync, and fixes them up.
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
                // Take the pages that wait for their first sync. A discard that runs now may add
                // pages after this: the fix-up looks for them in `unsettled` itself.
                block.unsettled.take(block.all(), |word, bits| {
                    settling.or_word(word, bits);
                });
            }
            (self.dirty.settled_at, self.dirty.settles) = (changes, true);
        }
        let threads = self.streams.senders.len();
        self.trackers.sync(&memory, &self.dirty.pages, threads)?;
        self.measurements.record_sync(started.elapsed());
        Ok(())
    }

    fn clear_discarded(&mut self, first_sync: bool) -> Result<(), JobError> {
        let memory = self.job.memory.clone();
        let started = Instant::now();
        let threads = self.streams.senders.len();
        let remaining = self.dirty.fix_up(&memory, &self.trackers, first_sync, threads)?;
        if std::mem::take(&mut self.dirty.settles) {
            for (at, block) in memory.blocks().iter().enumerate() {
                self.dirty.settling.block(at).clear(block.all());
            }
        }
        self.expect_pages(remaining);
        self.measurements.add_fixup_time(started.elapsed());
        let sync = self.measurements.sync_time();
        self.job.count(|counters| counters.sync_us = micros(sync));
        Ok(())
    }

    /// The next pass has so many pages.
    pub(super) fn expect_pages(&mut self, pages: u64) {
        self.dirty.remaining = pages;
        self.job.live.pass_pages_done.store(0, Ordering::Relaxed);
        self.job.count(|counters| counters.pass_pages = pages);
    }

    /// Announces the discarded pages that the destination does not know yet, without stray pages.
    /// Comes before the pages of a pass.
    pub(super) fn send_discards(&mut self) -> Result<(), JobError> {
        let memory = self.job.memory.clone();
        let changes = memory.changes();
        // If there was no discard, no populate and no stray page since the last announcement, there
        // is nothing to announce, and the fix-up has left no announced page dirty.
        if memory.is_unchanged(self.dirty.announced_at) && !*self.dirty.found_stray.get_mut() {
            return Ok(());
        }
        (self.dirty.announced_at, *self.dirty.found_stray.get_mut()) = (changes, false);
        self.dirty.find_new_discards(&memory, self.streams.senders.len());
        for (at, block) in memory.blocks().iter().enumerate() {
            let fresh = self.dirty.dropped.block(at);
            let runs: Vec<PageRange> = fresh.runs(block.all()).collect();
            fresh.clear(block.all());
            for part in runs.chunks(MAX_RUNS) {
                self.send_runs(block.geometry.id, part)?;
            }
        }
        Ok(())
    }

    /// Sends the pages that the VMM freed since the last sync as zero. The guest is paused, and its
    /// last pass has arrived. Without this the destination would keep pages that are holes here
    /// ([`never-populate`](crate::invariants#never-populate)).
    pub(super) fn send_late_frees(&mut self) -> Result<(), JobError> {
        let job = self.job.clone();
        if !job.memory.blocks().iter().any(|block| block.may_have_known_holes()) {
            return Ok(());
        }
        LogTracker.sync(&job.memory, &self.dirty.pages, self.streams.senders.len())?;
        let view = SendContext { job: &job, limiter: &job.limiter, send_zeros: true, sent: None };
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

impl DirtyState {
    /// Sets in `dropped` the discarded pages that were not announced, and removes from `announced`
    /// the pages that are not discarded any more. Up to `threads` threads share the work.
    ///
    /// All announced pages, old and new, are cleared in the dirty bitmap: they are not sent in the
    /// pass that follows, even if the VMM populates them now. Otherwise the DISCARD and the page
    /// would be in the same pass on different streams. The destination could apply them in either
    /// order, and hold content of a page that is announced here. The populate has marked the log,
    /// so the page is sent in the next pass.
    fn find_new_discards(&self, memory: &GuestMemory, threads: usize) {
        let chunks = Chunks::new(memory, WALK_PAGES).only(|at, pages| {
            let announced = self.announced.block(at).next_set(pages);
            let discarded = memory.blocks()[at].discarded.next_set(pages);
            announced.into_iter().chain(discarded).min()
        });
        let Ok(()) = chunks.share::<Infallible>(threads, |at, chunk| {
            let (block, announced) = (&memory.blocks()[at], self.announced.block(at));
            for (word, known) in announced.nonzero_words(chunk) {
                let holds = block.discarded.word(word) & !block.stray.word(word);
                announced.take_bits(word, known & !holds);
            }
            for (word, discarded) in block.discarded.nonzero_words(chunk) {
                let stays = discarded & !block.stray.word(word);
                let new = announced.or_word(word, stays);
                self.pages.block(at).take_bits(word, stays);
                self.dropped.block(at).or_word(word, new);
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::Hooks;
    use crate::job::Deadline;
    use crate::memory::test_support::memory;
    use crate::tracking::TrackerChoice;
    use pageferry_protocol::shm::MappedBitmap;
    use std::sync::Arc;
    use std::time::Duration;

    fn pages(bitmap: &MappedBitmap) -> Vec<u64> {
        bitmap.runs(bitmap.all()).flat_map(|run| run.first..run.end()).collect()
    }

    /// Pages 64 to 68 are discarded. Page 66 was written after that, page 67 may have been, and
    /// page 68 was found to be stray before.
    #[test]
    fn dirty_discarded_pages_are_dropped_unless_written_since() {
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
            let remaining = state.fix_up(&memory, &trackers, first_sync, 1).unwrap();
            assert_eq!(remaining, dirty.len() as u64);
            assert_eq!(pages(state.pages.block(0)), dirty, "first sync: {first_sync}");
            assert_eq!(pages(&block.stray), stray, "first sync: {first_sync}");
            assert_eq!(*state.found_stray.get_mut(), !first_sync);
            assert_eq!(state.dropped.count(), 0, "the next sync starts with an empty bitmap");
        }
    }

    /// Many blocks, each with stale and other dirty pages: several threads do what one does.
    #[test]
    fn threads_share_the_fix_up_and_the_discards() {
        const BLOCKS: u64 = 9;
        let memory = memory(&[200; BLOCKS as usize]);
        let mut state = DirtyState::new(&memory).unwrap();
        for (at, block) in memory.blocks().iter().enumerate() {
            let first = at as u64;
            block.discarded.set(PageRange::new(first, 70));
            block.backing.write((first + 3) * PAGE_SIZE, &[1]).unwrap();
            state.pages.block(at).set(PageRange::new(first + 3, 100));
        }
        let hooks = Arc::new(Hooks::new(None));
        let choice = TrackerChoice::default();
        let trackers = Trackers::new(&choice, &hooks, Duration::ZERO, &Deadline::default());
        let remaining = state.fix_up(&memory, &trackers, false, 4).unwrap();
        // The stray page, and those after the discarded ones.
        assert_eq!(remaining, BLOCKS * 34);
        assert!(*state.found_stray.get_mut());
        state.find_new_discards(&memory, 4);
        for (at, block) in memory.blocks().iter().enumerate() {
            let first = at as u64;
            let stray = PageRange::new(first + 3, 1);
            let dirty: Vec<_> = state.pages.block(at).runs(block.all()).collect();
            assert_eq!(dirty, [stray, PageRange::new(first + 70, 33)], "block {at}");
            let announced: Vec<_> = state.announced.block(at).runs(block.all()).collect();
            let expected = [PageRange::new(first, 3), PageRange::new(first + 4, 66)];
            assert_eq!(announced, expected, "block {at}");
            assert_eq!(state.dropped.block(at).count(block.all()), 69);
            assert_eq!(pages(&block.stray), [first + 3]);
        }
    }

    #[test]
    fn discards_are_announced_once_and_not_sent() {
        let memory = memory(&[128]);
        let block = &memory.blocks()[0];
        for page in [2, 3, 4, 5, 70] {
            block.discarded.set(PageRange::new(page, 1));
        }
        // These are stray.
        for page in [3, 5] {
            block.stray.set(PageRange::new(page, 1));
        }
        let state = DirtyState::new(&memory).unwrap();
        let set = |bitmap: &MappedBitmap, pages: &[u64]| {
            pages.iter().for_each(|page| _ = bitmap.set(PageRange::new(*page, 1)));
        };
        set(state.announced.block(0), &[1, 2, 3]);
        set(state.pages.block(0), &[1, 2, 3, 4, 5, 70]);
        state.find_new_discards(&memory, 1);
        assert_eq!(pages(state.announced.block(0)), [2, 4, 70]);
        assert_eq!(pages(state.dropped.block(0)), [4, 70]);
        assert_eq!(pages(state.pages.block(0)), [1, 3, 5]);
    }
}
