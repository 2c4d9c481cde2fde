// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VMM and its operator ask for.
//!
//! - [`vhost_user`]: the requests of vhost-user, by which any front-end can hand over its memory;
//! - [`native_requests`]: pageferry's requests;
//! - [`start_jobs`]: the requests that start or recover jobs;
//! - [`resume`]: resumes by force a guest that was handed over;
//! - [`registry`]: the blocks, the log, and what they may not be changed under;
//! - [`shared`]: how the threads of all connections work on it at once;
//! - this file: [`Session`], which all of them work on.
//!
//! A method of [`Session`] never waits: it runs under the lock. What can wait is a method of
//! [`SharedSession`](shared::SharedSession), which holds the lock before and after.
//!
//! A session belongs to one connection, the VMM's, and ends with it: its job is cancelled, its
//! memory forgotten. Operators come and go on connections of their own; they see and steer jobs,
//! and cannot touch the memory.

pub mod native_requests;
pub mod registry;
pub mod resume;
pub mod shared;
pub mod start_jobs;
pub mod vhost_user;

use crate::event::Event;
use crate::hooks::Hooks;
use crate::job::{Job, TooLate};
use crate::memory::GuestMemory;
use crate::session::shared::Retired;
use crate::tracking::TrackerChoice;
use crate::tracking::checkpoint::SharedCheckpoint;
use crate::waiting::may_wait;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// A VM that this agent serves.
#[derive(Debug)]
pub struct Session {
    memory: Arc<GuestMemory>,
    hooks: Arc<Hooks>,
    /// A descriptor of the hooks' socket that is not behind their lock.
    hook_socket: Option<OwnedFd>,
    trackers: TrackerChoice,
    /// What changed since the last image.
    checkpoint: SharedCheckpoint,
    /// With its thread, until that was waited for.
    job: Option<(Arc<Job>, Option<JoinHandle<()>>)>,
    /// The last job of the VMM before, for operators who want to know how it ended.
    previous: PreviousJob,
    jobs: u64,
    notify: Arc<Event>,
    vhost_user: vhost_user::Features,
    /// The agent is about to end.
    stopping: bool,
    /// The VMM is being asked to resume the guest by force.
    resuming: bool,
    /// What is to be dropped when the session is not locked.
    retired: Vec<Retired>,
}

/// The last job of an earlier session.
#[derive(Debug, Default)]
enum PreviousJob {
    /// There was none.
    #[default]
    None,
    /// It is being cancelled, and still has its memory.
    Ending(Arc<Job>, Option<JoinHandle<()>>),
    /// It ended so.
    Ended(Box<JobStatus>),
}

impl PreviousJob {
    fn job(&self) -> Option<&Arc<Job>> {
        match self {
            Self::Ending(job, _) => Some(job),
            _ => None,
        }
    }
}

impl Session {
    /// A session without memory, whose jobs wake `notify`.
    pub fn new(notify: Arc<Event>) -> Self {
        Self {
            memory: Arc::default(),
            hooks: Arc::new(Hooks::new(None)),
            hook_socket: None,
            trackers: TrackerChoice::default(),
            checkpoint: SharedCheckpoint::default(),
            job: None,
            previous: PreviousJob::None,
            jobs: 0,
            notify,
            vhost_user: vhost_user::Features::default(),
            stopping: false,
            resuming: false,
            retired: Vec::new(),
        }
    }

    /// How the job stands that runs or ran last.
    fn status(&self) -> JobStatus {
        self.job.as_ref().map_or_else(JobStatus::default, |(job, _)| job.status())
    }

    /// The same for those who ask: if this VMM has had no job yet, that of the one before.
    pub fn report(&self) -> JobStatus {
        let status = match (&self.job, &self.previous) {
            (None, PreviousJob::Ending(job, _)) => job.status(),
            (None, PreviousJob::Ended(status)) => (**status).clone(),
            _ => self.status(),
        };
        // Not those of the job: whoever asks wants to know what the next one would go by.
        JobStatus { trackers: self.trackers.declared, ..status }
    }

