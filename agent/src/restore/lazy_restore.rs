// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads of a lazy restore: starts them, follows them, and ends them.
//!
//! - One thread reads the faults ([`FaultForwarder`]), and [`FAULT_WORKERS`] threads answer them
//!   ([`FaultWorker`]).
//! - The workers prefetch ([`Prefetcher`]).
//! - The calling thread loads the VMM's state, resumes the guest, and waits until no page is
//!   missing.
//!
//! If one thread fails, all threads end and the job fails.

use super::fault_reads::{FAULT_WORKERS, FaultForwarder, FaultWorker, LastTouch};
use super::image_pages::ImagePages;
use super::prefetch::Prefetcher;
use super::queues::{FaultQueue, PrefetchGate, WorkingSetPieces};
use super::working_set::WorkingSetRecorder;
use crate::job::JobError;
use crate::lock::lock;
use crate::memory::MemoryError;
use crate::missing_faults::{StopEvent, handle_faults};
use crate::sandbox::{ThreadKind, enter_thread};
use pageferry_protocol::memory::PageRange;
use rustix::event::PollFlags;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest time between two looks at the progress.
const POLL: Duration = Duration::from_millis(200);
/// The same while the agent waits for the guest to become idle.
const IDLE_POLL: Duration = Duration::from_millis(10);
/// A guest is idle when it has touched no missing page for this long.
const IDLE_AFTER: Duration = Duration::from_millis(100);
/// Longest wait for the guest to become idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// A lazy restore and its threads.
#[derive(Debug)]
pub struct LazyRestore<'a> {
    pages: ImagePages<'a>,
    /// The host pages that the guest waits for.
    queue: FaultQueue,
    /// The working set, which is prefetched before all other pages.
    pieces: WorkingSetPieces,
    /// Closed until pages outside of the working set may be prefetched.
    gate: PrefetchGate,
    /// True if this restore records what the guest touches. Then, until the guest is idle, only
    /// pages that it touched are placed.
    recording: bool,
    last_touch: LastTouch,
    /// The error of the first thread that failed.
    failure: Mutex<Option<JobError>>,
    /// The restore has ended, with success or without.
    over: AtomicBool,
}

