//! Reading and placing what is missing, for all threads of a lazy restore.
//!
//! A page is *unread* until somebody begins to read it: so the threads that read ahead do not read
//! what another does. Who reads for a fault does so whether the page is unread or not, since it may
//! be on its way behind megabytes. *Missing* it is until it is placed, or discarded, whatever was
//! read of it: see [`crate::memory::missing_pages`].
//!
//! If one thread fails, all do.

use super::fault_reads::FaultQueue;
use super::prefetch::{PrefetchGate, WorkingSetPieces};
use super::source::Source;
use crate::job::{Job, JobError, add};
use crate::memory::cursor::Cursor;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::missing_pages::{MissingPages, PlaceError};
use crate::missing_faults::{RETRY, ShortageReport, lacks_memory};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use rustix::event::PollFlags;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time between two looks at how far it is.
const POLL: Duration = Duration::from_millis(200);
/// The same while it is waited for the guest to come to rest.
const IDLE_POLL: Duration = Duration::from_millis(10);
/// A guest that touches nothing that is missing for so long has come to rest.
const IDLE_AFTER: Duration = Duration::from_millis(100);
/// How long it is waited for that.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long there may be no memory to place pages in before that is the end.
const NO_MEMORY_TIMEOUT: Duration = Duration::from_secs(60);

/// What all threads of a lazy restore share.
#[derive(Debug)]
pub struct LazyRestore<'a> {
    /// The job.
    pub job: &'a Job,
    /// What is read.
    pub source: &'a Source,
    /// Where it goes.
    pub missing_pages: &'a MissingPages,
    /// What nobody has begun to read, in host pages.
    pub unread: HostPageSet,
    /// What is read ahead next.
    pub cursor: Cursor,
    /// What the guest waits for.
    pub queue: FaultQueue,
    /// The working set, read ahead of all else.
    pub pieces: WorkingSetPieces,
    /// Shut until what is not of the working set may be read ahead.
    pub gate: PrefetchGate,
    /// What the guest touches is being written down: nothing is placed that it does not touch,
    /// until it has come to rest.
    pub recording: bool,
    /// When the guest last waited for something, in nanoseconds from the start.
    touched: AtomicU64,
    start: Instant,
    /// Why it failed: the first to fail says.
    failure: Mutex<Option<JobError>>,
    failed: AtomicBool,
    /// All is over, for better or worse.
    over: AtomicBool,
}

impl<'a> LazyRestore<'a> {
    /// Of all that is missing, which is `unread` by now. `pieces` are read ahead of all else.
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

    /// The guest waits for a page that is missing.
    pub fn touched(&self) {
        let since = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.touched.store(since, Ordering::Relaxed);
    }

    /// True if whoever works is to end.
    pub fn has_ended(&self) -> bool {
        self.failed.load(Ordering::Acquire) || self.over.load(Ordering::Acquire)
    }

    /// Runs a thread's work; if it fails, or panics, all do.
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

    /// All threads end, and so does the job, for the reason that is the first to be given. Not if
    /// all is over.
    pub fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        self.release();
        // A VMM that still loads its state, and waits for what never comes, goes on: it could hear
        // of the end in no other way.
        self.missing_pages.release_waiters();
        self.missing_pages.notify();
    }

    /// Nobody waits any more.
    fn release(&self) {
        self.job.limiter.set_rate(0);
        self.gate.end();
        self.queue.close();
    }

    /// Ends all threads.
    ///
    /// # Errors
    /// Why one of them failed.
    pub fn end(&self) -> Result<(), JobError> {
        self.over.store(true, Ordering::Release);
        self.release();
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// The guest runs: returns when all is here, or a thread failed.
    ///
    /// # Errors
    /// If the job is cancelled, which is by force.
    pub fn follow(&self) -> Result<(), JobError> {
        let running = Instant::now();
        loop {
            let mut count = [0; 8];
            // Only resets the descriptor.
            let _ = rustix::io::read(self.missing_pages.event(), &mut count);
            if self.has_ended() {
                return Ok(());
            }
            if self.missing_pages.missing().remaining_pages() == 0 {
                // Whoever took the last of it may still be placing it, and would have to give it
                // back if that failed.
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
            self.job
                .cancel
                .wait(&[(self.missing_pages.event(), PollFlags::IN)], Instant::now() + look)?;
        }
    }

    fn is_guest_idle(&self, running: Instant) -> bool {
        let touched = self.start + Duration::from_nanos(self.touched.load(Ordering::Relaxed));
        touched.max(running).elapsed() >= IDLE_AFTER || running.elapsed() >= IDLE_TIMEOUT
    }

    /// Reads the pages `range`, which lie in one extent and are whole host pages, into the start of
    /// `buffer`, and checks them. Those that have no content are zero if the host page is larger
    /// than a page; else nobody is missing them, and what lies in their place is nothing.
    ///
    /// # Errors
    /// If one cannot be read, or is damaged: which, and where.
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

    /// Places those of the pages `range`, whole host pages, that are missing. `worker` is the
    /// caller's own number. Returns how many pages that were.
    ///
    /// # Errors
    /// If the kernel refuses, and does not want to be asked later.
    pub fn place(
        &self, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, JobError> {
        let begun = Instant::now();
        let mut wants = ShortageReport::new(self.job);
        loop {
            match self.place_once(worker, at, range, content) {
                Ok(pages) => {
                    add(&self.job.live.pages_sent, pages);
                    return Ok(pages);
                }
                Err(error)
                    if lacks_memory(&error)
                        && begun.elapsed() < NO_MEMORY_TIMEOUT
                        && !self.has_ended() =>
                {
                    wants.report(at);
                    // The guest waits meanwhile, and is not lost.
                    std::thread::sleep(RETRY);
                }
                Err(error) => return Err(JobError::not_placed(&self.job.memory, at, error)),
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
