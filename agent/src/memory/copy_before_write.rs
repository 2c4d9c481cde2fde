//! The memory of a guest as it was at one instant, while it is being saved and the guest, perhaps,
//! runs on.
//!
//! # Who does what to a page
//!
//! At the instant nobody writes. Every page that has content then is *pending*, and protected if
//! the guest is to run on. Each pending page is captured once, by whoever *takes* it (see
//! [`HostPageSet`]): reads it, then lifts its protection. Three do, at once and without a lock:
//!
//! - a **worker** that sweeps: publishes the word in the fence, takes, reads, and lifts;
//! - a **write fault**: publishes, takes and reads the page; or, if it is not pending, waits for
//!   those who may be reading it. Then it lifts the protection, and the guest writes. So no write
//!   comes before the page was read;
//! - a **discard**: has marked the page, captures what is pending of it as any worker, and waits
//!   for all who took before. Only then it is freed, and the discard acknowledged: nobody reads it
//!   later (`never-read`). A populate has nothing to capture: what was discarded at the instant is
//!   not pending, and is saved as discarded.
//!
//! The marks of discards and the set of pending pages are made under one lock
//! ([`GuestMemory::marking`]): a discard either comes before the instant, or finds what is pending.
//!
//! These steps are in [`super::capture_steps`], and a model checker goes through all orders of
//! them. When nothing is pending any more, whoever took the last of it has to have read it before
//! the registration is taken back.
//!
//! What was read counts only if the protection was there until then. A VMM that loses patience
//! unregisters its mappings, and the lifting that follows each reading fails: then the snapshot
//! does.

use super::capture_steps::{before_unregister, before_write, capture};
use super::cursor::Cursor;
use super::fence::{FAULTS, Readers, SESSION};
use super::host_page_set::{HostPageSet, fence_words};
use super::mappings::Mappings;
use super::{Block, GuestMemory};
use crate::image::{ImageError, ImageWriter, PageBuffer};
use crate::job::JobError;
use crate::stats::{LiveCounters, add};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::userfault::Userfaultfd;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are read before they are put, where nothing speaks for more: they stay in the
/// processor's cache until then.
pub const BATCH: usize = 1 << 20;

/// Takes what is captured.
pub trait Sink: std::fmt::Debug + Send + Sync {
    /// Takes the pages `range` of the block at index `at`, none of which came before. Returns how
    /// many are not zero.
    ///
    /// # Errors
    /// If it cannot.
    fn put(&self, at: usize, range: PageRange, bytes: &[u8]) -> Result<u64, ImageError>;

    /// Bytes that it likes to have put at once.
    fn batch(&self) -> usize {
        BATCH
    }
}

impl Sink for ImageWriter {
    fn put(&self, at: usize, range: PageRange, bytes: &[u8]) -> Result<u64, ImageError> {
        ImageWriter::put(self, at, range, bytes)
    }

    fn batch(&self) -> usize {
        // A disk that is written to without the page cache has no more to do at once than the
        // workers give it.
        if self.is_direct() { 2 * BATCH } else { BATCH }
    }
}

/// The protection of the VMM's mappings.
#[derive(Debug)]
pub struct Protection {
    /// Its write faults.
    pub uffd: Userfaultfd,
    /// Where they are.
    pub mappings: Mappings,
}

impl Protection {
    /// Protects host pages.
    ///
    /// # Errors
    /// If they are not registered any more, or the kernel refuses.
    pub fn protect(&self, at: usize, host_pages: PageRange) -> Result<(), JobError> {
        self.uffd
            .protect(self.mappings.addresses(at, host_pages))
            .map_err(|source| self.failed(at, source))
    }

    /// Lifts the protection of host pages, and wakes who waits to write there.
    ///
    /// # Errors
    /// As for [`Protection::protect`].
    pub fn unprotect(&self, at: usize, host_pages: PageRange) -> Result<(), JobError> {
        self.uffd
            .lift(self.mappings.addresses(at, host_pages))
            .map_err(|source| self.failed(at, source))
    }

