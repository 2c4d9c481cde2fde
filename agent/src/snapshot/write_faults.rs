// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write faults of a background snapshot: the guest keeps running while its memory is saved.
//!
//! When the guest writes to a page that is not saved yet, the write fault arrives here. The *fault
//! thread* copies the page and removes the write protection. The guest continues; it does not wait
//! for the disk. The threads of the sweep put the page into the image ([`super::sweep`]).
//!
//! The memory for copied pages is bounded. If the guest writes faster than the disk, the fault
//! thread waits for room, and the guest waits with it. After the hook timeout without room the
//! snapshot fails, and all writes continue: a disk that hangs costs the snapshot, never the guest.

use super::watch_state::{WatchState, WriteFaultAction};
use crate::event::Event;
use crate::job::{Job, JobError};
use crate::memory::captured_pages::Room;
use crate::memory::copy_before_write::{CaptureError, CopyBeforeWrite};
use crate::memory::guest_memory::DiscardObserver;
use crate::missing_faults::wait;
use pageferry_protocol::userfault::{AddressRange, Events};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The interval at which a wait for room checks whether it is still needed.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Starts the fault thread. It handles faults until `stop` is readable.
///
/// # Errors
/// If the thread cannot be started.
pub fn start(
    job: &Arc<Job>, shared: &Arc<WatchState>, stop: Event,
) -> Result<JoinHandle<()>, JobError> {
    let (job, shared) = (job.clone(), shared.clone());
    Builder::new()
        .name(format!("faults-{}", job.id))
        .spawn(move || run_faults(&job, &shared, &stop))
        .map_err(JobError::from_io("start a thread"))
}

fn run_faults(job: &Job, shared: &WatchState, stop: &Event) {
    let mut guard = FailUnlessOver { shared, over: false };
    match handle_faults(job, shared, stop) {
        Ok(()) => guard.over = true,
        Err(error) => fail(&shared.mode(), error),
    }
}

/// On drop, also after a panic, prevents the instant, unless the fault thread has ended normally.
struct FailUnlessOver<'a> {
    shared: &'a WatchState,
    over: bool,
}

impl Drop for FailUnlessOver<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.shared.fail();
        }
    }
}

/// Before the instant there is no snapshot to fail, so the error is only logged. The job meets the
/// same problem when it protects the next page, and reports it.
fn fail(mode: &WriteFaultAction, error: CaptureError) {
    match mode {
        WriteFaultAction::Ahead => {
            log::warn!("cannot handle a write fault: {}", crate::error::chain(&error))
        }
        WriteFaultAction::CopyBeforeWrite(copier) => copier.fail(error),
    }
}

fn handle_faults(job: &Job, shared: &WatchState, stop: &Event) -> Result<(), CaptureError> {
    let uffd = &shared.protection.uffd;
    let mut events = Events::default();
    while wait(uffd, stop.as_fd()).map_err(CaptureError::ReadFaults)? {
        let since = Instant::now();
        // Locked before the faults are read: a thread that gets the lock after this one finds that
        // all faults that were read are handled.
        let mode = shared.mode();
        uffd.read_events(&mut events).map_err(CaptureError::ReadFaults)?;
        for removed in events.removed() {
            handle_removal(job, shared, &mode, *removed);
        }
        for address in events.faults() {
            let Some(page) = shared.protection.mappings.locate(*address) else { continue };
            // After an error the other faults are still handled.
            if let Err(error) = handle_fault(job, shared, &mode, page, job.hook_timeout) {
                fail(&mode, error);
            }
            // Faults are counted and timed only from the instant on.
            if let WriteFaultAction::CopyBeforeWrite(_) = *mode {
                job.live.latency.record(since.elapsed());
            }
        }
    }
    Ok(())
}

/// The VMM has freed memory without a request, and may let the guest use it from now on.
fn handle_removal(job: &Job, shared: &WatchState, mode: &WriteFaultAction, removed: AddressRange) {
    for (at, host_pages) in shared.protection.mappings.locate_range(removed) {
        match mode {
            WriteFaultAction::Ahead => {
                let pages = shared.ahead[at].pages(host_pages);
                job.memory.blocks()[at].hint_freed(pages);
                shared.on_freed(at, pages);
            }
            WriteFaultAction::CopyBeforeWrite(copier) => copier.freed_unannounced(at, host_pages),
        }
    }
}

/// `limit` is the longest wait for room.
fn handle_fault(
    job: &Job, shared: &WatchState, mode: &WriteFaultAction, page: (usize, u64), limit: Duration,
) -> Result<(), CaptureError> {
    let copier = match mode {
        WriteFaultAction::Ahead => return shared.allow_write(page),
        WriteFaultAction::CopyBeforeWrite(copier) => copier,
    };
    let room = wait_for_room(job, copier, page, limit).unwrap_or_else(|error| {
        copier.fail(error);
        copier.stop_faults();
        None
    });
    // Without room nothing is captured: the page is not pending, or the snapshot captures nothing
    // any more.
    copier.write_fault(&job.memory.readers, page, room)
}

