//! All that nobody writes to is captured, by any number of workers.
//!
//! They go on behind the last fault: a guest that writes to a page will write to those after it
//! soon, and need not wait for them then. Their pieces are of a megabyte at least, and grow while
//! it is quiet.

use crate::job::{Job, JobError};
use crate::memory::copy_before_write::CopyBeforeWrite;
use pageferry_protocol::memory::PAGE_SIZE;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

/// Captures all that is pending, with `workers` threads.
pub fn run(job: &Job, copier: &CopyBeforeWrite, workers: usize) -> Result<(), JobError> {
    let sweep = Sweep { job, copier, failed: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        let sweep = &sweep;
        // If the kernel gives no more threads, those that there are do it.
        let spawn = |worker| Builder::new().spawn_scoped(scope, move || sweep.work(worker)).ok();
        let threads: Vec<_> = (1..workers).map_while(spawn).collect();
        let first = sweep.work(0);
        let rest =
            threads.into_iter().map(|thread| thread.join().unwrap_or(Err(JobError::Panicked)));
        rest.fold(first, |outcome, other| outcome.and(other))
    })?;
    // Here and not in a worker: only the first who asks is told why.
    copier.check()
}

struct Sweep<'a> {
    job: &'a Job,
    copier: &'a CopyBeforeWrite,
    /// A worker failed: the others stop, too.
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
        let mut batch = self.copier.batch(memory)?;
        while !self.failed.load(Ordering::Relaxed) {
            self.job.check()?;
            if self.copier.has_failed() {
                break;
            }
            let Some((at, range)) = self.copier.cursor.claim(pending) else { break };
            let pages = self.copier.sweep(memory, worker, at, range, &mut batch)?;
            // After it was done: a piece that is paid for first would be claimed by others
            // meanwhile. Who waits for its turn hears that others failed: a guest may wait for the
            // end of it; or that nothing is left.
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
