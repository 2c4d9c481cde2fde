// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Missing pages: the memory of a guest that runs before all of it has arrived, in postcopy and in
//! a lazy restore.
//!
//! # Who does what to a host page
//!
//! The VMM's mapping is registered for missing faults, so a touch of an absent page becomes a
//! fault, and the thread that touched it waits. A host page is *missing* while its content is still
//! to come. A thread that *takes* the page (see [`HostPageSet`]) ends that state, and then places
//! the content. After that the page is what the file says: content, or a hole that reads as zero.
//! These events act on a host page at the same time, without a lock:
//!
//! - A **fault** marks the page as *requested*, then looks whether it is missing. If it is, the
//!   source is asked for it, once. If it is not, an arrival may have taken it and not placed it
//!   yet: an answer of zero now would come before that content. So the fault waits for the arrivals
//!   that took it before (the fence), and looks again, because an arrival may have failed. If the
//!   page is still not missing, the fault is answered here: with zero, unless there is a page by
//!   now.
//! - An **arrival** publishes the page in the fence, takes it, then places the content, atomically
//!   for the threads that wait. It places a zero page only if the page is requested, so that
//!   nothing is allocated that the guest does not touch
//!   ([`never-populate`](crate::invariants#never-populate)).
//! - A **discard** marks the page as discarded and takes it. It waits for arrivals that took it
//!   before (the fence), and takes it once more. It waits for the faults that were read before, and
//!   frees the page, once more if faults were handled meanwhile. Then it wakes the threads that
//!   requested the page: they touch it again, and the new fault is answered with zero. Content that
//!   the source still sends is thrown away. So a discarded page never gets its stale bytes back
//!   ([`never-read`](crate::invariants#never-read)). And no earlier fault fills the hole again,
//!   even if its touch was served in the meantime; see `may_be_stale` for the VMM that punches the
//!   page by itself.
//! - A **free** does the same without the mark: the page is a hole then, and ordinary memory from
//!   the next touch on.
//! - A **removal** is a free that the VMM did by itself, while its thread waits in madvise
//!   (`UFFD_EVENT_REMOVE`). The thread that reads the faults takes the page, waits for arrivals
//!   that took it before, and takes it once more. It never frees the page: the VMM has done so
//!   before, and continues as soon as the event was read. So what is there now may be new.
//! - A **failed arrival** makes the page missing again before it leaves the fence, so a discard
//!   that waits in the fence finds it again.
//!
//! A fault sets *requested* before it looks at *missing*. An arrival or a discard takes *missing*
//! before it looks at *requested*. Both have a sequentially consistent fence between the two steps,
//! so at least one of them sees the other, and no fault waits forever. If both answer, both answer
//! with zero: the kernel refuses the second page, and all waiters are woken. The steps are in
//! [`super::fault_ordering`], and a model checker tries all orders of them.
//!
//! # What outlives this process
//!
//! [`super::owed`] says which pages are not placed yet, for the agent that continues if this one is
//! lost. That agent wakes all threads that wait: this one may have read their faults.

mod bases;
mod demands;
mod given_back;

use super::block::Block;
use super::fault_ordering::{Requested, request, requested_of};
use super::fence::Readers;
use super::host_page_set::{HostPageSet, fence_words, words_of};
use super::mappings::Mappings;
use super::page_placer::{Failed, PagePlacer, PlaceError};
use crate::event::Event;
use crate::lock::lock;
use crate::stats::{LiveCounters, add};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word, word_mask};
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use pageferry_protocol::userfault::Userfaultfd;
use rustix::fs::OFlags;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::yield_now;
use std::time::{Duration, Instant};

pub use demands::Demands;

/// How often an arrival is tried again while the VMM changes its mappings, and the pause between
/// two tries. Minutes in all: the VMM may not get a processor for a while, and an error here loses
/// the guest.
const MAX_TRIES: u32 = 1_000_000;
const PAUSE: Duration = Duration::from_micros(200);

/// The outcome of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The fault is answered.
    Resolved,
    /// The page is missing, and this is the first request: the caller must ask for it.
    Request,
    /// The page is missing, and was requested before.
    AlreadyRequested,
}

