// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copy-before-write: saves the guest's memory as it was at one instant, while the guest may keep
//! running.
//!
//! # Who does what to a page
//!
//! Nobody writes at the instant, because the guest is paused. Every page that has content at that
//! moment becomes *pending*, and is write-protected if the guest will run again before it is saved.
//! Each pending page is captured exactly once, by the thread that *takes* it (see [`HostPageSet`]):
//! that thread reads the page, and only then is the protection removed. Three kinds of threads
//! capture pages at the same time, without a lock:
//!
//! - A **worker** sweeps the memory: it publishes the word of pages in the fence, takes what is
//!   pending of it, reads it, and removes the protection.
//! - The **fault thread** handles a write fault: it publishes, takes and reads the page. If the
//!   page is not pending, the fault thread waits for the threads that may still be reading it. Then
//!   it removes the protection, and the guest writes. So no write happens before the page is read.
//! - A **discard** has marked the page. It captures what is pending, as a worker does, and waits
//!   for all threads that took pages of the range before. Only then is the page freed and the
//!   discard acknowledged, so nobody reads the page later
//!   ([`never-read`](crate::invariants#never-read)). A populate has nothing to capture: a page that
//!   was discarded at the instant is not pending, and is saved as discarded.
//!
//! Discards set their marks, and the instant collects the pending pages, under one lock
//! ([`GuestMemory::marking`](super::GuestMemory::marking)). So a discard either comes before the
//! instant, or finds the pending pages.
//!
//! These steps are in [`super::capture_ordering`], and a model checker tries all orders of them.
//! The last step has an order, too: "nothing is pending" does not mean "everything is read",
//! because a thread takes a page before it reads it. So the agent waits for all readers before it
//! asks the VMM to unregister its mappings.
//!
//! The bytes that were read count only if the page was still protected while it was read. If the
//! VMM gives up on the agent, it unregisters its mappings, and the removal of the protection that
//! follows each read fails. Then the snapshot fails.

use super::block::Block;
use super::capture_ordering::{before_unregister, before_write, capture};
use super::cursor::Cursor;
use super::error::MemoryError;
use super::fence::{FAULTS, Readers, SESSION};
use super::host_page_set::{HostPageSet, fence_words};
use super::mappings::Mappings;
use super::page_buffer::PageBuffer;
use crate::lock::lock;
use crate::stats::{LiveCounters, add};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::userfault::Userfaultfd;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes that are read before they are put into the sink, unless the sink asks for more. They stay
/// in the processor's cache until then.
pub const BATCH: usize = 1 << 20;

/// How often a change of the protection is tried again while the VMM frees memory, and the pause
/// between two tries. Seconds in all: the thread that reads the removals may wait for the disk.
const MAX_TRIES: u32 = 10_000;
const PAUSE: Duration = Duration::from_micros(200);

/// Why a [`Sink`] cannot take a page.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Why a page is not copied before it changes.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The page cannot be read, or there is no memory for a buffer.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The sink cannot take the page.
    #[error(transparent)]
    Sink(SinkError),
    /// The protection of a background snapshot is gone, or cannot be made.
    #[error(
        "block {id}: memory cannot be protected, or is not any more: the VMM may have taken the registration back"
    )]
    Protection {
        /// The block.
        id: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Memory was freed after the instant, by a VMM that makes no request for it.
    #[error(
        "block {id}: the guest gave memory back while it was saved, and what it held is lost: save it again, with \
         --mode paused if that comes again (a balloon and free page reporting give memory back)"
    )]
    Freed {
        /// The block.
        id: u32,
    },
    /// The guest waited to write while the sink took nothing.
    #[error(
        "nothing was written to the image for {:?}, while the guest waited to write: hook_timeout allows no more, and the guest runs on without the snapshot",
        limit
    )]
    SinkTimeout {
        /// How long the guest waited, and may wait.
        limit: Duration,
    },
    /// Write faults cannot be read.
    #[error("cannot read write faults")]
    ReadFaults(#[source] Errno),
    /// A thread that handles write faults ended by a defect.
    #[error("a thread that handles write faults panicked")]
    Panicked,
    /// The job was cancelled, or the snapshot failed before and another caller got the reason.
    #[error("the snapshot was given up")]
    GivenUp,
}

