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
//! - The **fault thread** handles a write fault: it publishes, takes and reads the page, and keeps
//!   it in [`CapturedPages`]. If the page is not pending, the fault thread waits for the threads
//!   that may still be reading it. Then it removes the protection, and the guest writes. So no
//!   write happens before the page is read.
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
//! # How captured pages get into the sink
//!
//! A worker saves a *piece* at a time, an aligned range of pages. When it has taken all that was
//! pending of the piece, it waits for the threads that took pages of it before. From then on nobody
//! takes a page of the piece, and all of them that faults have captured are in [`CapturedPages`].
//! The worker adds them to what it has read, and puts the whole piece at once. If room for captured
//! pages becomes scarce, one more thread puts them in batches, without the rest of their pieces
//! ([`CopyBeforeWrite::put_while_scarce`]).
//!
//! The bytes that were read count only if the page was still protected while it was read. If the
//! VMM gives up on the agent, it unregisters its mappings, and the removal of the protection that
//! follows each read fails. Then the snapshot fails.

use super::block::Block;
use super::capture_batch::Batch;
use super::capture_ordering::{before_unregister, before_write, capture, collect};
use super::captured_pages::{CapturedPages, Leaving, Piece, Room};
use super::error::MemoryError;
use super::fence::{FAULTS, Readers, SESSION};
use super::host_page_set::{HostPageSet, fence_words};
use super::sweep_order::{Claim, SweepOrder};
use super::write_protection::Protection;
use crate::lock::lock;
use crate::stats::{LiveCounters, add};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes of a piece, unless the sink asks for more. They stay in the processor's cache until they
/// are put.
pub const BATCH: usize = 1 << 20;

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

/// Pages that follow each other, and their bytes.
#[derive(Debug)]
pub struct Run<'a> {
    /// The index of their block.
    pub at: usize,
    /// The pages.
    pub pages: PageRange,
    /// Their bytes. The sink may change them, for example encrypt them: nobody reads them after it.
    pub bytes: &'a mut [u8],
}

/// Receives the captured pages.
pub trait Sink: std::fmt::Debug + Send + Sync {
    /// Stores the pages of `runs`, which are in the order of the memory. No page is put twice.
    /// Returns how many of them are not zero.
    ///
    /// # Errors
    /// If the pages cannot be stored.
    fn put(&self, runs: Vec<Run<'_>>) -> Result<u64, SinkError>;

    /// How many bytes the sink prefers to get at once: a power of two.
    fn batch(&self) -> usize {
        BATCH
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
    /// Pages that faults have captured and that are not put yet.
    captured: CapturedPages,
    /// Pages of a piece.
    piece: u64,
    /// Which piece the workers save next.
    order: SweepOrder,
}

impl CopyBeforeWrite {
    /// Will capture the `pending` pages of `blocks` into `sink`. Pages that faults capture take at
    /// most `capture_memory` bytes until they are put.
    pub fn new(
        blocks: &[Arc<Block>], pending: Arc<HostPageSet>, protection: Option<Arc<Protection>>,
        sink: Arc<dyn Sink>, capture_memory: usize, live: Arc<LiveCounters>,
    ) -> Self {
        let units = (0..blocks.len()).map(|at| pending.block(at).unit());
        let piece = units.fold(sink.batch() as u64 / PAGE_SIZE, u64::max);
        Self {
            blocks: blocks.to_vec(),
            pending,
            protection,
            sink,
            live,
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            discard_batch: Mutex::default(),
            captured: CapturedPages::new(capture_memory, piece),
            piece,
            order: SweepOrder::new(piece),
        }
    }

    /// The buffer that a worker needs.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn batch(&self) -> Result<Batch, CaptureError> {
        Batch::new(self.piece).map_err(|error| MemoryError::from(error).into())
    }

    /// The pages that are not captured yet.
    pub fn pending(&self) -> &Arc<HostPageSet> {
        &self.pending
    }

    /// Claims a piece for a worker. `None` if no piece is left for it.
    pub fn claim(&self) -> Option<Claim<'_>> {
        self.order.claim(&self.pending, &self.captured)
    }

