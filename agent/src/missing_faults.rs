// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Handling the missing faults of a guest that runs before its memory is here.
//!
//! One thread reads the faults, as many at once as there are. It resolves what it can by itself,
//! and requests all other pages from a [`PageRequester`]: the source of a migration, or the threads
//! that read an image. It waits only for new faults and for pages that are just being placed.
//! [`crate::memory::missing_pages`] describes what happens to one page.
//!
//! If there is no memory to resolve a fault, the thread reports that to the operator and wakes the
//! guest after [`RETRY`], which faults again. If the thread cannot go on, it ends the job:
//! otherwise the guest would wait for ever, and its VMM would not know.

use crate::event::Event;
use crate::job::{Job, JobError};
use crate::memory::missing_pages::{FaultOutcome, MissingPages};
use crate::memory::page_placer::PlaceError;
use crate::memory::pool;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::userfault::{Events, Userfaultfd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long a fault that cannot be resolved for want of memory waits until it is tried again.
pub const RETRY: Duration = Duration::from_millis(10);

/// Shortest time between two reports of a shortage of memory.
const REPORT_AGAIN: Duration = Duration::from_secs(1);

/// A host page: index of its block, and its own index in the block.
pub type HostPage = (usize, u64);

/// Requests missing pages from where they are.
pub trait PageRequester {
    /// Runs `read`, which adds the host pages to request, each for the first time. Then requests
    /// them.
    ///
    /// # Errors
    /// The error of `read`.
    fn request_pages(
        &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
    ) -> Result<(), JobError>;
}

/// Guards the registration of the VMM's mappings for missing faults. The drop undoes it. If pages
/// are still missing then, the VMM is told that memory is lost, and its guest is lost.
#[derive(Debug)]
pub struct FaultRegistration<'a> {
    job: &'a Job,
    /// No page is missing any more.
    pub complete: bool,
}

impl<'a> FaultRegistration<'a> {
    /// Must be created before the VMM is asked to register: a hook that timed out may still
    /// register the mappings, and that must be undone.
    pub fn new(job: &'a Job) -> Self {
        Self { job, complete: false }
    }
}

impl Drop for FaultRegistration<'_> {
    fn drop(&mut self) {
        self.job.memory.set_missing_pages(None);
        let hook = Hook::UnregisterFaults { complete: self.complete };
        if let Err(error) = self.job.hooks.undo(&hook, self.job.hook_timeout) {
            log::warn!("{}", crate::error::chain(&error));
        }
    }
}

/// Tells the thread that handles faults to end.
#[derive(Debug)]
pub struct StopEvent(Event);

/// Tells the thread to end on drop. So it also ends if the thread that would join it panics, and
/// that join does not wait for ever.
#[derive(Debug)]
pub struct StopOnDrop<'a>(&'a StopEvent);

impl StopEvent {
    /// An event that has not happened yet.
    ///
    /// # Errors
    /// If the kernel has no event descriptor.
    pub fn new() -> Result<Self, JobError> {
        Event::new().map(Self).map_err(JobError::from_io("create an event descriptor"))
    }

    /// To be called within the scope that joins the thread, and before the thread is started.
    pub fn stop_on_drop(&self) -> StopOnDrop<'_> {
        StopOnDrop(self)
    }
}

impl AsFd for StopEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.0.signal();
    }
}

/// Handles faults until `stop` is readable.
///
/// A guest hangs if nobody handles its faults. If this thread fails or panics, it calls `fail` with
/// the reason. That must end the job, so that the VMM is told that memory is lost.
///
/// If the job is cancelled while the VMM loads its state, the VMM may be waiting for a missing
/// page, and the job's thread waits for the VMM. So this thread releases the waiters
/// ([`MissingPages::release_waiters`]).
pub fn handle_faults(
    job: &Job, missing_pages: &MissingPages, requester: &mut impl PageRequester,
    stop: BorrowedFd<'_>, fail: impl FnOnce(JobError),
) {
    let mut fail_on_drop = FailOnDrop(Some(fail));
    match handle_until_stopped(job, missing_pages, requester, stop) {
        Ok(()) => fail_on_drop.0 = None,
        Err(error) => {
            log::error!(
                "job {}: faults are not answered any more: {}",
                job.id,
                crate::error::chain(&error)
            );
            fail_on_drop.fail(error);
        }
    }
}