/// Receives the captured pages.
pub trait Sink: std::fmt::Debug + Send + Sync {
    /// Stores the pages `range` of the block at index `at`. No page is put twice. Returns how many
    /// of them are not zero.
    ///
    /// # Errors
    /// If the pages cannot be stored.
    fn put(&self, at: usize, range: PageRange, bytes: &[u8]) -> Result<u64, SinkError>;

    /// How many bytes the sink prefers to get at once.
    fn batch(&self) -> usize {
        BATCH
    }
}

/// The write protection of the VMM's mappings.
#[derive(Debug)]
pub struct Protection {
    /// The userfaultfd that reports the write faults.
    pub uffd: Userfaultfd,
    /// The addresses of the mappings.
    pub mappings: Mappings,
    /// The VMM frees memory without a request. Then a page that reads as zero may be one that was
    /// freed after the instant.
    pub unannounced_frees: bool,
}

impl Protection {
    /// Write-protects host pages.
    ///
    /// # Errors
    /// If they are no longer registered, or the kernel refuses.
    pub fn protect(&self, at: usize, host_pages: PageRange) -> Result<(), CaptureError> {
        let addresses = self.mappings.addresses(at, host_pages);
        self.patiently(at, || self.uffd.protect(addresses))
    }

    /// Removes the protection of host pages, and wakes the threads that wait to write there. Not
    /// for the thread that reads the events.
    ///
    /// # Errors
    /// As for [`Protection::protect`].
    pub fn unprotect(&self, at: usize, host_pages: PageRange) -> Result<(), CaptureError> {
        let addresses = self.mappings.addresses(at, host_pages);
        self.patiently(at, || self.uffd.unprotect(addresses))
    }

    /// Removes the protection of a host page for a thread that waits to write there. For the thread
    /// that reads the events: if it has to read a removal first, the writer is only woken, and
    /// faults again.
    ///
    /// # Errors
    /// As for [`Protection::protect`].
    pub fn allow_write(&self, at: usize, host_page: u64) -> Result<(), CaptureError> {
        let addresses = self.mappings.addresses(at, PageRange::new(host_page, 1));
        let allowed = match self.uffd.unprotect(addresses) {
            Err(Errno::AGAIN) => self.uffd.wake(addresses),
            allowed => allowed,
        };
        allowed.map_err(|source| self.failed(at, source))
    }

    /// Runs `change`, and again while the VMM frees memory and its removals are not read yet.
    fn patiently(
        &self, at: usize, change: impl Fn() -> Result<(), Errno>,
    ) -> Result<(), CaptureError> {
        let mut tries = 0;
        loop {
            match change() {
                Err(Errno::AGAIN) if tries < MAX_TRIES => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                changed => return changed.map_err(|source| self.failed(at, source)),
            }
        }
    }

    fn failed(&self, at: usize, source: Errno) -> CaptureError {
        CaptureError::Protection { id: self.mappings.all()[at].id, source }
    }
}

/// The copy-before-write state of one snapshot.
#[derive(Debug)]
pub struct CopyBeforeWrite {
    blocks: Vec<Arc<Block>>,
    /// Pages that are not captured yet. With protection, the unit is the host page of the mapping;
    /// without, it is a page.
    pending: Arc<HostPageSet>,
    /// None if the guest is paused until all is saved.
    protection: Option<Arc<Protection>>,
    sink: Arc<dyn Sink>,
    live: Arc<LiveCounters>,
    /// Why the snapshot failed: the first error.
    failure: Mutex<Option<CaptureError>>,
    failed: AtomicBool,
    /// Nothing more is to be captured: all is captured, or the snapshot failed.
    stopped: AtomicBool,
    /// The buffer of discards. The first discard that captures something allocates it. The lock is
    /// held while a discard captures and puts.
    discard_batch: Mutex<Option<Batch>>,
    /// Where the workers continue.
    pub cursor: Cursor,
}

