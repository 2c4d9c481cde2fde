//! The memory of a guest that runs before it is here (postcopy, and whatever else restores lazily).
//!
//! # Who does what to a host page
//!
//! The mapping of the VMM is registered for missing pages, so a touch of one becomes a fault that
//! waits. A host page is in one of two states: *missing*, its content is still to come; or not, and
//! then, once whoever took it has placed it, it is what the file says: content, or a hole that
//! reads as zero. Four act on it at once, without a lock:
//!
//! - a **fault** marks it as *requested*, then looks whether it is missing. If it is, the source is
//!   asked, once. Else it waits for arrivals that took it before (the fence), looks again, since
//!   one may have failed, and answers here: zero, unless there is a page by now. Without the wait
//!   zero would come before the content that was taken and not placed yet;
//! - an **arrival** publishes it, takes it (see [`HostPageSet`]), then places what came, atomically
//!   for whoever waits. Zero is placed only if it is requested, so that nothing is allocated that
//!   the guest does not touch (`never-populate`);
//! - a **discard** marks it as discarded, takes it, waits for arrivals that took it before (the
//!   fence), takes it once more, waits for faults that were read before, frees it, and then answers
//!   those who requested it: zero. What the source still sends of it is thrown away. So a discarded
//!   page never gets its stale bytes back (`never-read`), and no fault of before, whose touch an
//!   arrival may have served meanwhile, fills the hole again;
//! - a **free** does the same but for the mark: the page is a hole then, and from the next touch on
//!   it is ordinary memory;
//! - a **failed placing** gives it back before it leaves the fence: so a discard that waits there
//!   finds it again.
//!
//! *Requested* is set before *missing* is looked at, and *missing* is taken before *requested* is
//! looked at, with a sequentially consistent fence between the two on both sides: so of a fault and
//! an arrival, or a discard, at least one sees the other, and nobody waits for ever. If both
//! answer, it is with zero, the kernel refuses the second page, and all are woken. The steps are in
//! [`super::fault_steps`], and a model checker goes through all orders of them.

use super::GuestMemory;
use super::fault_steps::{Requested, request, requested_of};
use super::fence::Readers;
use super::host_page_set::{HostPageSet, fence_words, words_of};
use super::mappings::Mappings;
use super::recorded_discards::RecordedDiscards;
use crate::stats::{LiveCounters, add};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word, word_mask};
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use pageferry_protocol::userfault::{Addresses, NotPlaced, Userfaultfd};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::yield_now;
use std::time::Instant;

/// Why a page was not placed. It is missing still.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The kernel refused.
    #[error("host page {host_page:#x} of block {id} cannot be placed")]
    Place {
        /// The block.
        id: u32,
        /// Index of the host page in the block.
        host_page: u64,
        /// What the kernel said: ENOMEM or ENOSPC if there is no memory, ENOENT if the VMM has
        /// nothing mapped there, ESRCH if it is gone.
        #[source]
        source: Errno,
    },
    /// There is no memory for the bitmaps.
    #[error("bitmap")]
    Bitmap(#[from] MappingError),
    /// The kernel has no event descriptor.
    #[error("cannot make an event descriptor")]
    Event(#[source] Errno),
    /// The faults cannot be read.
    #[error("cannot read faults")]
    Read(#[source] Errno),
}

/// A host page that could not be placed, and what the kernel said.
type Failed = (u64, Errno);

/// What becomes of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOutcome {
    /// It was answered here.
    Resolved,
    /// The page is missing, and nobody has asked for it yet: the caller does.
    Request,
    /// The page is missing, and was asked for.
    AlreadyRequested,
}

/// The memory of a guest that runs before it is here.
#[derive(Debug)]
pub struct MissingPages {
    missing: Arc<HostPageSet>,
    /// Host pages that the guest waits for.
    requested: Vec<MappedBitmap>,
    /// Host pages that were discarded while they were missing, and of which the source was not told
    /// yet.
    dropped: Vec<MappedBitmap>,
    /// Host pages that were placed, and of which the source was not told yet; none if it does not
    /// want to know.
    placed: Option<Vec<MappedBitmap>>,
    uffd: Userfaultfd,
    mappings: Mappings,
    /// A host page of zeroes, where the kernel has none of that size.
    zeroes: Vec<u8>,
    live: Arc<LiveCounters>,
    /// Readable when there is something for the job's thread to look at.
    event: OwnedFd,
    load: Mutex<StateLoad>,
    /// Odd while faults are being read and answered.
    answering: AtomicU64,
}

/// Faults are being read and answered; over on drop.
#[derive(Debug)]
pub struct HandlingFaults<'a>(&'a AtomicU64);