    /// Worker `worker` saves a piece: it captures what is pending of it, and puts that with the
    /// pages of the piece that faults have captured. Returns the number of pages that it captured
    /// itself.
    ///
    /// # Errors
    /// If a page cannot be read or put, or the protection is gone.
    pub fn sweep(
        &self, readers: &Readers, worker: usize, piece: Piece, batch: &mut Batch,
    ) -> Result<u64, CaptureError> {
        let (at, pages) = (piece.0, self.order.pages(piece));
        let swept =
            self.read(readers, worker, at, self.pending.block(at).covering(pages), batch)?;
        let overlaps = |index, word| index == at && self.published_pages(at, word).overlaps(&pages);
        let captured = collect(readers, overlaps, || self.captured.take(piece));
        for page in captured.pages() {
            batch.copy(page, page.pages.first - pages.first);
        }
        drop(captured);
        self.put(batch)?;
        Ok(swept)
    }

    /// Captures what is pending of the host pages `range`, which lie in one piece, into the batch,
    /// and removes their protection: the guest does not wait for the disk. Returns the number of
    /// pages.
    fn read(
        &self, readers: &Readers, reader: usize, at: usize, range: PageRange, batch: &mut Batch,
    ) -> Result<u64, CaptureError> {
        batch.clear();
        let (host_pages, block) = (self.pending.block(at), &self.blocks[at]);
        let mut count = 0;
        for (word, mask) in
            fence_words(range.intersection(&host_pages.bits().all()), host_pages.unit())
        {
            let first = word * WORD_BITS + u64::from(mask.trailing_zeros());
            let take = || self.pending.take(at, word, mask);
            let read = |taken| {
                runs_of_word(word * WORD_BITS, taken).try_for_each(|run| {
                    let pages = host_pages.pages(run);
                    let bytes = batch.read(block, at, pages, pages.first % self.piece)?;
                    self.check_not_freed(block, pages, bytes)
                })
            };
            let taken = capture(readers, (reader, at, host_pages.word_of(first)), take, read)?;
            count += u64::from(taken.count_ones()) * host_pages.unit();
        }
        if let Some(protection) = &self.protection {
            for run in batch.runs() {
                protection.unprotect(at, host_pages.covering(run.pages))?;
            }
        }
        Ok(count)
    }

    /// Puts the pages of the batch into the sink.
    fn put(&self, batch: &mut Batch) -> Result<(), CaptureError> {
        let runs = batch.runs();
        if runs.is_empty() {
            return Ok(());
        }
        let pages: u64 = runs.iter().map(|run| run.pages.count).sum();
        let put = self.sink.put(runs).map_err(CaptureError::Sink)?;
        add(&self.live.pages_saved, put);
        add(&self.live.zero_pages, pages - put);
        add(&self.live.image_bytes, put * PAGE_SIZE);
        Ok(())
    }

    /// Puts captured pages without the rest of their pieces whenever room for more of them is
    /// scarce, until [`CopyBeforeWrite::end_batches`].
    ///
    /// # Errors
    /// If a page cannot be put.
    pub fn put_while_scarce(&self) -> Result<(), CaptureError> {
        let mut batch = None;
        while let Some(captured) = self.captured.take_scarce(self.batch_bytes()) {
            self.put_captured(captured, &mut batch)?;
        }
        Ok(())
    }

    /// Ends [`CopyBeforeWrite::put_while_scarce`].
    pub fn end_batches(&self) {
        self.captured.close();
    }

    fn batch_bytes(&self) -> usize {
        (self.piece * PAGE_SIZE) as usize
    }