/// Pages that were read and not yet put into the sink.
#[derive(Debug)]
pub struct Batch {
    buffer: PageBuffer,
    /// The batch counts as full from this number of bytes on.
    full: usize,
    filled: usize,
    /// Index of the block, the pages, and where they begin in the buffer.
    runs: Vec<(usize, PageRange, usize)>,
}

impl Batch {
    /// Room for about `bytes` bytes of pages of `blocks`, and for at least one host page.
    fn new(blocks: &[Arc<Block>], bytes: usize) -> Result<Self, MappingError> {
        let largest = blocks.iter().map(|block| block.backing.host_page_size()).max();
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

    /// Reads pages, and returns their bytes.
    fn read(&mut self, at: usize, block: &Block, pages: PageRange) -> Result<&[u8], CaptureError> {
        let start = self.filled;
        let bytes = pages.bytes() as usize;
        let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
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
        Ok(&self.buffer[start..start + bytes])
    }
}

impl CopyBeforeWrite {
    /// Will capture the `pending` pages of `blocks` into `sink`.
    pub fn new(
        blocks: &[Arc<Block>], pending: Arc<HostPageSet>, protection: Option<Arc<Protection>>,
        sink: Arc<dyn Sink>, live: Arc<LiveCounters>,
    ) -> Self {
        let (failure, failed) = (Mutex::default(), AtomicBool::new(false));
        let (stopped, discard_batch, cursor) = (
            AtomicBool::new(false),
            Mutex::default(),
            Cursor::with_pieces(blocks, BATCH as u64 / PAGE_SIZE),
        );
        let blocks = blocks.to_vec();
        Self {
            blocks,
            pending,
            protection,
            sink,
            live,
            failure,
            failed,
            stopped,
            discard_batch,
            cursor,
        }
    }

    /// The buffer that a worker needs. It is empty between two calls of [`CopyBeforeWrite::sweep`].
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn batch(&self) -> Result<Batch, CaptureError> {
        Batch::new(&self.blocks, self.sink.batch()).map_err(|error| MemoryError::from(error).into())
    }

    /// The pages that are not captured yet.
    pub fn pending(&self) -> &Arc<HostPageSet> {
        &self.pending
    }

    /// Worker `worker` captures what is pending of the host pages `range`. Returns the number of
    /// captured pages.
    ///
    /// # Errors
    /// If a page cannot be read or put, or the protection is gone.
    pub fn sweep(
        &self, readers: &Readers, worker: usize, at: usize, range: PageRange, batch: &mut Batch,
    ) -> Result<u64, CaptureError> {
        let mut pages = 0;
        for (word, mask) in fence_words(range, self.pending.block(at).unit()) {
            pages += self.read(readers, worker, (at, word, mask), batch)?;
            if batch.is_full() {
                self.unprotect_and_put(batch)?;
            }
        }
        self.unprotect_and_put(batch)?;
        Ok(pages)
    }

    /// Takes and reads those of the host pages `mask` of word `word` that are pending. Returns the
    /// number of pages.
    fn read(
        &self, readers: &Readers, worker: usize, (at, word, mask): (usize, u64, u64),
        batch: &mut Batch,
    ) -> Result<u64, CaptureError> {
        let (host_pages, block) = (self.pending.block(at), &self.blocks[at]);
        let first = word * WORD_BITS + u64::from(mask.trailing_zeros());
        let take = || self.pending.take(at, word, mask);
        let read = |taken| {
            runs_of_word(word * WORD_BITS, taken).try_for_each(|run| {
                let pages = host_pages.pages(run);
                let bytes = batch.read(at, block, pages)?;
                self.check_not_freed(block, pages, bytes)
            })
        };
        let taken = capture(readers, (worker, at, host_pages.word_of(first)), take, read)?;
        Ok(u64::from(taken.count_ones()) * host_pages.unit())
    }

