//! What a guest waits for that runs before its memory is here.
//!
//! One thread reads the faults, as many at once as there are, and waits for nothing but faults, and
//! pages that are being placed: what it can answer it answers, and for the rest it asks a
//! [`PageRequester`]: the source of a migration, or the threads that read an image. See
//! [`crate::memory::missing_pages`] for what happens to a page.

use crate::job::{Job, JobError};
use crate::memory::missing_pages::{FaultOutcome, MissingPages, PlaceError};
use crate::memory::pool;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::userfault::{MAX_FAULTS, Userfaultfd};
use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a fault that cannot be answered for want of memory waits until it is looked at again.
pub const RETRY: Duration = Duration::from_millis(10);

/// Shortest time between two reports that memory is missing.
const REPORT_AGAIN: Duration = Duration::from_secs(1);

/// Index of a block, and a host page of it.
pub type HostPage = (usize, u64);

/// Who has what is missing.
pub trait PageRequester {
    /// Runs `read`, which adds the host pages that are to be asked for, each for the first time;
    /// then asks for them.
    ///
    /// # Errors
    /// What `read` says.
    fn request_pages(
        &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
    ) -> Result<(), JobError>;
}

/// The VMM's mappings are registered; taken back on drop. If memory is missing then, the VMM is
/// told, and its guest is lost.
#[derive(Debug)]
pub struct FaultRegistration<'a> {
    job: &'a Job,
    /// Nothing is missing any more.
    pub complete: bool,
}

impl<'a> FaultRegistration<'a> {
    /// To be made before the VMM is asked: a registration that timed out may still happen, and must
    /// be undone.
    pub fn new(job: &'a Job) -> Self {
        Self { job, complete: false }
    }
}

impl Drop for FaultRegistration<'_> {
    fn drop(&mut self) {
        self.job.memory.set_missing_pages(None);
        let hook = Hook::UnregisterFaults { complete: self.complete };
        if let Err(error) = self.job.hooks.undo(&hook, self.job.options().hook_timeout) {
            log::warn!("{}", crate::error::chain(&error));
        }
    }
}

/// How the thread that answers faults hears that it is to end.
#[derive(Debug)]
pub struct StopEvent(OwnedFd);

/// It ends, on drop: also if whoever would wait for it panics, and would wait for ever.
#[derive(Debug)]
pub struct StopOnDrop<'a>(&'a StopEvent);

impl StopEvent {
    /// It goes on until then.
    ///
    /// # Errors
    /// If the kernel has no event descriptor.
    pub fn new() -> Result<Self, JobError> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        event.map(Self).map_err(|errno| JobError::Io {
            what: "make an event descriptor",
            source: errno.into(),
        })
    }

    /// To be had before the thread is started, within the scope that waits for it.
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
        // A full eventfd is readable already.
        let _ = rustix::io::write(&self.0.0, &1u64.to_ne_bytes());
    }
}

/// Answers faults until `stop` is readable. A guest whose faults nobody answers hangs: if that
/// comes to be, also by a panic, `fail` is told why, and is to end the job, so that the VMM hears
/// that its memory is lost.
///
/// If the job is cancelled while the VMM loads its state, a VMM that waits for a page in that goes
/// on at once ([`MissingPages::release_waiters`]): the job's own thread waits for the VMM, and
/// cannot tell it.
pub fn handle_faults(
    job: &Job, missing_pages: &MissingPages, supplier: &mut impl PageRequester,
    stop: BorrowedFd<'_>, fail: impl FnOnce(JobError),
) {
    let mut unanswered = FailOnDrop(Some(fail));
    match handle_until_stopped(job, missing_pages, supplier, stop) {
        Ok(()) => unanswered.0 = None,
        Err(error) => {
            log::error!(
                "job {}: faults are not answered any more: {}",
                job.id,
                crate::error::chain(&error)
            );
            unanswered.fail(error);
        }
    }
}

/// Nobody answers faults; on drop it is by a panic.
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

/// Says in the log and in the job's status that the guest waits for memory that the host does not
/// have, and takes it back when it waits no more.
#[derive(Debug)]
pub struct ShortageReport<'a> {
    job: &'a Job,
    /// When the status was last updated.
    said: Option<Instant>,
}