/// The missing pages of a guest that runs already.
#[derive(Debug)]
pub struct MissingPages {
    blocks: Vec<Arc<Block>>,
    missing: Arc<HostPageSet>,
    /// Host pages that the guest waits for.
    requested: Vec<MappedBitmap>,
    /// Discarded host pages whose last fault was answered by a wake, without placing zero. See
    /// [`MissingPages::may_be_stale`].
    touched: Vec<MappedBitmap>,
    /// Host pages that were discarded while they were missing, and are not yet announced to the
    /// source.
    dropped: Vec<MappedBitmap>,
    /// Host pages that were placed, and are not yet announced to the source. `None` if the source
    /// does not want acknowledgements.
    placed: Option<Vec<MappedBitmap>>,
    placer: PagePlacer,
    live: Arc<LiveCounters>,
    /// Readable when there is something to do for the job's thread.
    event: Event,
    load: Mutex<StateLoad>,
    /// Odd while faults are read and answered.
    answering: AtomicU64,
    /// What devices of this agent need.
    demands: Demands,
}

/// Held while faults are read and answered. Ends on drop.
#[derive(Debug)]
pub struct HandlingFaults<'a>(&'a AtomicU64);

impl Drop for HandlingFaults<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// How far the VMM has loaded its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StateLoad {
    /// The VMM's devices may be touching missing pages. The source has not been told that it may
    /// give the guest up, so the guest cannot run here yet.
    Loading,
    /// The missing pages never come, and read as zero now. The loaded state is useless.
    Abandoned,
    /// From now on a missing page must never read as zero.
    Loaded,
}

impl MissingPages {
    /// The host pages `missing` of `blocks` are still to come. All mappings of the blocks are
    /// registered with `uffd`. With `acknowledge`, the source is told which pages were placed.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps, or no event descriptor.
    pub fn new(
        blocks: &[Arc<Block>], missing: Arc<HostPageSet>, uffd: OwnedFd, acknowledge: bool,
        live: Arc<LiveCounters>,
    ) -> Result<Self, PlaceError> {
        // A thread that reads faults waits only in poll, whatever the VMM has handed over.
        let flags = rustix::fs::fcntl_getfl(&uffd).map_err(PlaceError::Read)?;
        rustix::fs::fcntl_setfl(&uffd, flags | OFlags::NONBLOCK).map_err(PlaceError::Read)?;
        let bitmaps = || -> Result<Vec<_>, MappingError> {
            let bitmap = |at: usize| MappedBitmap::private(missing.block(at).bits().pages());
            (0..blocks.len()).map(bitmap).collect()
        };
        Ok(Self {
            requested: bitmaps()?,
            touched: bitmaps()?,
            dropped: bitmaps()?,
            placed: acknowledge.then(bitmaps).transpose()?,
            blocks: blocks.to_vec(),
            missing,
            placer: PagePlacer::new(uffd.into(), Mappings::of(blocks)),
            live,
            event: Event::new().map_err(PlaceError::Event)?,
            load: Mutex::new(StateLoad::Loading),
            answering: AtomicU64::new(0),
            demands: Demands::new().map_err(PlaceError::Event)?,
        })
    }

    /// The host pages that are still to come.
    pub fn missing(&self) -> &Arc<HostPageSet> {
        &self.missing
    }

    /// The userfaultfd. Readable when there are faults.
    pub fn uffd(&self) -> &Userfaultfd {
        self.placer.uffd()
    }

    /// Readable when all pages have come, or there is something to announce to the source.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// What devices of this agent need.
    pub fn demands(&self) -> &Demands {
        &self.demands
    }

    /// Takes the demands that are still missing.
    pub fn take_demands(&self) -> Vec<(usize, u64)> {
        self.demands.take(&self.missing)
    }

    /// Wakes the job's thread.
    pub fn notify(&self) {
        self.event.signal();
    }

    /// The block and host page of an address in the VMM. `None` if it is not guest memory.
    pub fn locate(&self, address: u64) -> Option<(usize, u64)> {
        self.placer.locate(address)
    }