    /// Removes the protection of the pages that were read, and puts them into the sink.
    fn unprotect_and_put(&self, batch: &mut Batch) -> Result<(), CaptureError> {
        if let Some(protection) = &self.protection {
            // The guest does not wait for the disk: the protection is removed first.
            for (at, pages, _) in &batch.runs {
                protection.unprotect(*at, self.pending.block(*at).covering(*pages))?;
            }
        }
        self.put(batch)
    }

    fn put(&self, batch: &mut Batch) -> Result<(), CaptureError> {
        for (at, pages, start) in batch.runs.drain(..) {
            let bytes = &batch.buffer[start..start + pages.bytes() as usize];
            self.put_run(at, pages, bytes)?;
        }
        batch.filled = 0;
        Ok(())
    }

    /// Puts captured pages, `range` of the block at index `at`, into the sink.
    ///
    /// # Errors
    /// If the sink cannot store them.
    pub fn put_run(&self, at: usize, range: PageRange, bytes: &[u8]) -> Result<(), CaptureError> {
        let put = self.sink.put(at, range, bytes).map_err(CaptureError::Sink)?;
        add(&self.live.pages_saved, put);
        add(&self.live.zero_pages, range.count - put);
        add(&self.live.image_bytes, put * PAGE_SIZE);
        Ok(())
    }

    /// The guest is about to write to a host page. Captures it into `into`, unless it is captured
    /// already, and then removes the protection. Returns the pages if they are in `into` now: the
    /// caller must put them into the sink.
    ///
    /// The protection is also removed if the page cannot be read. The snapshot has failed then, and
    /// the guest need not wait until it ends.
    ///
    /// # Errors
    /// If the page cannot be read, or the protection is gone.
    pub fn write_fault(
        &self, readers: &Readers, (at, host_page): (usize, u64), into: &mut [u8],
    ) -> Result<Option<PageRange>, CaptureError> {
        let (host_pages, block) = (self.pending.block(at), &self.blocks[at]);
        let pages = host_pages.pages(PageRange::new(host_page, 1));
        let take = || {
            // A snapshot that failed takes nothing. Discards no longer look for it: they wait only
            // for threads that took a page before.
            let wanted = !self.stopped.load(Ordering::Acquire);
            if wanted {
                self.pending.take(at, host_page / WORD_BITS, 1 << (host_page % WORD_BITS))
            } else {
                0
            }
        };
        let read = |_| {
            let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
            block
                .backing
                .read(pages.offset(), &mut into[..pages.bytes() as usize])
                .map_err(failed)?;
            self.check_not_freed(block, pages, &into[..pages.bytes() as usize])?;
            add(&self.live.copied_before_write_pages, pages.count);
            self.cursor.fault(at, pages.end());
            Ok(())
        };
        let overlaps = |index, word| index == at && self.published_pages(at, word).overlaps(&pages);
        let lift = || {
            add(&self.live.write_faults, 1);
            let Some(protection) = &self.protection else { return Ok(()) };
            let lifted = protection.allow_write(at, host_page);
            // At its end, a snapshot unregisters the mappings while this thread still reads faults.
            // Unregistering has woken the writers already, so this error does no harm.
            if self.stopped.load(Ordering::Acquire) { Ok(()) } else { lifted }
        };
        let place = (FAULTS, at, host_pages.word_of(host_page));
        let taken = before_write(readers, place, take, read, overlaps, lift)?;
        Ok((taken != 0).then_some(pages))
    }

    /// Checks that none of these pages, which were just read, was freed after the instant by a VMM
    /// that makes no request. Such a page is a hole until the VMM's removal is read: only then may
    /// the guest use it again. Pages that neither begin nor end with zero need no look.
    fn check_not_freed(
        &self, block: &Block, pages: PageRange, bytes: &[u8],
    ) -> Result<(), CaptureError> {
        if !self.protection.as_ref().is_some_and(|protection| protection.unannounced_frees) {
            return Ok(());
        }
        let id = block.geometry.id;
        for (page, bytes) in (pages.first..).zip(bytes.chunks_exact(PAGE_SIZE as usize)) {
            if !bytes.starts_with(&[0; 8]) && !bytes.ends_with(&[0; 8]) {
                continue;
            }
            let data = block.backing.first_data(PageRange::new(page, 1));
            if data.map_err(|source| MemoryError::Backing { id, source })?.is_none() {
                return Err(CaptureError::Freed { id });
            }
        }
        Ok(())
    }