/// Calls `fail` once when faults are not handled any more. On drop the reason is a panic.
struct FailOnDrop<F: FnOnce(JobError)>(Option<F>);

impl<F: FnOnce(JobError)> FailOnDrop<F> {
    fn fail(&mut self, error: JobError) {
        if let Some(fail) = self.0.take() {
            fail(error);
        }
    }
}

impl<F: FnOnce(JobError)> Drop for FailOnDrop<F> {
    fn drop(&mut self) {
        self.fail(JobError::Panicked);
    }
}

/// Reports in the log and in the job's status that the guest waits for memory that the host does
/// not have. Takes the report back when there is memory again.
#[derive(Debug)]
pub struct ShortageReport<'a> {
    job: &'a Job,
    /// When the status was last updated.
    reported_at: Option<Instant>,
}

impl<'a> ShortageReport<'a> {
    /// No shortage was reported yet.
    pub fn new(job: &'a Job) -> Self {
        Self { job, reported_at: None }
    }

    /// Reports that the guest waits for a page of the block at index `at`.
    pub fn report(&mut self, at: usize) {
        if self.reported_at.is_some_and(|reported_at| reported_at.elapsed() < REPORT_AGAIN) {
            return;
        }
        self.reported_at = Some(Instant::now());
        let advice = pool::advice(&self.job.memory.blocks()[at]);
        log::warn!("job {}: the guest waits: {advice}", self.job.id);
        self.job.note(&format!("the guest waits: {advice}"));
    }

    /// Takes the report back: there is memory again.
    pub fn clear(&mut self) {
        if self.reported_at.take().is_some() {
            log::info!("job {}: there is memory again", self.job.id);
            self.job.note("");
        }
    }
}

impl Drop for ShortageReport<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

fn handle_until_stopped(
    job: &Job, missing_pages: &MissingPages, requester: &mut impl PageRequester,
    stop: BorrowedFd<'_>,
) -> Result<(), JobError> {
    let mut events = Events::default();
    let mut failed = Vec::new();
    let mut shortage = ShortageReport::new(job);
    let mut cancelled = Some(job.cancel.fd());
    loop {
        let demanded = missing_pages.demands().event().as_fd();
        let woken = wait_for(missing_pages.uffd(), stop, Some(demanded), cancelled);
        match woken.map_err(PlaceError::Read)? {
            Woken::Stopped => return Ok(()),
            Woken::Cancelled => {
                // The descriptor stays readable, so it is not polled any more.
                cancelled = None;
                missing_pages.release_waiters();
                continue;
            }
            Woken::Faults => {}
        }
        let since = Instant::now();
        requester.request_pages(|to_ask| {
            read(job, missing_pages, &mut events, since, to_ask, &mut failed)
        })?;
        match failed.first() {
            None => shortage.clear(),
            Some((at, _)) => {
                shortage.report(*at);
                // The guest's threads are woken, and fault again.
                std::thread::sleep(RETRY);
                failed.drain(..).for_each(|page| missing_pages.retry(page));
            }
        }
    }
}

/// Waits for faults. Returns false if `stop` is readable.
///
/// # Errors
/// If the kernel refuses to poll.
pub fn wait(uffd: &Userfaultfd, stop: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(wait_for(uffd, stop, None, None)? == Woken::Faults)
}

/// What woke a thread that reads faults.
#[derive(Debug, PartialEq, Eq)]
enum Woken {
    Faults,
    Stopped,
    Cancelled,
}