    /// Hold this from before faults are read until they are answered or requested, and no longer:
    /// discards wait for it.
    pub fn handling_faults(&self) -> HandlingFaults<'_> {
        self.answering.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        HandlingFaults(&self.answering)
    }

    /// Returns when all faults that were read before this call are handled. The number that it
    /// returns is for [`MissingPages::were_faults_handled_since`].
    pub(super) fn wait_for_fault_handlers(&self) -> u64 {
        fence(Ordering::SeqCst);
        let seen = self.answering.load(Ordering::Acquire);
        loop {
            let now = self.answering.load(Ordering::Acquire);
            if seen.is_multiple_of(2) || now != seen {
                return now;
            }
            yield_now();
        }
    }

    /// True if a thread has read faults since [`MissingPages::wait_for_fault_handlers`] returned
    /// `seen`, or still handles some.
    pub(super) fn were_faults_handled_since(&self, seen: u64) -> bool {
        fence(Ordering::SeqCst);
        !seen.is_multiple_of(2) || self.answering.load(Ordering::Acquire) != seen
    }

    /// The guest touched a host page that was missing at that moment. The fault was read at
    /// `since`.
    ///
    /// # Errors
    /// If the fault is answered here, and the kernel refuses.
    pub fn fault(
        &self, readers: &Readers, (at, host_page): (usize, u64), since: Instant,
    ) -> Result<FaultOutcome, PlaceError> {
        let (word, bit) = (host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        let missing = self.missing.block(at);
        let note = || self.live.latency.begin_wait(key(at, host_page), since);
        let in_flight = || {
            let pages = missing.pages(PageRange::new(host_page, 1));
            readers
                .wait(|index, word| index == at && self.published_pages(at, word).overlaps(&pages));
        };
        let Requested { is_first, is_missing } =
            request(&self.requested[at], missing.bits(), host_page, note, in_flight);
        if is_missing {
            if !is_first {
                return Ok(FaultOutcome::AlreadyRequested);
            }
            add(&self.live.requested_pages, missing.unit());
            return Ok(FaultOutcome::Request);
        }
        // False if an arrival has answered the fault in the meantime: that arrival has counted it.
        let counts = self.requested[at].take_bits(word, bit) != 0;
        if self.may_be_stale(at, host_page) {
            self.live.latency.forget(key(at, host_page));
            self.placer.wake(at, PageRange::new(host_page, 1));
            return Ok(FaultOutcome::Resolved);
        }
        self.placer.place_zero(at, host_page).map_err(self.placer.failed(at))?;
        if counts {
            self.count_resolved(at, host_page);
        } else if is_first {
            // The arrival may have reported the answer before `note` reported the wait: report it
            // again.
            self.live.latency.end_wait(key(at, host_page));
        }
        Ok(FaultOutcome::Resolved)
    }

    /// True if a fault of a page that is not missing may be stale, so that its thread is only woken
    /// and touches the page again.
    ///
    /// The kernel reports a fault also for a thread that does not wait: if the page is placed for
    /// another thread at that moment, the thread returns at once, and its fault can still be read.
    /// In an ordinary page this does no harm, since the page is present. But the VMM may have
    /// punched a discarded page in the meantime, and the agent does not see that. To place zero
    /// would then allocate a page that nobody touches
    /// ([`never-populate`](crate::invariants#never-populate)). To only wake the threads would never
    /// end. So the first fault of a hole wakes them, and the second one places zero: a thread that
    /// waits touches the page again, and a stale fault does not come twice.
    fn may_be_stale(&self, at: usize, host_page: u64) -> bool {
        let block = &self.blocks[at];
        let pages = self.missing.block(at).pages(PageRange::new(host_page, 1));
        // In a clone, a page of zeroes takes no memory.
        if !block.discarded.contains(pages.first) || self.base(at).is_some() {
            return false;
        }
        if block.backing.tells_holes() && matches!(block.backing.first_data(pages), Ok(Some(_))) {
            return true;
        }
        let (word, bit) = (host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        if self.touched[at].take_bits(word, bit) == 0 {
            self.touched[at].or_word(word, bit);
            return true;
        }
        false
    }

    fn count_resolved(&self, at: usize, host_page: u64) {
        add(&self.live.faults, 1);
        self.live.latency.end_wait(key(at, host_page));
    }

    /// Content arrived for the pages `range`. Each of them is a host page. Every caller has a
    /// `worker` number of its own. Returns the number of pages that were still missing.
    ///
    /// # Errors
    /// If the kernel refuses. The pages that were not placed are still missing.
    pub fn place_pages(
        &self, readers: &Readers, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, PlaceError> {
        self.place_patiently(|used| {
            for (word, mask) in words_of(range) {
                let _reading = readers.reading(worker, at, word);
                let taken = self.missing.take(at, word, mask);
                for run in runs_of_word(word * WORD_BITS, taken) {
                    let start = (run.first - range.first) as usize * PAGE_SIZE as usize;
                    let placed =
                        self.placer.place(at, run, &content[start..start + run.bytes() as usize]);
                    placed.map_err(|error| self.return_unplaced(at, word, taken, error, used))?;
                }
                self.finish_placed(at, word, taken, used);
            }
            Ok(())
        })
    }

    /// The content of a whole host page arrived. Returns the number of pages that were still
    /// missing.
    ///
    /// # Errors
    /// If the kernel refuses. The page is still missing then.
    pub fn place_host_page(
        &self, readers: &Readers, worker: usize, at: usize, host_page: u64, content: &[u8],
    ) -> Result<u64, PlaceError> {
        let missing = self.missing.block(at);
        let (word, bit) = (host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        self.place_patiently(|used| {
            let _reading = readers.reading(worker, at, missing.word_of(host_page));
            if self.missing.take(at, word, bit) != 0 {
                let placed = self.placer.place(at, PageRange::new(host_page, 1), content);
                placed.map_err(|error| self.return_unplaced(at, word, bit, error, used))?;
                self.finish_placed(at, word, bit, used);
            }
            Ok(())
        })
    }

    /// The host pages `range` are zero at the source. Places those that the guest waits for.
    /// Returns the number of pages that were still missing.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn place_zeroes(
        &self, readers: &Readers, worker: usize, at: usize, range: PageRange,
    ) -> Result<u64, PlaceError> {
        let missing = self.missing.block(at);
        self.place_patiently(|used| {
            for (word, mask) in fence_words(range, missing.unit()) {
                let first = word * WORD_BITS + u64::from(mask.trailing_zeros());
                let _reading = readers.reading(worker, at, missing.word_of(first));
                let taken = self.missing.take(at, word, mask);
                let waited_for = requested_of(&self.requested[at], word, taken);
                for run in runs_of_word(word * WORD_BITS, waited_for) {
                    for host_page in run.first..run.end() {
                        let placed = self.placer.place_zero(at, host_page);
                        placed
                            .map_err(|error| self.return_unplaced(at, word, taken, error, used))?;
                    }
                }
                self.finish_placed(at, word, taken, used);
            }
            Ok(())
        })
    }

    /// Runs `place`, which adds the number of pages that it used, and again while the VMM changes
    /// its mappings. Returns that number.
    ///
    /// The thread that reads the removals may wait in the fence for this thread, so `place` leaves
    /// the fence, and the wait is here.
    fn place_patiently(
        &self, place: impl Fn(&mut u64) -> Result<(), PlaceError>,
    ) -> Result<u64, PlaceError> {
        let mut used = 0;
        let mut tries = 0;
        let placed = loop {
            match place(&mut used) {
                Err(error) if error.is_changing() && tries < MAX_TRIES => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                placed => break placed,
            }
        };
        if used > 0 && self.missing.remaining_pages() == 0 {
            self.notify();
        }
        placed.map(|()| used)
    }

    /// Makes those host pages of word `word` missing again that were taken and not placed: the one
    /// that failed, and those after it. Those before it are placed. Call this before leaving the
    /// fence.
    fn return_unplaced(
        &self, at: usize, word: u64, taken: u64, failed: Failed, used: &mut u64,
    ) -> PlaceError {
        let placed = word_mask(0, failed.0 - word * WORD_BITS);
        self.missing.add(at, word, taken & !placed);
        self.finish_placed(at, word, taken & placed, used);
        self.placer.failed(at)(failed)
    }

    /// Wakes the threads that wait for a host page, because their fault could not be answered: they
    /// touch the page again, which makes a new fault.
    pub fn retry(&self, (at, host_page): (usize, u64)) {
        self.placer.wake(at, PageRange::new(host_page, 1));
    }

    /// Wakes all threads that wait for a page. Those whose page is not there fault again.
    pub fn retry_all(&self) {
        for (at, block) in self.blocks.iter().enumerate() {
            let all = self.missing.block(at).covering(block.all());
            self.placer.wake(at, all);
        }
    }

    /// Host pages that were taken are placed, or zero and not waited for. Counts them, adds their
    /// pages to `used`, and notes them for the acknowledgement.
    fn finish_placed(&self, at: usize, word: u64, bits: u64, used: &mut u64) {
        if bits == 0 {
            return;
        }
        let unit = self.missing.block(at).unit();
        *used += u64::from(bits.count_ones()) * unit;
        // Before the source hears of it, which may free the page then.
        self.settle(at, word, bits);
        let waited_for = self.requested[at].take_bits(word, bits);
        for run in runs_of_word(word * WORD_BITS, waited_for) {
            (run.first..run.end()).for_each(|host_page| self.count_resolved(at, host_page));
        }
        let pushed = bits & !waited_for;
        add(&self.live.pushed_pages, u64::from(pushed.count_ones()) * unit);
        if let Some(placed) = &self.placed {
            placed[at].or_word(word, bits);
        }
    }

    /// These host pages need not come any more, from no agent.
    fn settle(&self, at: usize, word: u64, bits: u64) {
        if let Some(owed) = &self.blocks[at].owed {
            owed.settle(self.missing.block(at), word, bits);
        }
    }

    /// The pages that a worker may be placing when it has published word `word` of the block at
    /// index `at`: that word, or the host page that contains it.
    pub(super) fn published_pages(&self, at: usize, word: u64) -> PageRange {
        self.missing.block(at).published_pages(word)
    }

    /// Takes the pages, as runs, that were discarded while they were missing, since the last call.
    pub fn take_dropped(&self, at: usize) -> Vec<PageRange> {
        self.take_runs(at, &self.dropped[at])
    }

    /// Takes the pages, as runs, that were placed since the last call. Empty without
    /// acknowledgements.
    pub fn take_placed(&self, at: usize) -> Vec<PageRange> {
        self.placed.as_ref().map_or_else(Vec::new, |placed| self.take_runs(at, &placed[at]))
    }

    fn take_runs(&self, at: usize, bits: &MappedBitmap) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        bits.take(bits.all(), |word, bits| {
            for run in runs_of_word(word * WORD_BITS, bits) {
                let run = self.missing.block(at).pages(run);
                match runs.last_mut() {
                    Some(last) if last.end() == run.first => last.count += run.count,
                    _ => runs.push(run),
                }
            }
        });
        runs
    }

    /// The host pages that are missing and that the guest waits for. The source is asked for them
    /// again after a lost connection is recovered.
    pub fn awaited_pages(&self, at: usize) -> impl Iterator<Item = u64> + '_ {
        let requested = &self.requested[at];
        requested.nonzero_words(requested.all()).flat_map(move |(word, bits)| {
            let missing = bits & self.missing.block(at).bits().word(word);
            runs_of_word(word * WORD_BITS, missing).flat_map(|run| run.first..run.end())
        })
    }

    fn load(&self) -> MutexGuard<'_, StateLoad> {
        lock(&self.load)
    }

    /// The VMM has loaded its state. Returns false if the load was abandoned in the meantime: what
    /// the VMM read may be zero instead of content, so the guest must not run here.
    #[must_use]
    pub fn finish_load(&self) -> bool {
        let mut load = self.load();
        if *load == StateLoad::Loading {
            *load = StateLoad::Loaded;
        }
        *load == StateLoad::Loaded
    }

    /// Ends the wait of a VMM that still loads its state, after the job has failed or was
    /// cancelled: the missing pages never come. Unregisters the mappings, so that all its threads
    /// continue. This cannot be left to a hook: the thread that answers the hooks may itself wait
    /// for a page, or for a thread that does. The threads read zero, but the guest never runs here.
    pub fn release_waiters(&self) {
        let mut load = self.load();
        if *load == StateLoad::Loading {
            *load = StateLoad::Abandoned;
            self.unregister();
        }
    }

    /// Unregisters the mappings. Waiting threads touch their pages again, and missing pages read as
    /// zero from now on. Call this only if nothing is missing, or if the guest will never run here.
    pub fn unregister(&self) {
        self.placer.unregister();
    }
}

/// One number for a host page of any block.
fn key(at: usize, host_page: u64) -> u64 {
    ((at as u64) << 40) | host_page
}

#[cfg(test)]
mod tests;