    /// The VMM has freed these host pages after the instant. If one of them is pending, its content
    /// is lost, and so is the snapshot.
    pub fn freed_unannounced(&self, at: usize, host_pages: PageRange) {
        let mut any = false;
        self.pending.take_range(at, host_pages, |_, _| any = true);
        if any {
            self.fail(CaptureError::Freed { id: self.blocks[at].geometry.id });
        }
    }

    /// A discard of `range` has set its marks: captures what is pending of the range. A discard
    /// cannot fail ([`discard-cannot-fail`](crate::invariants#discard-cannot-fail)), so an error
    /// here fails the snapshot instead.
    pub(super) fn copy_before_discard(&self, readers: &Readers, at: usize, range: PageRange) {
        let host_pages = self.pending.block(at).covering(range);
        // Most discards are of pages that are not pending. They cost nothing here.
        if self.pending.block(at).bits().next_set(host_pages).is_none() {
            return;
        }
        if !self.has_failed() {
            let mut batch = lock(&self.discard_batch);
            match self.copy_into(&mut batch, readers, at, host_pages) {
                Ok(pages) => return add(&self.live.copied_before_discard_pages, pages),
                Err(error) => self.fail(error),
            }
        }
        // The snapshot failed, so nobody needs these pages. Taking them makes sure that nobody
        // reads them after this.
        self.pending.take_range(at, host_pages, |_, _| ());
    }

    fn copy_into(
        &self, kept: &mut Option<Batch>, readers: &Readers, at: usize, host_pages: PageRange,
    ) -> Result<u64, CaptureError> {
        let mut batch = kept.take().map_or_else(|| self.batch(), Ok)?;
        let pages = self.sweep(readers, SESSION, at, host_pages, &mut batch)?;
        // Kept only on success: a failed call leaves pages in the batch that the next discard must
        // not put.
        *kept = Some(batch);
        Ok(pages)
    }

    /// Pages were freed and are holes now, so nothing of them is left to save. See
    /// [`super::freed`].
    pub(super) fn drop_freed(&self, at: usize, range: PageRange) {
        self.pending.take_range(at, self.pending.block(at).covering(range), |_, _| ());
    }

    /// The pages that a reader may be reading when it has published word `word` of the block at
    /// index `at`.
    pub(super) fn published_pages(&self, at: usize, word: u64) -> PageRange {
        self.pending.block(at).published_pages(word)
    }

    /// Waits for the rest after all pending pages are taken: for faults to read what they took, and
    /// for a discard to read and put what it took. After this the protection is not needed any
    /// more.
    ///
    /// # Errors
    /// As [`CopyBeforeWrite::check`].
    pub fn finish(&self, readers: &Readers) -> Result<(), CaptureError> {
        before_unregister(readers);
        drop(lock(&self.discard_batch));
        self.stop_faults();
        self.check()
    }

    /// From now on no fault takes a page. While pages are pending, call this before
    /// [`Marking::end_snapshot`](super::marking::Marking::end_snapshot): a discard that does not
    /// find the snapshot any more waits only for threads that took pages before.
    pub fn stop_faults(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Fails the snapshot. The first error is kept.
    pub fn fail(&self, error: CaptureError) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    /// True if [`CopyBeforeWrite::fail`] was called.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Fails if [`CopyBeforeWrite::fail`] was called.
    ///
    /// # Errors
    /// The first error that [`CopyBeforeWrite::fail`] got. It is returned once; later calls return
    /// [`CaptureError::GivenUp`].
    pub fn check(&self) -> Result<(), CaptureError> {
        if !self.has_failed() {
            return Ok(());
        }
        let error = lock(&self.failure).take();
        Err(error.unwrap_or(CaptureError::GivenUp))
    }
}

#[cfg(test)]
mod failing;
#[cfg(test)]
mod tests;