impl<'a> ShortageReport<'a> {
    /// It waits for nothing.
    pub fn new(job: &'a Job) -> Self {
        Self { job, said: None }
    }

    /// It waits for a page of the block at index `at`.
    pub fn report(&mut self, at: usize) {
        if self.said.is_some_and(|said| said.elapsed() < REPORT_AGAIN) {
            return;
        }
        self.said = Some(Instant::now());
        let advice = pool::advice(&self.job.memory.blocks()[at]);
        log::warn!("job {}: the guest waits: {advice}", self.job.id);
        self.job.note(&format!("the guest waits: {advice}"));
    }

    /// It got what it waited for.
    pub fn clear(&mut self) {
        if self.said.take().is_some() {
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
    job: &Job, missing_pages: &MissingPages, supplier: &mut impl PageRequester,
    stop: BorrowedFd<'_>,
) -> Result<(), JobError> {
    let mut faults = [0; MAX_FAULTS];
    let mut failed = Vec::new();
    let mut wants = ShortageReport::new(job);
    let mut cancelled = Some(job.cancel.fd());
    loop {
        match wait_for(missing_pages.uffd(), stop, cancelled).map_err(PlaceError::Read)? {
            Woken::Stopped => return Ok(()),
            Woken::Cancelled => {
                // Stays readable: there is nothing more to hear.
                cancelled = None;
                missing_pages.release_waiters();
                continue;
            }
            Woken::Faults => {}
        }
        let since = Instant::now();
        supplier.request_pages(|to_ask| {
            read(job, missing_pages, &mut faults, since, to_ask, &mut failed)
        })?;
        match failed.first() {
            None => wants.clear(),
            Some((at, _)) => {
                wants.report(*at);
                // Whoever waits tries again.
                std::thread::sleep(RETRY);
                failed.drain(..).for_each(|page| missing_pages.retry(page));
            }
        }
    }
}

/// Waits for faults; false if `stop` is readable.
///
/// # Errors
/// If the kernel does not wait.
pub fn wait(uffd: &Userfaultfd, stop: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(wait_for(uffd, stop, None)? == Woken::Faults)
}

/// What a thread that reads faults was woken by.
#[derive(Debug, PartialEq, Eq)]
enum Woken {
    Faults,
    Stopped,
    Cancelled,
}

fn wait_for(
    uffd: &Userfaultfd, stop: BorrowedFd<'_>, cancelled: Option<BorrowedFd<'_>>,
) -> Result<Woken, Errno> {
    let mut polled =
        vec![PollFd::new(uffd, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    polled.extend(cancelled.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    loop {
        match poll(&mut polled, None) {
            Ok(_) if !polled[1].revents().is_empty() => return Ok(Woken::Stopped),
            Ok(_) if polled.get(2).is_some_and(|fd| !fd.revents().is_empty()) => {
                return Ok(Woken::Cancelled);
            }
            Ok(_) => return Ok(Woken::Faults),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Reads the faults that there are, and answers what can be answered.
fn read(
    job: &Job, missing_pages: &MissingPages, faults: &mut [u64; MAX_FAULTS], since: Instant,
    to_ask: &mut Vec<HostPage>, failed: &mut Vec<HostPage>,
) -> Result<(), JobError> {
    let _answering = missing_pages.handling_faults();
    let count = missing_pages.uffd().read_faults(faults).map_err(PlaceError::Read)?;
    for address in &faults[..count] {
        let Some(page) = missing_pages.locate(*address) else { continue };
        match missing_pages.fault(&job.memory.readers, page, since) {
            Ok(FaultOutcome::Request) => to_ask.push(page),
            Ok(FaultOutcome::Resolved | FaultOutcome::AlreadyRequested) => {}
            Err(error) if error.is_gone() => return Err(error.into()),
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
    use crate::hooks::Hooks;
    use crate::memory::host_page_set::HostPageSet;
    use crate::memory::{GuestMemory, test_support};
    use pageferry_protocol::control::job::{JobKind, OutgoingOptions};
    use pageferry_protocol::memory::PAGE_SIZE;
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

    /// Why faults are not answered any more, of which there seem to be some and none can be read.
    fn why(mut supplier: impl PageRequester) -> Option<JobError> {
        let memory = Arc::new(GuestMemory::default());
        let (hooks, notify) = (Arc::new(Hooks::new(None)), crate::job::notifier().unwrap());
        let job = Job::new(
            1,
            JobKind::Restore,
            memory.clone(),
            hooks,
            OutgoingOptions::default(),
            notify,
        )
        .unwrap();
        let (folder, missing) = (
            std::fs::File::open("/").unwrap(),
            Arc::new(HostPageSet::empty(&memory, &[]).unwrap()),
        );
        let missing_pages =
            MissingPages::new(&memory, missing, folder.into(), false, job.live.clone()).unwrap();
        let (stop, mut why) = (StopEvent::new().unwrap(), None);
        let _ = catch_unwind(AssertUnwindSafe(|| {
            handle_faults(&job, &missing_pages, &mut supplier, stop.as_fd(), |error| {
                why = Some(error)
            });
        }));
        assert!(!job.cancel.is_cancelled());
        why
    }

    #[test]
    fn who_is_to_end_the_job_hears_why_also_of_a_panic() {
        let why_not = why(Reads).unwrap();
        assert!(crate::error::chain(&why_not).starts_with("cannot read faults: "), "{why_not}");
        assert!(matches!(why(Panics), Some(JobError::Panicked)));
    }

    #[test]
    fn a_panic_of_whoever_waits_for_the_thread_ends_it_too() {
        let stop = StopEvent::new().unwrap();
        // Nothing is ever read from it.
        let never = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap().into();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            std::thread::scope(|scope| {
                let _stopping = stop.stop_on_drop();
                scope.spawn(|| assert!(!wait(&never, stop.as_fd()).unwrap()));
                std::panic::resume_unwind(Box::new("as if by a defect"));
            })
        }));
        assert!(outcome.is_err());
    }

    /// A guest of which one page is missing, and whose faults are answered; but nobody supplies
    /// what is missing.
    struct Waiting {
        job: Job,
        ram: test_support::Registered,
        missing_pages: MissingPages,
        stop: StopEvent,
    }

    const MISSING: u64 = 3;

    impl Waiting {
        fn new() -> Option<Self> {
            let ram = test_support::Registered::new(64)?;
            let (hooks, notify) = (Arc::new(Hooks::new(None)), crate::job::notifier().unwrap());
            let options = OutgoingOptions::default();
            let job =
                Job::new(1, JobKind::Incoming, ram.memory.clone(), hooks, options, notify).unwrap();
            let missing = HostPageSet::empty(&ram.memory, &[PAGE_SIZE]).unwrap();
            missing.add(0, 0, 1 << MISSING);
            let (missing, uffd) = (Arc::new(missing), ram.for_agent());
            let missing_pages =
                MissingPages::new(&ram.memory, missing, uffd, false, job.live.clone()).unwrap();
            Some(Self { job, ram, missing_pages, stop: StopEvent::new().unwrap() })
        }

        /// Runs `act` while a thread waits for the missing page; returns whether that thread went
        /// on by itself.
        fn goes_on(&self, act: impl FnOnce()) -> bool {
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
                // A fault that comes later is answered, so what came before it has been seen.
                self.ram.touch(MISSING + 1);
                let begun = Instant::now();
                while !waits.is_finished() && begun.elapsed() < PATIENCE {
                    std::thread::yield_now();
                }
                let went_on = waits.is_finished();
                drop(stopping);
                self.missing_pages.unregister();
                went_on
            })
        }
    }

    /// Longer than it takes to go on, and short enough to wait for who does not.
    const PATIENCE: Duration = Duration::from_secs(5);

    #[test]
    fn who_waits_for_a_page_while_the_state_is_loaded_goes_on_when_the_job_is_cancelled() {
        let Some(waiting) = Waiting::new() else { return };
        assert!(waiting.goes_on(|| waiting.job.cancel.cancel().unwrap()));
        assert!(!waiting.missing_pages.finish_load(), "what was loaded is worth nothing");
        assert_eq!(
            waiting.ram.memory.blocks()[0].backing.allocated_pages(),
            2,
            "only what was touched"
        );
    }

    #[test]
    fn who_waits_for_a_page_of_a_guest_that_runs_waits_on_when_its_job_ends() {
        let Some(waiting) = Waiting::new() else { return };
        assert!(waiting.missing_pages.finish_load());
        assert!(!waiting.goes_on(|| waiting.job.cancel.force()));
    }
}