/// Waits for room for a pending page, and the guest waits with it if it writes faster than the
/// disk. The wait ends with `None` if the page is not pending any more, and with an error if the
/// snapshot is lost, or if there was no room for `limit`.
fn wait_for_room<'a>(
    job: &Job, copier: &'a CopyBeforeWrite, (at, host_page): (usize, u64), limit: Duration,
) -> Result<Option<Room<'a>>, CaptureError> {
    let since = Instant::now();
    // A page that is not pending now never becomes pending again.
    while copier.pending().block(at).bits().contains(host_page) {
        if let Some(room) = copier.room(at, CHECK_INTERVAL)? {
            return Ok(Some(room));
        }
        if job.cancel.is_cancelled() || copier.is_over() {
            return Err(CaptureError::GivenUp);
        }
        if since.elapsed() >= limit {
            return Err(CaptureError::SinkTimeout { limit });
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::CancelledBy;
    use crate::memory::copy_before_write::{Run, Sink, SinkError};
    use crate::memory::host_page_set::HostPageSet;
    use crate::memory::mappings::Mappings;
    use crate::memory::test_support::{job, memfd, memory};
    use crate::memory::write_protection::Protection;
    use pageferry_protocol::memory::PAGE_SIZE;

    /// Pages of the block.
    const PAGES: u64 = 64;

    /// A sink that must not get any page.
    #[derive(Debug)]
    struct Nowhere;

    impl Sink for Nowhere {
        fn put(&self, runs: Vec<Run<'_>>) -> Result<u64, SinkError> {
            panic!("{runs:?}")
        }
    }

    /// A job, and its snapshot: all pages are pending, and there is room for two.
    fn snapshot() -> (Arc<Job>, Arc<CopyBeforeWrite>) {
        let job = job(memory(&[PAGES]));
        let pending = HostPageSet::empty(job.memory.blocks(), &[PAGE_SIZE]).unwrap();
        pending.add(0, 0, u64::MAX);
        let (blocks, room) = (job.memory.blocks(), 2 * PAGE_SIZE as usize);
        let copier = CopyBeforeWrite::new(
            blocks,
            Arc::new(pending),
            None,
            Arc::new(Nowhere),
            room,
            Arc::default(),
        );
        (job, Arc::new(copier))
    }

    fn fault(
        job: &Job, copier: &Arc<CopyBeforeWrite>, host_page: u64, limit: Duration,
    ) -> Result<(), CaptureError> {
        let (uffd, mappings) = (memfd(0).into(), Mappings::of(job.memory.blocks()));
        let protection = Protection { uffd, mappings, unannounced_frees: false };
        let shared = WatchState::new(Arc::new(protection), Vec::new());
        let mode = WriteFaultAction::CopyBeforeWrite(copier.clone());
        handle_fault(job, &shared, &mode, (0, host_page), limit)
    }

    /// The disk takes nothing, so no room is given back.
    #[test]
    fn wait_for_room_ends_with_the_job_or_the_snapshot() {
        for is_cancelled in [false, true] {
            let (job, copier) = snapshot();
            let long = Duration::from_secs(3600);
            (0..2).for_each(|page| fault(&job, &copier, page, long).unwrap());
            if is_cancelled {
                job.cancel.cancel(CancelledBy::Operator).unwrap();
            } else {
                copier.fail(CaptureError::Panicked);
            }
            fault(&job, &copier, 3, long).unwrap();
            // The reason must not be that the disk is too slow.
            let why = copier.check().unwrap_err();
            assert_eq!(matches!(why, CaptureError::GivenUp), is_cancelled, "{why}");
            assert_eq!(matches!(why, CaptureError::Panicked), !is_cancelled, "{why}");
            assert_eq!(copier.pending().remaining_pages(), PAGES - 2, "nothing more is taken");
        }
    }

    #[test]
    fn wait_for_room_ends_when_pointless_or_too_long() {
        let (job, copier) = snapshot();
        let (long, short) = (Duration::from_secs(3600), CHECK_INTERVAL * 3);
        (0..2).for_each(|page| fault(&job, &copier, page, long).unwrap());
        // The page is captured already, so it needs no room.
        fault(&job, &copier, 1, long).unwrap();
        copier.check().unwrap();
        fault(&job, &copier, 2, short).unwrap();
        let error = copier.check().unwrap_err().to_string();
        assert!(
            error.contains("nothing was written to the image for 60ms")
                && error.contains("hook_timeout"),
            "{error}"
        );
    }
}