    /// The job that ended is over for good: it forbids nothing any more.
    fn retire_job(&mut self) {
        if let Some((job, thread)) = self.job.take() {
            let ended = PreviousJob::Ended(Box::new(job.status()));
            self.retired.push(Retired::Job(job, thread));
            self.forget_previous(ended);
        }
    }

    /// A job ended or went on: lets go of the memory of one whose VMM is gone.
    pub fn job_changed(&mut self) {
        if let PreviousJob::Ending(job, _) = &self.previous
            && job.status().phase.is_final()
        {
            let ended = PreviousJob::Ended(Box::new(job.status()));
            self.forget_previous(ended);
        }
    }

    fn forget_previous(&mut self, ended: PreviousJob) {
        if let PreviousJob::Ending(job, thread) = std::mem::replace(&mut self.previous, ended) {
            self.retired.push(Retired::Job(job, thread));
        }
    }

    /// The session of the next VMM, after [`Session::end`]. Jobs are counted on.
    pub fn successor(&mut self) -> Self {
        let before = match self.job.take() {
            Some((job, thread)) => PreviousJob::Ending(job, thread),
            None => std::mem::take(&mut self.previous),
        };
        let mut next = Self {
            previous: before,
            jobs: self.jobs,
            stopping: self.stopping,
            ..Self::new(self.notify.clone())
        };
        next.job_changed();
        next
    }

    /// The job, if one runs.
    fn running(&self) -> Option<&Arc<Job>> {
        self.job.as_ref().map(|(job, _)| job).filter(|job| !job.status().phase.is_final())
    }

    /// The job that an operator means: the one that runs, or else that of a VMM that is gone.
    fn operator_job(&self) -> Option<&Arc<Job>> {
        self.running().or_else(|| self.previous.job().filter(|job| !job.status().phase.is_final()))
    }

    /// The job that is paused in postcopy, if there is one; it may be that of a VMM that is gone,
    /// whose memory it still holds.
    fn paused(&self) -> Option<Arc<Job>> {
        let mut jobs = self.job.as_ref().map(|(job, _)| job).into_iter().chain(self.previous.job());
        jobs.find(|job| job.status().phase == Phase::PostcopyPaused).cloned()
    }

    /// Refuses jobs when the agent is about to end, or still has the guest of a VMM that is gone:
    /// the next job would take the place of that one, which nobody could recover any more.
    fn check_takes_jobs(&self) -> Result<(), RemoteError> {
        if self.stopping {
            return Err(RemoteError::new(
                ErrorCode::Busy,
                "the agent is about to end, and takes no job any more",
            ));
        }
        // One that is cancelled ends by itself, and nobody asks for it.
        if let Some(job) = self.previous.job().filter(|job| !job.cancel.is_cancelled()) {
            let JobStatus { job, phase, .. } = job.status();
            if !phase.is_final() {
                let sentence = format!(
                    "job {job} of the VMM before is in phase {}, and its guest's memory is here: a job can be started once that one has ended",
                    phase.name()
                );
                return Err(RemoteError::new(ErrorCode::Busy, sentence));
            }
        }
        Ok(())
    }

    /// Refuses what a running job, or a guest that was handed over, forbids.
    fn check_idle(&self, what: &str) -> Result<(), RemoteError> {
        if let Some(job) = self.running() {
            let sentence = format!(
                "{what}: job {} ({}) is running; wait or cancel it",
                job.id,
                job.kind.name()
            );
            return Err(RemoteError::new(ErrorCode::Busy, sentence));
        }
        Ok(())
    }