    fn put_captured(
        &self, captured: Leaving<'_>, batch: &mut Option<Batch>,
    ) -> Result<(), CaptureError> {
        let mut kept = batch.take().map_or_else(|| self.batch(), Ok)?;
        kept.clear();
        let mut place = 0;
        for page in captured.pages() {
            kept.copy(page, place);
            place += page.pages.count;
        }
        // The guest waits for room, but not for the disk.
        drop(captured);
        self.put(batch.insert(kept))
    }

    /// Room for a host page of the block at index `at` that a fault will capture. `None` if there
    /// was none for `wait`.
    ///
    /// # Errors
    /// If the host has no memory for it.
    pub fn room(&self, at: usize, wait: Duration) -> Result<Option<Room<'_>>, CaptureError> {
        let size = self.pending.block(at).unit() * PAGE_SIZE;
        Ok(self.captured.room(size as usize, wait)?)
    }

    /// The guest is about to write to a host page. Captures it into `room`, unless it is captured
    /// already, and then removes the protection. Without room it captures nothing: then the page is
    /// not pending, or the snapshot has failed.
    ///
    /// The protection is also removed if the page cannot be read. The snapshot has failed then, and
    /// the guest need not wait until it ends.
    ///
    /// # Errors
    /// If the page cannot be read, or the protection is gone.
    pub fn write_fault(
        &self, readers: &Readers, (at, host_page): (usize, u64), room: Option<Room<'_>>,
    ) -> Result<(), CaptureError> {
        let (host_pages, block) = (self.pending.block(at), &self.blocks[at]);
        let pages = host_pages.pages(PageRange::new(host_page, 1));
        // A snapshot that failed takes nothing. Discards no longer look for it: they wait only for
        // threads that took a page before.
        let mut room = room.filter(|_| !self.stopped.load(Ordering::Acquire));
        let wanted = room.is_some();
        let take = || {
            let bit = 1 << (host_page % WORD_BITS);
            if wanted { self.pending.take(at, host_page / WORD_BITS, bit) } else { 0 }
        };
        let read = |_| {
            let Some(mut room) = room.take() else { return Ok(()) };
            let bytes = &mut room.bytes()[..pages.bytes() as usize];
            let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
            block.backing.read(pages.offset(), bytes).map_err(failed)?;
            self.check_not_freed(block, pages, bytes)?;
            add(&self.live.copied_before_write_pages, pages.count);
            // Kept before the word is withdrawn: the worker that saves the piece waits for that,
            // and then finds the page.
            room.keep(at, pages);
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
        before_write(readers, place, take, read, overlaps, lift).map(drop)
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
        let batch = match kept {
            Some(batch) => batch,
            None => kept.insert(self.batch()?),
        };
        let unit = self.pending.block(at).unit();
        let per_piece = self.piece / unit;
        let mut pages = 0;
        for number in host_pages.first / per_piece..host_pages.end().div_ceil(per_piece) {
            let part = PageRange::new(number * per_piece, per_piece).intersection(&host_pages);
            pages += self.read(readers, SESSION, at, part, batch)?;
            self.put(batch)?;
        }
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
    /// for a discard to read and put what it took. Puts what faults have captured since. After this
    /// the protection is not needed any more, and all pages are in the sink.
    ///
    /// # Errors
    /// As [`CopyBeforeWrite::check`], or if a page cannot be put.
    pub fn finish(&self, readers: &Readers) -> Result<(), CaptureError> {
        before_unregister(readers);
        drop(lock(&self.discard_batch));
        self.stop_faults();
        self.check()?;
        let mut batch = None;
        loop {
            let captured = self.captured.take_batch(self.batch_bytes());
            if captured.pages().is_empty() {
                return Ok(());
            }
            self.put_captured(captured, &mut batch)?;
        }
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

    /// True if faults capture nothing any more, because all is captured or the snapshot failed.
    pub fn is_over(&self) -> bool {
        self.stopped.load(Ordering::Acquire) || self.has_failed()
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
