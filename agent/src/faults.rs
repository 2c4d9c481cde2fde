//! What a guest waits for that runs before its memory is here.
//!
//! One thread reads the faults, as many at once as there are, and waits for nothing but faults, and pages that are being placed: what it can answer it answers, and for the rest it
//! asks a [`Supplier`]: the source of a migration, or the threads that read an image. See [`crate::memory::arriving`] for what happens to a page.

use crate::job::{Job, JobError};
use crate::memory::arriving::{Answer, Arriving, ArrivingError};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::userfault::{MAX_FAULTS, Userfaultfd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// How long a fault that cannot be answered for want of memory waits until it is looked at again.
pub const RETRY: Duration = Duration::from_millis(10);

/// Index of a block, and a host page of it.
pub type HostPage = (usize, u64);

/// Who has what is missing.
pub trait Supplier {
    /// Runs `read`, which adds the host pages that are to be asked for, each for the first time; then asks for them.
    ///
    /// # Errors
    /// What `read` says.
    fn serve(&mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>) -> Result<(), JobError>;
}

/// The VMM's mappings are registered; taken back on drop. If memory is missing then, the VMM is told, and its guest is lost.
#[derive(Debug)]
pub struct Registered<'a> {
    job: &'a Job,
    /// Nothing is missing any more.
    pub complete: bool,
}

impl<'a> Registered<'a> {
    /// To be made before the VMM is asked: a registration that timed out may still happen, and must be undone.
    pub fn new(job: &'a Job) -> Self {
        Self { job, complete: false }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.job.memory.set_arriving(None);
        let hook = Hook::UnregisterFaults { complete: self.complete };
        if let Err(error) = self.job.hooks.undo(&hook, self.job.options().hook_timeout) {
            log::warn!("{}", crate::error::chain(&error));
        }
    }
}

/// Answers faults until `stop` is readable, or the VMM is gone.
pub fn answer(job: &Job, arriving: &Arriving, supplier: &mut impl Supplier, stop: BorrowedFd<'_>) {
    let mut unanswered = Unanswered { job, over: false };
    match answer_all(job, arriving, supplier, stop) {
        Ok(()) => unanswered.over = true,
        Err(error) => {
            log::error!("job {}: faults are not answered any more: {}", job.id, crate::error::chain(&error));
        }
    }
}

/// A guest whose faults nobody answers hangs. On drop, also by a panic, the VMM is told that its memory is lost, unless all is over.
struct Unanswered<'a> {
    job: &'a Job,
    over: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.job.cancel.force();
        }
    }
}

fn answer_all(
    job: &Job, arriving: &Arriving, supplier: &mut impl Supplier, stop: BorrowedFd<'_>,
) -> Result<(), JobError> {
    let mut faults = [0; MAX_FAULTS];
    let mut failed = Vec::new();
    while wait(arriving.uffd(), stop)? {
        let since = Instant::now();
        supplier.serve(|to_ask| read(job, arriving, &mut faults, since, to_ask, &mut failed))?;
        if !failed.is_empty() {
            // No memory, most likely. Whoever waits tries again.
            std::thread::sleep(RETRY);
            failed.drain(..).for_each(|page| arriving.retry(page));
        }
    }
    Ok(())
}

/// Waits for faults; false if `stop` is readable.
///
/// # Errors
/// If the kernel does not wait.
pub fn wait(uffd: &Userfaultfd, stop: BorrowedFd<'_>) -> Result<bool, JobError> {
    loop {
        let mut polled = [PollFd::new(uffd, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) => return Ok(polled[1].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(JobError::from_io("poll")(errno.into())),
        }
    }
}

/// Reads the faults that there are, and answers what can be answered.
fn read(
    job: &Job, arriving: &Arriving, faults: &mut [u64; MAX_FAULTS], since: Instant, to_ask: &mut Vec<HostPage>,
    failed: &mut Vec<HostPage>,
) -> Result<(), JobError> {
    let _answering = arriving.answering();
    let count = arriving.uffd().read_faults(faults).map_err(ArrivingError::Read)?;
    for address in &faults[..count] {
        let Some(page) = arriving.locate(*address) else { continue };
        match arriving.fault(&job.memory.readers, page, since) {
            Ok(Answer::Ask) => to_ask.push(page),
            Ok(Answer::Here | Answer::Wait) => {}
            Err(error) if is_gone(&error) => return Err(error.into()),
            Err(error) => {
                log::warn!("{}", crate::error::chain(&error));
                failed.push(page);
            }
        }
    }
    Ok(())
}

/// True if there is nobody any more who could wait.
pub fn is_gone(error: &ArrivingError) -> bool {
    matches!(error, ArrivingError::Place { source: Errno::SRCH, .. })
}