    /// Refuses a job while it is not known, or known not to be so, that the guest is here
    /// (`one-owner`).
    fn check_guest_is_here(&self) -> Result<(), RemoteError> {
        let JobStatus { job, kind, phase, .. } = self.status();
        match (kind, phase) {
            (JobKind::Outgoing, Phase::Unconfirmed) => Err(RemoteError::new(
                ErrorCode::State,
                format!(
                    "job {job} handed the guest over and was not confirmed: resume it by force first, if it does not run there"
                ),
            )),
            (JobKind::Outgoing, Phase::Completed) => Err(RemoteError::new(
                ErrorCode::State,
                format!("job {job} has moved the guest away: it is not here"),
            )),
            _ => Ok(()),
        }
    }

    /// The memory or the trackers change: increments to the last image are not possible any more.
    fn end_checkpoint(&self, why: &str) {
        // The next job stops the trackers, and not this thread: the VMM may have to answer from the
        // one that waits for our own answer.
        self.checkpoint.end(why);
    }

    /// Ends the session: cancels the job, and wakes it if it waits for the VMM.
    pub fn end(&mut self) {
        if let Some(job) = self.running()
            && job.cancel.cancel() == Err(TooLate::HandedOver)
        {
            match job.kind {
                // The guest ran in the VMM, and is gone with it.
                JobKind::Incoming | JobKind::Restore => job.cancel.force_cancel(),
                JobKind::Snapshot => {
                    log::info!(
                        "job {}: the VMM is gone; the image is whole, and gets its name",
                        job.id
                    );
                }
                // It runs elsewhere, or is about to, and needs its memory, which is here whether
                // the VMM is or not.
                JobKind::Outgoing | JobKind::None => {
                    log::warn!(
                        "job {}: the VMM is gone after its guest was handed over; the job goes on",
                        job.id
                    );
                }
            }
        }
        if let Some(socket) = &self.hook_socket {
            self.hooks.close(socket.as_fd());
        }
    }

    /// Cancels the job, and takes no other.
    pub fn stop(&mut self) {
        self.stopping = true;
        if let Some(job) = self.running() {
            let _ = job.cancel.cancel();
        }
        // A postcopy goes on to its end, which it cannot reach without its connections: then nobody
        // will come to recover it.
        for job in self.job.as_ref().map(|(job, _)| job).into_iter().chain(self.previous.job()) {
            job.recovery.request(crate::job::RecoveryRequest::Abandon);
        }
    }

    /// True if no job runs, not even one whose VMM is gone.
    pub fn is_idle(&self) -> bool {
        self.running().is_none()
            && self.previous.job().is_none_or(|job| job.status().phase.is_final())
    }

    /// The jobs whose threads have not been waited for.
    fn take_jobs(&mut self) -> Vec<(Arc<Job>, Option<JoinHandle<()>>)> {
        let mut jobs: Vec<_> = self.job.take().into_iter().collect();
        if let PreviousJob::Ending(job, thread) = std::mem::take(&mut self.previous) {
            jobs.push((job, thread));
        }
        jobs
    }
}

fn join(job: &Job, thread: Option<JoinHandle<()>>) {
    may_wait("wait for the thread of a job");
    if thread.is_some_and(|thread| thread.join().is_err()) {
        log::error!("job {} panicked", job.id);
    }
}

/// A refusal for wrong fields.
fn invalid(error: &dyn std::error::Error) -> RemoteError {
    RemoteError::new(ErrorCode::Invalid, crate::error::chain(error))
}

/// A refusal for a wrong number of descriptors.
fn check_fds(request: &str, fds: &[OwnedFd], expected: usize) -> Result<(), RemoteError> {
    if fds.len() == expected {
        return Ok(());
    }
    Err(wrong_fds(request, fds.len(), expected))
}

/// The descriptors of a request that has exactly `N`.
fn take_fds<const N: usize>(request: &str, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], RemoteError> {
    fds.try_into().map_err(|fds: Vec<OwnedFd>| wrong_fds(request, fds.len(), N))
}

fn wrong_fds(request: &str, count: usize, expected: usize) -> RemoteError {
    let sentence =
        format!("{request}: {count} file descriptors came with it, expected are {expected}");
    RemoteError::new(ErrorCode::Invalid, sentence)
}
