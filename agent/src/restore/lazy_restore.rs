// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state that the threads of a lazy restore share, and how they read and place pages.
//!
//! A host page that has content in the image is in two sets:
//!
//! - *unread* until a thread begins to read it. A thread that prefetches reads only what it takes
//!   from this set, so no page is prefetched twice. A fault worker reads the page
//!   in any case: a prefetch thread may hold the page already, but read megabytes before it.
//! - *missing* until it is placed or discarded, whatever was read of it. See
//!   [`crate::memory::missing_pages`].
//!
//! If there is no memory to place a page in, the thread tries again for `NO_MEMORY_TIMEOUT` while
//! the guest waits. If one thread fails, all threads end and the job fails.

use super::queues::{FaultQueue, PrefetchGate, WorkingSetPieces};
use super::source::Source;
use crate::job::{Job, JobError, add};
use crate::lock::lock;
use crate::memory::MemoryError;
use crate::memory::cursor::Cursor;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::missing_pages::{MissingPages, PlaceError};
use crate::missing_faults::{RETRY, ShortageReport};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::event::PollFlags;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest time between two looks at the progress.
const POLL: Duration = Duration::from_millis(200);
/// The same while the agent waits for the guest to become idle.
const IDLE_POLL: Duration = Duration::from_millis(10);
/// A guest is idle when it has touched no missing page for this long.
const IDLE_AFTER: Duration = Duration::from_millis(100);
/// Longest wait for the guest to become idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a page may fail to be placed for want of memory before the restore fails.
const NO_MEMORY_TIMEOUT: Duration = Duration::from_secs(60);

/// What all threads of a lazy restore share.
#[derive(Debug)]
pub struct LazyRestore<'a> {
    /// The job.
    pub job: &'a Job,
    /// The image to read from.
    pub source: &'a Source,
    /// The missing pages, and how to place them.
    pub missing_pages: &'a MissingPages,
    /// The host pages that no thread has begun to read.
    pub unread: HostPageSet,
    /// The position of the prefetch.
    pub cursor: Cursor,
    /// The host pages that the guest waits for.
    pub queue: FaultQueue,
    /// The working set, which is prefetched before all other pages.
    pub pieces: WorkingSetPieces,
    /// Closed until pages outside of the working set may be prefetched.
    pub gate: PrefetchGate,
    /// True if this restore records what the guest touches. Then, until the guest is idle, only
    /// pages that it touched are placed.
    pub recording: bool,
    /// When the guest last touched a missing page, in nanoseconds since `start`.
    touched: AtomicU64,
    start: Instant,
    /// The error of the first thread that failed.
    failure: Mutex<Option<JobError>>,
    failed: AtomicBool,
    /// The restore has ended, with success or without.
    over: AtomicBool,
}