fn wait_for(
    uffd: &Userfaultfd, stop: BorrowedFd<'_>, demanded: Option<BorrowedFd<'_>>,
    cancelled: Option<BorrowedFd<'_>>,
) -> Result<Woken, Errno> {
    let wanted = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut polled = vec![PollFd::new(uffd, PollFlags::IN), wanted(stop)];
    polled.extend(cancelled.map(wanted));
    polled.extend(demanded.map(wanted));
    loop {
        match poll(&mut polled, None) {
            Ok(_) if !polled[1].revents().is_empty() => return Ok(Woken::Stopped),
            Ok(_) if cancelled.is_some() && !polled[2].revents().is_empty() => {
                return Ok(Woken::Cancelled);
            }
            Ok(_) => return Ok(Woken::Faults),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Reads the pending removals and faults, and resolves those that can be resolved here. A fault may
/// come with the removal of its page, so removals are first.
fn read(
    job: &Job, missing_pages: &MissingPages, events: &mut Events, since: Instant,
    to_ask: &mut Vec<HostPage>, failed: &mut Vec<HostPage>,
) -> Result<(), JobError> {
    let _answering = missing_pages.handling_faults();
    missing_pages.uffd().read_events(events).map_err(PlaceError::Read)?;
    for removed in events.removed() {
        missing_pages.removed(&job.memory.readers, *removed);
    }
    let demands = missing_pages.take_demands();
    let faults = events.faults().iter().filter_map(|address| missing_pages.locate(*address));
    for page in faults.chain(demands) {
        match missing_pages.fault(&job.memory.readers, page, since) {
            Ok(FaultOutcome::Request) => to_ask.push(page),
            Ok(FaultOutcome::Resolved | FaultOutcome::AlreadyRequested) => {}
            Err(error) if error.is_gone() => return Err(error.into()),
            // The thread faults again, after the removal that comes first.
            Err(error) if error.is_changing() => missing_pages.retry(page),
            Err(error) => {
                log::debug!("{}", crate::error::chain(&error));
                failed.push(page);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::CancelledBy;
    use crate::memory::host_page_set::HostPageSet;
    use crate::memory::{GuestMemory, test_support};
    use pageferry_protocol::control::job::JobKind;
    use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
    use pageferry_protocol::userfault::feature;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    struct Panics;

    impl PageRequester for Panics {
        fn request_pages(
            &mut self, _: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
        ) -> Result<(), JobError> {
            std::panic::resume_unwind(Box::new("as if by a defect"));
        }
    }

    struct Reads;

    impl PageRequester for Reads {
        fn request_pages(
            &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
        ) -> Result<(), JobError> {
            read(&mut Vec::new())
        }
    }

    /// Returns why faults are not handled any more. The userfaultfd is a folder: it is always
    /// readable, and no fault can be read from it.
    fn why(mut requester: impl PageRequester) -> Option<JobError> {
        let memory = Arc::new(GuestMemory::default());
        let job = test_support::job_of(JobKind::Restore, memory.clone());
        let (folder, missing) = (
            std::fs::File::open("/").unwrap(),
            Arc::new(HostPageSet::empty(memory.blocks(), &[]).unwrap()),
        );
        let missing_pages =
            MissingPages::new(memory.blocks(), missing, folder.into(), false, job.live.clone())
                .unwrap();
        let (stop, mut why) = (StopEvent::new().unwrap(), None);
        let _ = catch_unwind(AssertUnwindSafe(|| {
            handle_faults(&job, &missing_pages, &mut requester, stop.as_fd(), |error| {
                why = Some(error)
            });
        }));
        assert!(!job.cancel.is_cancelled());
        why
    }

    #[test]
    fn a_failure_and_a_panic_are_reported() {
        let why_not = why(Reads).unwrap();
        assert!(crate::error::chain(&why_not).starts_with("cannot read faults: "), "{why_not}");
        assert!(matches!(why(Panics), Some(JobError::Panicked)));
    }

    #[test]
    fn the_thread_ends_when_the_joining_thread_panics() {
        let stop = StopEvent::new().unwrap();
        // No fault is ever read from it.
        let never = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap().into();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            std::thread::scope(|scope| {
                let _stopping = stop.stop_on_drop();
                scope.spawn(|| assert!(!wait(&never, stop.as_fd()).unwrap()));
                std::panic::resume_unwind(Box::new("as if by a defect"));
            })
        }));
        assert!(outcome.is_err());
    }

    /// A guest with one missing page. Its faults are handled, but the missing page never comes.
    struct Waiting {
        job: Arc<Job>,
        ram: test_support::Registered,
        missing_pages: MissingPages,
        stop: StopEvent,
    }

    const MISSING: u64 = 3;

    impl Waiting {
        fn new() -> Option<Self> {
            Self::with_missing(1 << MISSING)
        }

        fn with_missing(pages: u64) -> Option<Self> {
            let features = feature::MISSING_SHMEM | feature::EVENT_REMOVE;
            let ram = test_support::Registered::with_features(64, features)?;
            let job = test_support::job_of(JobKind::Incoming, ram.memory.clone());
            let missing = HostPageSet::empty(ram.memory.blocks(), &[PAGE_SIZE]).unwrap();
            missing.add(0, 0, pages);
            let (missing, uffd) = (Arc::new(missing), ram.for_agent());
            let missing_pages =
                MissingPages::new(ram.memory.blocks(), missing, uffd, false, job.live.clone())
                    .unwrap();
            Some(Self { job, ram, missing_pages, stop: StopEvent::new().unwrap() })
        }

        /// Runs `act` while a thread waits for the missing page. Returns whether that thread
        /// continues.
        fn continues_after(&self, act: impl FnOnce()) -> bool {
            std::thread::scope(|scope| {
                let (stopping, mut reads) = (self.stop.stop_on_drop(), Reads);
                scope.spawn(move || {
                    let Self { job, missing_pages, stop, .. } = self;
                    handle_faults(job, missing_pages, &mut reads, stop.as_fd(), |error| {
                        panic!("{error}")
                    });
                });
                let waits = scope.spawn(|| assert_eq!(self.ram.touch(MISSING), 0));
                while self.missing_pages.awaited_pages(0).next().is_none() {
                    std::thread::yield_now();
                }
                act();
                // When this later fault has been resolved, the event of `act` has been handled.
                self.ram.touch(MISSING + 1);
                let begun = Instant::now();
                while !waits.is_finished() && begun.elapsed() < PATIENCE {
                    std::thread::yield_now();
                }
                let continued = waits.is_finished();
                drop(stopping);
                self.missing_pages.unregister();
                continued
            })
        }
    }

    /// Enough time for a thread to continue, and short enough to wait for one that does not.
    const PATIENCE: Duration = Duration::from_secs(5);

    #[test]
    fn a_cancel_during_the_state_load_releases_the_waiters() {
        let Some(waiting) = Waiting::new() else { return };
        assert!(
            waiting.continues_after(|| waiting.job.cancel.cancel(CancelledBy::Operator).unwrap())
        );
        assert!(!waiting.missing_pages.finish_load(), "what was loaded is worth nothing");
        assert_eq!(
            waiting.ram.memory.blocks()[0].backing.allocated_pages(),
            2,
            "only the touched pages"
        );
    }

    #[test]
    fn a_running_guest_keeps_waiting_when_its_job_ends() {
        let Some(waiting) = Waiting::new() else { return };
        assert!(waiting.missing_pages.finish_load());
        assert!(!waiting.continues_after(|| waiting.job.cancel.force_cancel(CancelledBy::VmmGone)));
    }

    /// A VMM that knows nothing of its agent frees pages while others arrive.
    #[test]
    fn pages_that_the_vmm_frees_by_itself_need_not_come() {
        const CONTENT: [u8; PAGE_SIZE as usize] = [7; PAGE_SIZE as usize];
        for _ in 0..100 {
            let Some(waiting) = Waiting::with_missing(u64::MAX) else { return };
            std::thread::scope(|scope| {
                let Waiting { job, ram, missing_pages, stop } = &waiting;
                let (stopping, mut reads) = (stop.stop_on_drop(), Reads);
                scope.spawn(move || {
                    handle_faults(job, missing_pages, &mut reads, stop.as_fd(), |error| {
                        panic!("{error}")
                    });
                });
                // Every other page is freed, the last of them just as it arrives.
                let frees =
                    scope.spawn(|| (0..64).step_by(2).for_each(|page| ram.free_unannounced(page)));
                for page in (0..64).rev() {
                    let range = PageRange::new(page, 1);
                    missing_pages.place_pages(&ram.memory.readers, 0, 0, range, &CONTENT).unwrap();
                }
                frees.join().unwrap();
                assert_eq!(missing_pages.missing().remaining_pages(), 0);
                // Nobody waits any more, and what was not freed is here.
                for page in 0..64 {
                    let word = ram.touch(page);
                    assert!(word == u64::from_le_bytes([7; 8]) || (page % 2 == 0 && word == 0));
                }
                drop(stopping);
            });
            waiting.missing_pages.unregister();
        }
    }
}