impl<'a> LazyRestore<'a> {
    /// A lazy restore of `pages`. The pages `pieces` are prefetched first.
    pub fn new(pages: ImagePages<'a>, pieces: Vec<(usize, PageRange)>, recording: bool) -> Self {
        Self {
            pages,
            queue: FaultQueue::default(),
            pieces: WorkingSetPieces::new(pieces),
            gate: PrefetchGate::default(),
            recording,
            last_touch: LastTouch::now(),
            failure: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// True if the threads must end.
    pub fn has_ended(&self) -> bool {
        self.pages.has_ended()
    }

    /// Answers faults and places the memory, while `start` loads the state and resumes the guest.
    /// Returns when no page is missing or a thread has failed.
    ///
    /// Returns whether all memory is placed, and the outcome of the job. If the VMM did not resume
    /// the guest, or not in time, `start` returns that error as `Ok(Some(_))`. Then the memory is
    /// placed all the same, and the job fails with that error in the end.
    pub fn run(
        &self, record: Option<&mut WorkingSetRecorder>, workers: usize,
        start: impl FnOnce() -> Result<Option<JobError>, JobError>,
    ) -> (bool, Result<(), JobError>) {
        let stop = match StopEvent::new() {
            Ok(stop) => stop,
            Err(error) => return (false, Err(error)),
        };
        let (pages, queue) = (&self.pages, &self.queue);
        let mut forwarder = FaultForwarder::new(pages, queue, &self.last_touch, record);
        std::thread::scope(|scope| {
            let (stopping, stop) = (stop.stop_on_drop(), stop.as_fd());
            let no_thread = |source| JobError::Io { what: "start a thread", source };
            let builder = std::thread::Builder::new;
            let faults = builder().spawn_scoped(scope, move || {
                enter_thread(ThreadKind::Pages);
                let fail = |error| self.fail(error);
                handle_faults(pages.job, pages.missing_pages, &mut forwarder, stop, fail);
            });
            let faults = match faults {
                Ok(faults) => faults,
                Err(error) => return (false, Err(no_thread(error))),
            };
            let mut threads = Vec::with_capacity(FAULT_WORKERS + workers);
            let mut refused = None;
            for index in 0..FAULT_WORKERS + workers {
                let work = move || {
                    enter_thread(ThreadKind::Pages);
                    pages.job.cancel.cover_this_thread();
                    self.check(|| {
                        if index < FAULT_WORKERS {
                            FaultWorker::new(pages, self.recording, index).run(queue)
                        } else {
                            // The workers read one piece after another. A store brings many at a
                            // time.
                            if index == FAULT_WORKERS && pages.source.newest().file().is_stored() {
                                let all = self.pieces.all().iter();
                                all.for_each(|(at, piece)| pages.source.will_need(*at, *piece));
                            }
                            Prefetcher::new(pages, index).run(&self.pieces, &self.gate)
                        }
                    });
                };
                match builder().spawn_scoped(scope, work) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => refused = refused.or(Some(error)),
                }
            }
            let mut not_resumed = None;
            self.check(|| {
                // Either all threads start or the restore fails: whether a guest that waits gets
                // its page must not depend on the number of threads.
                refused.map_or(Ok(()), |error| Err(no_thread(error)))?;
                not_resumed = start()?;
                self.follow()
            });
            let outcome = self.end();
            let whole = outcome.is_ok();
            // All content is placed. What is a hole now stays zero, and nobody waits for it.
            if whole {
                pages.missing_pages.unregister();
            }
            drop(stopping);
            let joined = threads
                .into_iter()
                .map(std::thread::ScopedJoinHandle::join)
                .fold(Ok(()), Result::and);
            let ended = faults.join().and(joined).map_err(|_| JobError::Panicked);
            (whole, outcome.and(ended).and(not_resumed.map_or(Ok(()), Err)))
        })
    }

    /// Runs the work of one thread. If it fails or panics, all threads end.
    fn check(&self, work: impl FnOnce() -> Result<(), JobError>) {
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
    fn fail(&self, error: JobError) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        lock(&self.failure).get_or_insert(error);
        self.release();
        // The VMM may be loading its state, and wait for a page that never comes. It cannot learn
        // of the failure in another way, so the page reads as zero.
        self.pages.missing_pages.release_waiters();
        self.pages.missing_pages.notify();
    }

    /// Tells all threads to end, and wakes those that wait: for bandwidth, for the gate, or for a
    /// fault.
    fn release(&self) {
        self.pages.end();
        self.pages.job.limiter.set_rate(0);
        self.gate.end();
        self.queue.close();
    }

    /// Ends all threads.
    ///
    /// # Errors
    /// The error of the first thread that failed.
    fn end(&self) -> Result<(), JobError> {
        self.over.store(true, Ordering::Release);
        self.release();
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    /// Follows the restore while the guest runs. Returns when no page is missing or a thread has
    /// failed.
    ///
    /// # Errors
    /// If the job is cancelled. After the commit point only a forced cancel does that.
    fn follow(&self) -> Result<(), JobError> {
        let running = Instant::now();
        loop {
            self.pages.missing_pages.event().reset();
            if self.has_ended() {
                return Ok(());
            }
            if self.pages.missing_pages.missing().remaining_pages() == 0 {
                // The thread that took the last page may still be placing it. If that fails it
                // makes the page missing again. So wait for it and look again.
                self.pages.job.memory.readers.wait(|_, _| true);
                if self.pages.missing_pages.missing().remaining_pages() == 0 {
                    return self.fill_holes();
                }
            }
            let rests = !self.recording || self.is_guest_idle(running);
            if rests {
                self.gate.open();
            }
            let look = if rests { POLL } else { IDLE_POLL };
            self.pages.job.cancel.wait(
                &[(self.pages.missing_pages.event().as_fd(), PollFlags::IN)],
                Instant::now() + look,
            )?;
        }
    }

    /// Makes zero of what the image of a clone does not have.
    fn fill_holes(&self) -> Result<(), JobError> {
        let (pages, missing_pages) = (&self.pages, self.pages.missing_pages);
        for (at, block) in pages.job.memory.blocks().iter().enumerate() {
            if missing_pages.base(at).is_some() {
                let filled = missing_pages.fill_holes(at, pages.source.present(at));
                filled.map_err(|error| MemoryError::not_placed(block, error))?;
            }
        }
        Ok(())
    }

    fn is_guest_idle(&self, running: Instant) -> bool {
        self.last_touch.time().max(running).elapsed() >= IDLE_AFTER
            || running.elapsed() >= IDLE_TIMEOUT
    }
}