impl<'a> LazyRestore<'a> {
    /// A lazy restore of `missing_pages`, all of which are still `unread`. The pages `pieces` are
    /// prefetched first.
    pub fn new(
        job: &'a Job, source: &'a Source, missing_pages: &'a MissingPages, unread: HostPageSet,
        pieces: Vec<(usize, PageRange)>, recording: bool,
    ) -> Self {
        Self {
            job,
            source,
            missing_pages,
            unread,
            cursor: Cursor::new(&job.memory),
            queue: FaultQueue::default(),
            pieces: WorkingSetPieces::new(pieces),
            gate: PrefetchGate::default(),
            recording,
            touched: AtomicU64::new(0),
            start: Instant::now(),
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    /// Notes that the guest touched a missing page now.
    pub fn touched(&self) {
        let since = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.touched.store(since, Ordering::Relaxed);
    }

    /// True if the threads must end.
    pub fn has_ended(&self) -> bool {
        self.failed.load(Ordering::Acquire) || self.over.load(Ordering::Acquire)
    }

    /// Runs the work of one thread. If it fails or panics, all threads end.
    pub fn check(&self, work: impl FnOnce() -> Result<(), JobError>) {
        struct Panics<'a, 'b>(&'a LazyRestore<'b>);
        impl Drop for Panics<'_, '_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.fail(JobError::Panicked);
                }
            }
        }
        let _panics = Panics(self);
        if let Err(error) = work() {
            self.fail(error);
        }
    }

    /// Ends all threads, and the job with `error` unless another thread failed first. Does nothing
    /// if the restore has ended.
    pub fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        self.release();
        // The VMM may be loading its state, and wait for a page that never comes. It cannot learn
        // of the failure in another way, so the page reads as zero.
        self.missing_pages.release_waiters();
        self.missing_pages.notify();
    }

    /// Wakes all threads that wait: for bandwidth, for the gate, or for a fault.
    fn release(&self) {
        self.job.limiter.set_rate(0);
        self.gate.end();
        self.queue.close();
    }

    /// Ends all threads.
    ///
    /// # Errors
    /// The error of the first thread that failed.
    pub fn end(&self) -> Result<(), JobError> {
        self.over.store(true, Ordering::Release);
        self.release();
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    /// Follows the restore while the guest runs. Returns when no page is missing or a thread has
    /// failed.
    ///
    /// # Errors
    /// If the job is cancelled. After the commit point only a forced cancel does that.
    pub fn follow(&self) -> Result<(), JobError> {
        let running = Instant::now();
        loop {
            self.missing_pages.event().reset();
            if self.has_ended() {
                return Ok(());
            }
            if self.missing_pages.missing().remaining_pages() == 0 {
                // The thread that took the last page may still be placing it. If that fails it
                // makes the page missing again. So wait for it and look again.
                self.job.memory.readers.wait(|_, _| true);
                if self.missing_pages.missing().remaining_pages() == 0 {
                    return Ok(());
                }
            }
            let rests = !self.recording || self.is_guest_idle(running);
            if rests {
                self.gate.open();
            }
            let look = if rests { POLL } else { IDLE_POLL };
            self.job.cancel.wait(
                &[(self.missing_pages.event().as_fd(), PollFlags::IN)],
                Instant::now() + look,
            )?;
        }
    }

    fn is_guest_idle(&self, running: Instant) -> bool {
        let touched = self.start + Duration::from_nanos(self.touched.load(Ordering::Relaxed));
        touched.max(running).elapsed() >= IDLE_AFTER || running.elapsed() >= IDLE_TIMEOUT
    }

    /// Reads the pages `range` into the start of `buffer`, and checks them. The pages lie in one
    /// extent and are whole host pages.
    ///
    /// Pages without content are filled with zero if a host page is larger than a page. Otherwise
    /// they are not missing, so they are never placed, and the buffer holds no defined bytes for
    /// them.
    ///
    /// # Errors
    /// If a page cannot be read or is damaged. The error names the page and its place in the file.
    pub fn read<'b>(
        &self, at: usize, range: PageRange, buffer: &'b mut [u8],
    ) -> Result<&'b [u8], JobError> {
        let content = &mut buffer[..range.bytes() as usize];
        let pages = self.source.present(at).count(range);
        if pages < range.count && self.missing_pages.missing().block(at).unit() > 1 {
            content.fill(0);
        }
        self.source.read(at, range, content)?;
        add(&self.job.live.wire_bytes, pages * PAGE_SIZE);
        Ok(content)
    }

    /// Places those of the pages `range` that are missing. The range consists of whole host pages,
    /// and `worker` is the number of the calling thread. Returns the number of pages placed.
    ///
    /// # Errors
    /// If the kernel refuses for another reason than want of memory, or if there is no memory for
    /// `NO_MEMORY_TIMEOUT`, or when the restore ends.
    pub fn place(
        &self, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, JobError> {
        let begun = Instant::now();
        let mut shortage = ShortageReport::new(self.job);
        loop {
            match self.place_once(worker, at, range, content) {
                Ok(pages) => {
                    add(&self.job.live.pages_sent, pages);
                    return Ok(pages);
                }
                Err(error)
                    if error.lacks_memory()
                        && begun.elapsed() < NO_MEMORY_TIMEOUT
                        && !self.has_ended() =>
                {
                    shortage.report(at);
                    // The guest waits for the memory in the meantime. It is not lost.
                    std::thread::sleep(RETRY);
                }
                Err(error) => {
                    return Err(MemoryError::not_placed(&self.job.memory, at, error).into());
                }
            }
        }
    }

    fn place_once(
        &self, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, PlaceError> {
        let (readers, missing) = (&self.job.memory.readers, self.missing_pages.missing().block(at));
        if missing.unit() == 1 {
            return self.missing_pages.place_pages(readers, worker, at, range, content);
        }
        let host_pages = missing.covering(range);
        let bytes = (missing.unit() * PAGE_SIZE) as usize;
        let each = (host_pages.first..host_pages.end()).zip(content.chunks_exact(bytes));
        each.map(|(host_page, content)| {
            self.missing_pages.place_host_page(readers, worker, at, host_page, content)
        })
        .sum()
    }
}
