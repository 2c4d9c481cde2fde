// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sweep: workers capture all pages that the guest does not write to.
//!
//! They go on after the last fault: a guest that writes to a page will soon write to the pages
//! after it, and then finds them captured. A piece has at least a megabyte, and pieces grow while
//! there is no fault. If one worker fails, the others stop.

use crate::job::{Job, JobError};
use crate::memory::copy_before_write::CopyBeforeWrite;
use pageferry_protocol::memory::PAGE_SIZE;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

/// Captures all pending pages with `workers` threads.
pub fn run(job: &Job, copier: &CopyBeforeWrite, workers: usize) -> Result<(), JobError> {
    let sweep = Sweep { job, copier, failed: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        let sweep = &sweep;
        // If the kernel does not start more threads, the ones that exist do all the work.
        let spawn = |worker| Builder::new().spawn_scoped(scope, move || sweep.work(worker)).ok();
        let threads: Vec<_> = (1..workers).map_while(spawn).collect();
        let first = sweep.work(0);
        let rest =
            threads.into_iter().map(|thread| thread.join().unwrap_or(Err(JobError::Panicked)));
        rest.fold(first, |outcome, other| outcome.and(other))
    })?;
    // Only here and not in the workers, because the error is returned only once.
    Ok(copier.check()?)
}

struct Sweep<'a> {
    job: &'a Job,
    copier: &'a CopyBeforeWrite,
    /// A worker has failed, so the others must stop.
    failed: AtomicBool,
}

impl Sweep<'_> {
    fn work(&self, worker: usize) -> Result<(), JobError> {
        let outcome = self.capture(worker);
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn capture(&self, worker: usize) -> Result<(), JobError> {
        let (memory, pending) = (&self.job.memory, self.copier.pending());
        let mut batch = self.copier.batch()?;
        while !self.failed.load(Ordering::Relaxed) {
            self.job.check()?;
            if self.copier.has_failed() {
                break;
            }
            let Some((at, range)) = self.copier.cursor.claim(pending) else { break };
            let pages = self.copier.sweep(&memory.readers, worker, at, range, &mut batch)?;
            // The limiter is asked after the piece is done. A worker that waited before the piece
            // would only find that others have claimed it meanwhile. The wait ends early if another
            // worker failed, because the guest may be waiting for the end of the snapshot, or if
            // nothing is pending any more.
            let over = || {
                self.failed.load(Ordering::Relaxed)
                    || self.copier.has_failed()
                    || pending.remaining_pages() == 0
            };
            self.job.limiter.wait_unless((pages * PAGE_SIZE) as usize, &self.job.cancel, over)?;
        }
        Ok(())
    }
}