    fn failed(&self, at: usize, source: Errno) -> JobError {
        JobError::Protection { id: self.mappings.all()[at].id, source }
    }
}

/// The memory of a guest as it was at one instant.
#[derive(Debug)]
pub struct CopyBeforeWrite {
    /// What is not captured yet. Its unit is the host page of the mapping if it is protected, and a
    /// page if not.
    pending: Arc<HostPageSet>,
    /// None if the guest stands still.
    protection: Option<Arc<Protection>>,
    sink: Arc<dyn Sink>,
    live: Arc<LiveCounters>,
    /// Why a discard or a fault could not be saved.
    failure: Mutex<Option<JobError>>,
    failed: AtomicBool,
    /// Nothing is to be captured any more: all was, or the snapshot is lost.
    stopped: AtomicBool,
    /// What a discard captures with, from the first one that has something to capture on; held
    /// while it captures and puts.
    discard_batch: Mutex<Option<Batch>>,
    /// Where the workers go on.
    pub cursor: Cursor,
}

/// What was read and not put yet.
#[derive(Debug)]
pub struct Batch {
    buffer: PageBuffer,
    /// Bytes from which on it is full.
    full: usize,
    filled: usize,
    /// Index of the block, its pages, and the byte of the buffer where they begin.
    runs: Vec<(usize, PageRange, usize)>,
}

impl Batch {
    /// Room for about `bytes` of pages of `memory`, or for one host page.
    fn new(memory: &GuestMemory, bytes: usize) -> Result<Self, MappingError> {
        let largest = memory.blocks().iter().map(|block| block.backing.host_page_size()).max();
        let part = largest.unwrap_or(PAGE_SIZE).clamp(WORD_BITS * PAGE_SIZE, 2 << 20) as usize;
        Ok(Self {
            buffer: PageBuffer::try_new(bytes + part)?,
            full: bytes,
            filled: 0,
            runs: Vec::new(),
        })
    }

    fn is_full(&self) -> bool {
        self.filled >= self.full
    }

    fn read(&mut self, at: usize, block: &Block, pages: PageRange) -> Result<(), JobError> {
        let start = self.filled;
        let bytes = pages.bytes() as usize;
        let failed = |source| JobError::Backing { id: block.geometry.id, source };
        block
            .backing
            .read(pages.offset(), &mut self.buffer[start..start + bytes])
            .map_err(failed)?;
        self.filled += bytes;
        match self.runs.last_mut() {
            Some((last_at, last, _)) if *last_at == at && last.end() == pages.first => {
                last.count += pages.count
            }
            _ => self.runs.push((at, pages, start)),
        }
        Ok(())
    }
}

impl CopyBeforeWrite {
    /// `pending` is to be captured into `sink`.
    pub fn new(
        memory: &GuestMemory, pending: Arc<HostPageSet>, protection: Option<Arc<Protection>>,
        sink: Arc<dyn Sink>, live: Arc<LiveCounters>,
    ) -> Self {
        let (failure, failed) = (Mutex::default(), AtomicBool::new(false));
        let (over, rescuing, cursor) = (
            AtomicBool::new(false),
            Mutex::default(),
            Cursor::with_pieces(memory, BATCH as u64 / PAGE_SIZE),
        );
        Self {
            pending,
            protection,
            sink,
            live,
            failure,
            failed,
            stopped: over,
            discard_batch: rescuing,
            cursor,
        }
    }

