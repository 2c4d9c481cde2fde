// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sweep: workers capture all pages that the guest does not write to, a piece at a time.
//!
//! One more thread puts the pages that write faults have captured, if room for them becomes scarce:
//! if the disk is slow, or if the job has a bandwidth limit, which limits the workers and not the
//! guest. If one thread fails, the others stop.

use crate::job::{Job, JobError};
use crate::memory::copy_before_write::CopyBeforeWrite;
use crate::sandbox::{ThreadKind, enter_thread};
use pageferry_protocol::memory::PAGE_SIZE;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, ScopedJoinHandle};

/// Captures all pending pages with `workers` threads.
pub fn run(job: &Job, copier: &CopyBeforeWrite, workers: usize) -> Result<(), JobError> {
    let sweep = Sweep { job, copier, failed: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        let sweep = &sweep;
        let captured = Builder::new()
            .name(format!("captured-{}", job.id))
            .spawn_scoped(scope, || sweep.noting(sweep.put_while_scarce()))
            .map_err(JobError::from_io("start a thread"))?;
        let end = EndBatches(copier);
        // If the kernel does not start more threads, the ones that exist do all the work.
        let spawn = |worker| {
            let capture = move || {
                enter_thread(ThreadKind::Pages);
                sweep.noting(sweep.capture(worker))
            };
            Builder::new().spawn_scoped(scope, capture).ok()
        };
        let threads: Vec<_> = (1..workers).map_while(spawn).collect();
        let first = sweep.noting(sweep.capture(0));
        let join =
            |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or(Err(JobError::Panicked));
        let swept = threads.into_iter().map(join).fold(first, |outcome, other| outcome.and(other));
        drop(end);
        swept.and(join(captured))
    })?;
    // Only here and not in the workers, because the error is returned only once.
    Ok(copier.check()?)
}

/// On drop, also after a panic of this thread, ends the thread that puts captured pages.
struct EndBatches<'a>(&'a CopyBeforeWrite);

impl Drop for EndBatches<'_> {
    fn drop(&mut self) {
        self.0.end_batches();
    }
}

struct Sweep<'a> {
    job: &'a Job,
    copier: &'a CopyBeforeWrite,
    /// A thread has failed, so the others must stop.
    failed: AtomicBool,
}

impl Sweep<'_> {
    fn noting(&self, outcome: Result<(), JobError>) -> Result<(), JobError> {
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn put_while_scarce(&self) -> Result<(), JobError> {
        Ok(self.copier.put_while_scarce()?)
    }

    fn capture(&self, worker: usize) -> Result<(), JobError> {
        let mut batch = self.copier.batch()?;
        while !self.failed.load(Ordering::Relaxed) {
            self.job.check()?;
            if self.copier.has_failed() {
                break;
            }
            let Some(claim) = self.copier.claim() else { break };
            let readers = &self.job.memory.readers;
            let pages = self.copier.sweep(readers, worker, claim.piece, &mut batch)?;
            drop(claim);
            // The limiter is asked after the piece is done. A worker that waited before the piece
            // would only find that others have claimed it meanwhile. The wait ends early if another
            // thread failed, because the guest may be waiting for the end of the snapshot, or if
            // nothing is pending any more.
            let over = || {
                self.failed.load(Ordering::Relaxed)
                    || self.copier.has_failed()
                    || self.copier.pending().remaining_pages() == 0
            };
            self.job.limiter.wait_unless((pages * PAGE_SIZE) as usize, &self.job.cancel, over)?;
        }
        Ok(())
    }
}