impl Drop for HandlingFaults<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// How far the VMM is with its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StateLoad {
    /// Its devices may be touching what is missing. The source has not been told that it may give
    /// the guest up, so the guest cannot come to run.
    Loading,
    /// What is missing never comes, and was made zero: what was loaded is worth nothing.
    Abandoned,
    /// Nobody may take what is missing for zero any more.
    Loaded,
}

impl MissingPages {
    /// `missing` of `memory` is to come; `uffd` was registered for the mappings of all its blocks.
    /// With `acknowledge` the source is told what was placed.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps, or no descriptor.
    pub fn new(
        memory: &GuestMemory, missing: Arc<HostPageSet>, uffd: OwnedFd, acknowledge: bool,
        live: Arc<LiveCounters>,
    ) -> Result<Self, PlaceError> {
        let bitmaps = || -> Result<Vec<_>, MappingError> {
            let bitmap = |at: usize| MappedBitmap::private(missing.block(at).bits().pages());
            (0..memory.blocks().len()).map(bitmap).collect()
        };
        let mappings = Mappings::of(memory);
        let huge = mappings
            .all()
            .iter()
            .map(|mapping| mapping.unit)
            .filter(|unit| *unit > PAGE_SIZE)
            .max();
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            requested: bitmaps()?,
            dropped: bitmaps()?,
            placed: acknowledge.then(bitmaps).transpose()?,
            missing,
            uffd: uffd.into(),
            mappings,
            zeroes: vec![0; huge.unwrap_or(0) as usize],
            live,
            event: event.map_err(PlaceError::Event)?,
            load: Mutex::new(StateLoad::Loading),
            answering: AtomicU64::new(0),
        })
    }

    /// What is still to come.
    pub fn missing(&self) -> &Arc<HostPageSet> {
        &self.missing
    }

    /// Readable when there are faults.
    pub fn uffd(&self) -> &Userfaultfd {
        &self.uffd
    }

    /// Readable when all has come, or there is something to tell the source.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Wakes the job's thread.
    pub fn notify(&self) {
        // A full eventfd is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// The block and host page of an address in the VMM; `None` if it is none of the guest's.
    pub fn locate(&self, address: u64) -> Option<(usize, u64)> {
        self.mappings.locate(address)
    }

    fn addresses(&self, at: usize, host_pages: PageRange) -> Addresses {
        self.mappings.addresses(at, host_pages)
    }

    /// To be held from before faults are read until they are answered, as far as that is done here,
    /// and no longer: discards wait for it.
    pub fn handling_faults(&self) -> HandlingFaults<'_> {
        self.answering.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        HandlingFaults(&self.answering)
    }

    /// Returns when all faults that were read before are answered.
    pub(super) fn wait_for_fault_handlers(&self) {
        fence(Ordering::SeqCst);
        let seen = self.answering.load(Ordering::Acquire);
        while seen % 2 == 1 && self.answering.load(Ordering::Acquire) == seen {
            yield_now();
        }
    }

    /// The guest touched a host page that was missing when it did; the fault was read at `since`.
    ///
    /// # Errors
    /// If it can be answered here, and the kernel refuses.
    pub fn fault(
        &self, readers: &Readers, (at, host_page): (usize, u64), since: Instant,
    ) -> Result<FaultOutcome, PlaceError> {
        let (word, bit) = (host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        let missing = self.missing.block(at);
        let note = || self.live.latency.waits(key(at, host_page), since);
        let in_flight = || {
            let pages = missing.pages(PageRange::new(host_page, 1));
            readers
                .wait(|index, word| index == at && self.published_pages(at, word).overlaps(&pages));
        };
        let Requested { is_first: fresh, is_missing } =
            request(&self.requested[at], missing.bits(), host_page, note, in_flight);
        if is_missing {
            if !fresh {
                return Ok(FaultOutcome::AlreadyRequested);
            }
            add(&self.live.requested_pages, missing.unit());
            return Ok(FaultOutcome::Request);
        }
        // An arrival that was waited for has counted it.
        let counts = self.requested[at].take_bits(word, bit) != 0;
        self.place_zero(at, host_page).map_err(self.failed(at))?;
        if counts {
            self.count_resolved(at, host_page);
        } else if fresh {
            // That may have been before it was noted as waiting.
            self.live.latency.answered(key(at, host_page));
        }
        Ok(FaultOutcome::Resolved)
    }

    fn count_resolved(&self, at: usize, host_page: u64) {
        add(&self.live.faults, 1);
        self.live.latency.answered(key(at, host_page));
    }

    /// Content came of the pages `range`, each of which is a host page. `worker` is the caller's
    /// own number.
    ///
    /// # Errors
    /// If the kernel refuses: what was not placed is missing still.
    pub fn place_pages(
        &self, readers: &Readers, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, PlaceError> {
        let mut used = 0;
        for (word, mask) in words_of(range) {
            let _reading = readers.reading(worker, at, word);
            let taken = self.missing.take(at, word, mask);
            for run in runs_of_word(word * WORD_BITS, taken) {
                let start = (run.first - range.first) as usize * PAGE_SIZE as usize;
                let placed = self.place(at, run, &content[start..start + run.bytes() as usize]);
                placed.map_err(|error| self.give_back(at, word, taken, error))?;
            }
            used += u64::from(taken.count_ones());
            self.finish_placed(at, word, taken);
        }
        self.notify_if_complete(used);
        Ok(used)
    }

    /// All of a host page came.
    ///
    /// # Errors
    /// If the kernel refuses: the page is missing still.
    pub fn place_host_page(
        &self, readers: &Readers, worker: usize, at: usize, host_page: u64, content: &[u8],
    ) -> Result<u64, PlaceError> {
        let missing = self.missing.block(at);
        let (word, bit) = (host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        let _reading = readers.reading(worker, at, missing.word_of(host_page));
        if self.missing.take(at, word, bit) == 0 {
            return Ok(0);
        }
        let placed = self.place(at, PageRange::new(host_page, 1), content);
        placed.map_err(|error| self.give_back(at, word, bit, error))?;
        self.finish_placed(at, word, bit);
        self.notify_if_complete(missing.unit());
        Ok(missing.unit())
    }

    /// The host pages `range` are zero.
    ///
    /// # Errors
    /// If the guest waits for one of them and the kernel refuses.
    pub fn place_zeroes(
        &self, readers: &Readers, worker: usize, at: usize, range: PageRange,
    ) -> Result<u64, PlaceError> {
        let missing = self.missing.block(at);
        let mut used = 0;
        for (word, mask) in fence_words(range, missing.unit()) {
            let first = word * WORD_BITS + u64::from(mask.trailing_zeros());
            let _reading = readers.reading(worker, at, missing.word_of(first));
            let taken = self.missing.take(at, word, mask);
            if taken == 0 {
                continue;
            }
            let waited_for = requested_of(&self.requested[at], word, taken);
            for run in runs_of_word(word * WORD_BITS, waited_for) {
                for host_page in run.first..run.end() {
                    let placed = self.place_zero(at, host_page);
                    placed.map_err(|failed| self.give_back(at, word, taken, failed))?;
                }
            }
            used += u64::from(taken.count_ones()) * missing.unit();
            self.finish_placed(at, word, taken);
        }
        self.notify_if_complete(used);
        Ok(used)
    }

    /// Makes missing again what was taken of word `word` and not placed: the host page that failed,
    /// and those after it. To be called within the fence.
    fn give_back(
        &self, at: usize, word: u64, taken: u64, (host_page, source): Failed,
    ) -> PlaceError {
        self.missing.add(at, word, taken & !word_mask(0, host_page - word * WORD_BITS));
        PlaceError::Place { id: self.mappings.all()[at].id, host_page, source }
    }

    /// Places host pages that were taken, up to the first that cannot be placed.
    fn place(&self, at: usize, run: PageRange, mut content: &[u8]) -> Result<(), Failed> {
        let unit = self.mappings.all()[at].unit;
        let mut rest = run;
        while !rest.is_empty() {
            let range = self.addresses(at, rest);
            let Err(NotPlaced { done, errno }) = self.uffd.copy(range.start, content) else {
                return Ok(());
            };
            let placed = done / unit;
            rest = PageRange::new(rest.first + placed, rest.count - placed);
            if errno != Errno::EXIST {
                return Err((rest.first, errno));
            }
            self.check_present(at, rest.first)?;
            // The VMM wrote there behind our back, by the file or another mapping: what it wrote is
            // newer than what came.
            log::warn!(
                "block {}: host page {:#x} was there before it came",
                self.mappings.all()[at].id,
                rest.first
            );
            self.wake(at, rest.first);
            rest = PageRange::new(rest.first + 1, rest.count - 1);
            content = &content[(done + unit) as usize..];
        }
        Ok(())
    }

    /// Answers a fault with zero, or wakes who waits if there is a page by now.
    fn place_zero(&self, at: usize, host_page: u64) -> Result<(), Failed> {
        let unit = self.mappings.all()[at].unit;
        let range = self.addresses(at, PageRange::new(host_page, 1));
        let placed = if unit == PAGE_SIZE {
            self.uffd.zero(range)
        } else {
            self.uffd.copy(range.start, &self.zeroes[..unit as usize])
        };
        match placed {
            Ok(()) => Ok(()),
            Err(NotPlaced { errno: Errno::EXIST, .. }) => {
                self.check_present(at, host_page)?;
                self.wake(at, host_page);
                Ok(())
            }
            Err(NotPlaced { errno, .. }) => Err((host_page, errno)),
        }
    }

    /// Fails if the kernel said that a host page is there already, and it is not: of hugetlbfs it
    /// says so when it has no page left. What came would be thrown away, and zero put in its place
    /// as soon as there is one.
    fn check_present(&self, at: usize, host_page: u64) -> Result<(), Failed> {
        if self.mappings.all()[at].unit == PAGE_SIZE {
            return Ok(());
        }
        match self.uffd.is_there(self.addresses(at, PageRange::new(host_page, 1))) {
            Ok(true) => Ok(()),
            Ok(false) => Err((host_page, Errno::NOMEM)),
            Err(errno) => Err((host_page, errno)),
        }
    }

    /// Whoever waits for a host page touches it again: its fault could not be answered.
    pub fn retry(&self, (at, host_page): (usize, u64)) {
        self.wake(at, host_page);
    }

    fn wake(&self, at: usize, host_page: u64) {
        // Fails only if nothing is mapped there any more, and then nobody waits.
        let _ = self.uffd.wake(self.addresses(at, PageRange::new(host_page, 1)));
    }

    fn failed(&self, at: usize) -> impl Fn(Failed) -> PlaceError {
        let id = self.mappings.all()[at].id;
        move |(host_page, source)| PlaceError::Place { id, host_page, source }
    }

    /// Host pages that were taken are answered: counts, and remembers what the source is to be
    /// told.
    fn finish_placed(&self, at: usize, word: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let waited_for = self.requested[at].take_bits(word, bits);
        for run in runs_of_word(word * WORD_BITS, waited_for) {
            (run.first..run.end()).for_each(|host_page| self.count_resolved(at, host_page));
        }
        let pushed = bits & !waited_for;
        add(
            &self.live.pushed_pages,
            u64::from(pushed.count_ones()) * self.missing.block(at).unit(),
        );
        if let Some(placed) = &self.placed {
            placed[at].or_word(word, bits);
        }
    }

    fn notify_if_complete(&self, pages: u64) {
        if pages > 0 && self.missing.remaining_pages() == 0 {
            self.notify();
        }
    }

    /// A discard of `range` has set its marks: nothing of it need come any more.
    pub(super) fn drop_missing(&self, at: usize, range: PageRange) {
        let host_pages = self.missing.block(at).covering(range);
        let mut any = false;
        self.missing.take_range(at, host_pages, |word, bits| {
            self.dropped[at].or_word(word, bits);
            add(
                &self.live.dropped_pages,
                u64::from(bits.count_ones()) * self.missing.block(at).unit(),
            );
            any = true;
        });
        if any {
            self.notify();
        }
    }

    /// What was discarded before discards knew of this need not come any more. To be called once
    /// they do ([`GuestMemory::set_missing_pages`]).
    pub fn drop_discarded(&self, memory: &GuestMemory) {
        for (at, block) in memory.blocks().iter().enumerate() {
            self.drop_whole_host_pages(at, &block.discarded);
        }
    }

    /// The same of what was given back since somebody listens.
    pub fn drop_recorded(&self, noted: &RecordedDiscards) {
        for at in 0..self.requested.len() {
            self.drop_whole_host_pages(at, noted.discarded(at));
            self.drop_whole_host_pages(at, noted.freed(at));
        }
    }

    fn drop_whole_host_pages(&self, at: usize, given_back: &MappedBitmap) {
        let host_pages = self.missing.block(at);
        let unit = host_pages.unit();
        for run in given_back.runs(given_back.all()) {
            // A host page of which a part is discarded comes all the same.
            let (first, end) = (run.first.div_ceil(unit), run.end() / unit);
            self.drop_missing(
                at,
                host_pages.pages(PageRange::new(first, end.saturating_sub(first))),
            );
        }
    }

    /// A discard of `range` is done: who waits for a page of it gets zero.
    pub(super) fn resolve_waiting(&self, at: usize, range: PageRange) {
        fence(Ordering::SeqCst);
        let host_pages = self.missing.block(at).covering(range);
        self.requested[at].take(host_pages, |word, bits| {
            for run in runs_of_word(word * WORD_BITS, bits) {
                for host_page in run.first..run.end() {
                    match self.place_zero(at, host_page) {
                        Ok(()) => self.count_resolved(at, host_page),
                        // A discard cannot fail. Who waits touches it again when it is woken, and
                        // the fault has it from there.
                        Err(failed) => {
                            log::warn!("{}", crate::error::chain(&self.failed(at)(failed)));
                            self.wake(at, host_page);
                        }
                    }
                }
            }
        });
    }

    /// The pages that a worker may be placing when it has published word `word` of the block at
    /// index `at`: that word, or the host page that it is in.
    pub(super) fn published_pages(&self, at: usize, word: u64) -> PageRange {
        self.missing.block(at).published_pages(word)
    }

    /// Runs of pages that were discarded since the last time, while they were missing.
    pub fn take_dropped(&self, at: usize) -> Vec<PageRange> {
        self.take_runs(at, &self.dropped[at])
    }

    /// Runs of pages that were placed since the last time; none if the source does not want to
    /// know.
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

    /// The host pages that are missing and that the guest waits for: what the source is asked for
    /// when a lost connection is back.
    pub fn awaited_pages(&self, at: usize) -> impl Iterator<Item = u64> + '_ {
        let requested = &self.requested[at];
        requested.nonzero_words(requested.all()).flat_map(move |(word, bits)| {
            let missing = bits & self.missing.block(at).bits().word(word);
            runs_of_word(word * WORD_BITS, missing).flat_map(|run| run.first..run.end())
        })
    }

    fn load(&self) -> MutexGuard<'_, StateLoad> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM has loaded its state. False if what it found was let go meanwhile: the guest must
    /// not run then.
    #[must_use]
    pub fn finish_load(&self) -> bool {
        let mut load = self.load();
        if *load == StateLoad::Loading {
            *load = StateLoad::Loaded;
        }
        *load == StateLoad::Loaded
    }

    /// The job has failed, or is cancelled. A VMM that still loads its state, and waits for what
    /// never comes, goes on, and so does every other thread of it: the thread that answers the
    /// agent's hooks may be the one that waits, or wait for one, and could hear of the end in no
    /// other way. What they find is zero, of a guest that never runs here.
    pub fn release_waiters(&self) {
        let mut load = self.load();
        if *load == StateLoad::Loading {
            *load = StateLoad::Abandoned;
            self.unregister();
        }
    }

    /// Ends it: the mappings are as they were, and who waits looks again. Only if nothing is
    /// missing, or no guest will ever run here: what is missing is zero from now on.
    pub fn unregister(&self) {
        for (at, mapping) in self.mappings.all().iter().enumerate() {
            let all = self.addresses(at, PageRange::new(0, mapping.length / mapping.unit));
            if let Err(errno) = self.uffd.unregister(all) {
                log::warn!(
                    "block {}: cannot unregister {:#x} + {:#x}: {errno}",
                    mapping.id,
                    all.start,
                    all.length
                );
            }
        }
    }
}

/// Tells host pages of all blocks from each other.
fn key(at: usize, host_page: u64) -> u64 {
    ((at as u64) << 40) | host_page
}

#[cfg(test)]
mod tests;