    /// What a worker needs. Nothing is kept in it from one call to the next.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn batch(&self, memory: &GuestMemory) -> Result<Batch, JobError> {
        Ok(Batch::new(memory, self.sink.batch())?)
    }

    /// What is not captured yet.
    pub fn pending(&self) -> &Arc<HostPageSet> {
        &self.pending
    }

    /// Worker `worker` captures what is pending of the host pages `range`. Returns how many pages
    /// that was.
    ///
    /// # Errors
    /// If it cannot be read or put, or the protection is gone.
    pub fn sweep(
        &self, memory: &GuestMemory, worker: usize, at: usize, range: PageRange, batch: &mut Batch,
    ) -> Result<u64, JobError> {
        let mut pages = 0;
        for (word, mask) in fence_words(range, self.pending.block(at).unit()) {
            pages += self.read(memory, worker, (at, word, mask), batch)?;
            if batch.is_full() {
                self.unprotect_and_put(batch)?;
            }
        }
        self.unprotect_and_put(batch)?;
        Ok(pages)
    }

    /// Takes and reads the host pages `mask` of word `word`, as far as they are pending. Returns
    /// how many pages that were.
    fn read(
        &self, memory: &GuestMemory, worker: usize, (at, word, mask): (usize, u64, u64),
        batch: &mut Batch,
    ) -> Result<u64, JobError> {
        let (host_pages, block) = (self.pending.block(at), &memory.blocks()[at]);
        let first = word * WORD_BITS + u64::from(mask.trailing_zeros());
        let take = || self.pending.take(at, word, mask);
        let read = |taken| {
            let mut runs = runs_of_word(word * WORD_BITS, taken);
            runs.try_for_each(|run| batch.read(at, block, host_pages.pages(run)))
        };
        let taken = capture(&memory.readers, (worker, at, host_pages.word_of(first)), take, read)?;
        Ok(u64::from(taken.count_ones()) * host_pages.unit())
    }

    /// Lifts the protection of what was read, and puts it.
    fn unprotect_and_put(&self, batch: &mut Batch) -> Result<(), JobError> {
        if let Some(protection) = &self.protection {
            // Nobody waits for the writing.
            for (at, pages, _) in &batch.runs {
                protection.unprotect(*at, self.pending.block(*at).covering(*pages))?;
            }
        }
        self.put(batch)
    }

    fn put(&self, batch: &mut Batch) -> Result<(), JobError> {
        for (at, pages, start) in batch.runs.drain(..) {
            let bytes = &batch.buffer[start..start + pages.bytes() as usize];
            self.put_run(at, pages, bytes)?;
        }
        batch.filled = 0;
        Ok(())
    }

    /// Puts the pages `range` of the block at index `at`, which were captured.
    ///
    /// # Errors
    /// If it cannot.
    pub fn put_run(&self, at: usize, range: PageRange, bytes: &[u8]) -> Result<(), JobError> {
        let put = self.sink.put(at, range, bytes)?;
        add(&self.live.pages_sent, put);
        add(&self.live.zero_pages, range.count - put);
        add(&self.live.wire_bytes, put * PAGE_SIZE);
        Ok(())
    }

    /// The guest is about to write to a host page: it is captured first, into `into`, if nobody has
    /// yet, and the protection lifted, even if it cannot be read: the snapshot is lost then, and
    /// the guest need not wait for its end. Returns its pages if they are in `into`, and are to be
    /// put.
    ///
    /// # Errors
    /// If it cannot be read, or the protection is gone.
    pub fn write_fault(
        &self, memory: &GuestMemory, (at, host_page): (usize, u64), into: &mut [u8],
    ) -> Result<Option<PageRange>, JobError> {
        let (host_pages, block) = (self.pending.block(at), &memory.blocks()[at]);
        let pages = host_pages.pages(PageRange::new(host_page, 1));
        let take = || {
            // Nothing is, of a snapshot that failed: discards do not wait for that any more, but
            // for those who took before.
            let wanted = !self.stopped.load(Ordering::Acquire);
            if wanted {
                self.pending.take(at, host_page / WORD_BITS, 1 << (host_page % WORD_BITS))
            } else {
                0
            }
        };
        let read = |_| {
            let failed = |source| JobError::Backing { id: block.geometry.id, source };
            block
                .backing
                .read(pages.offset(), &mut into[..pages.bytes() as usize])
                .map_err(failed)?;
            add(&self.live.captured_pages, pages.count);
            self.cursor.fault(at, pages.end());
            Ok(())
        };
        let overlaps = |index, word| index == at && self.published_pages(at, word).overlaps(&pages);
        let lift = || {
            add(&self.live.faults, 1);
            let Some(protection) = &self.protection else { return Ok(()) };
            let lifted = protection.unprotect(at, PageRange::new(host_page, 1));
            // At the end the registration is taken back while this thread still reads faults;
            // whoever waited has been woken.
            if self.stopped.load(Ordering::Acquire) { Ok(()) } else { lifted }
        };
        let place = (FAULTS, at, host_pages.word_of(host_page));
        let taken = before_write(&memory.readers, place, take, read, overlaps, lift)?;
        Ok((taken != 0).then_some(pages))
    }

    /// A discard of `range` has set its marks: what is pending of it is captured now. It cannot
    /// fail (`discard-cannot-fail`): the snapshot does.
    pub(super) fn copy_before_discard(&self, memory: &GuestMemory, at: usize, range: PageRange) {
        let host_pages = self.pending.block(at).covering(range);
        // Most discards, of what is not pending, cost nothing.
        if self.pending.block(at).bits().next_set(host_pages).is_none() {
            return;
        }
        if !self.has_failed() {
            let mut rescuing = self.discard_batch.lock().unwrap_or_else(PoisonError::into_inner);
            match self.copy_into(&mut rescuing, memory, at, host_pages) {
                Ok(pages) => return add(&self.live.rescued_pages, pages),
                Err(error) => self.fail(error),
            }
        }
        // Nothing of it is wanted any more, and nobody may read it after this: nobody finds it.
        self.pending.take_range(at, host_pages, |_, _| ());
    }

    fn copy_into(
        &self, kept: &mut Option<Batch>, memory: &GuestMemory, at: usize, host_pages: PageRange,
    ) -> Result<u64, JobError> {
        let mut batch = kept.take().map_or_else(|| self.batch(memory), Ok)?;
        let pages = self.sweep(memory, SESSION, at, host_pages, &mut batch)?;
        // What one that failed holds is of no use to the next.
        *kept = Some(batch);
        Ok(pages)
    }

    /// Pages were freed, and are holes now: nothing of them is to be saved any more. See
    /// [`super::freed`].
    pub(super) fn drop_freed(&self, at: usize, range: PageRange) {
        self.pending.take_range(at, self.pending.block(at).covering(range), |_, _| ());
    }

    /// The pages that a reader may be at when it has published word `word` of the block at index
    /// `at`.
    pub(super) fn published_pages(&self, at: usize, word: u64) -> PageRange {
        self.pending.block(at).published_pages(word)
    }

    /// All that was pending was taken: returns when a discard that took some of it has put it, too,
    /// and a fault that took some has read it. The protection is not needed any more.
    ///
    /// # Errors
    /// As [`CopyBeforeWrite::check`].
    pub fn finish(&self, readers: &Readers) -> Result<(), JobError> {
        before_unregister(readers);
        drop(self.discard_batch.lock().unwrap_or_else(PoisonError::into_inner));
        self.stop_faults();
        self.check()
    }

    /// No fault takes a page from now on. To be called before discards are not told of this any
    /// more ([`Marking::end`](super::marking::Marking::end)): they wait for those who took before.
    pub fn stop_faults(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// The snapshot is not to be had any more. The first to say so says why.
    pub fn fail(&self, error: JobError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    /// True if [`CopyBeforeWrite::fail`] was called.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Fails if [`CopyBeforeWrite::fail`] was called.
    ///
    /// # Errors
    /// What it was called with; the one who is told first gets it.
    pub fn check(&self) -> Result<(), JobError> {
        if !self.has_failed() {
            return Ok(());
        }
        let error = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        Err(error.unwrap_or(JobError::Cancelled))
    }
}

#[cfg(test)]
mod failing;
#[cfg(test)]
mod tests;
