// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The session: the memory, the hooks and the job of one VMM, and the requests on them.
//!
//! - [`vhost_user`]: the requests of vhost-user, by which any front-end can hand over its memory;
//! - [`native_requests`]: pageferry's requests;
//! - [`start_jobs`]: the requests that start or recover jobs;
//! - `agent_info`: what the agent serves, for operators;
//! - `session_job`: the job of a session, by its kind;
//! - [`devices`]: the devices of the agent;
//! - [`resume`]: resumes a guest by force after it was handed over;
//! - [`registry`]: adds and removes blocks, and sets the dirty log;
//! - [`sample`]: what metrics say about the session;
//! - [`shared`]: the lock by which the threads of all connections share the session;
//! - this file: [`Session`], the state that the lock protects.
//!
//! A session belongs to the connection of the VMM. When that connection ends, the session ends: its
//! job is cancelled, and its memory is dropped. Operators have their own connections. They see and
//! control jobs, but cannot change the memory.
//!
//! A method of [`Session`] runs under the lock, so it never waits. A request that can wait is a
//! method of [`SharedSession`](shared::SharedSession). It locks the session, releases the lock,
//! waits, and locks again.

mod agent_info;
pub mod devices;
pub mod native_requests;
mod program_pipe;
pub mod registry;
pub mod resume;
pub mod sample;
mod session_job;
pub mod shared;
pub mod start_jobs;
pub mod vhost_user;

use crate::devices::registry::Devices;
use crate::event::Event;
use crate::hooks::Hooks;
use crate::image::ImageKey;
use crate::job::{CancelledBy, Job, RecoveryRequest, TooLate};
use crate::memory::GuestMemory;
use crate::session::shared::DeferredDrop;
use crate::stats::totals::JobTotals;
use crate::tracking::TrackerChoice;
use crate::tracking::checkpoint::SharedCheckpoint;
use crate::transport::PlainNetworks;
use crate::trust::Trust;
use crate::vm_name::VmName;
use crate::waiting::may_wait;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use session_job::SessionJob;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// A VM that this agent serves.
#[derive(Debug)]
pub struct Session {
    memory: Arc<GuestMemory>,
    hooks: Arc<Hooks>,
    /// A duplicate of the socket for hooks. The session can shut the socket down with it while a
    /// job holds the lock of the hooks.
    hook_socket: Option<OwnedFd>,
    trackers: TrackerChoice,
    /// The pages that changed since the last image.
    checkpoint: SharedCheckpoint,
    /// The job that runs or ran last, and its thread.
    job: Option<(SessionJob, Option<JoinHandle<()>>)>,
    /// Process id of the VMM; `None` while no VMM is connected, or its process is not known.
    vmm_pid: Option<u32>,
    vm_name: VmName,
    /// The VMM may give blocks a bitmap of owed pages.
    owed: bool,
    /// The last job of the previous VMM. Operators can still query how it ended.
    previous: PreviousJob,
    /// Number of the last job; 0 if there was none.
    jobs: u64,
    /// The sums over the jobs that have left the session.
    totals: JobTotals,
    notify: Arc<Event>,
    /// The devices of the agent, for its jobs.
    devices: Arc<Devices>,
    /// Whom the agent trusts on a network.
    pub trust: Trust,
    /// The key of images; `None` if they are in plain text.
    pub image_key: Option<ImageKey>,
    /// Where plain TCP may go.
    pub plain: PlainNetworks,
    vhost_user: vhost_user::Features,
    /// Why no job is started any more, once that is so.
    refuses_jobs: Option<&'static str>,
    /// True while a thread waits for the VMM to resume the guest for an operator.
    resuming: bool,
    /// True if a job before the last one has left the guest paused here.
    left_paused: bool,
    /// Values to drop after the lock is released.
    retired: Vec<DeferredDrop>,
}

/// The last job of an earlier session.
#[derive(Debug, Default)]
enum PreviousJob {
    /// There was no job.
    #[default]
    None,
    /// The job has not ended, and still holds its memory.
    Ending(SessionJob, Option<JoinHandle<()>>),
    /// The job has ended with this status.
    Ended(Box<JobStatus>),
    /// The same, before this agent was upgraded. The VMM that connects is the one of that job.
    BeforeUpgrade(Box<JobStatus>),
}

impl PreviousJob {
    fn job(&self) -> Option<&SessionJob> {
        match self {
            Self::Ending(job, _) => Some(job),
            _ => None,
        }
    }
}

impl Session {
    /// A session without memory, whose jobs wake `notify`.
    pub fn new(notify: Arc<Event>, vm_name: VmName, devices: Arc<Devices>) -> Self {
        Self {
            memory: Arc::default(),
            hooks: Arc::new(Hooks::new(None)),
            hook_socket: None,
            trackers: TrackerChoice::default(),
            checkpoint: SharedCheckpoint::default(),
            job: None,
            vmm_pid: None,
            vm_name,
            owed: false,
            previous: PreviousJob::None,
            jobs: 0,
            totals: JobTotals::default(),
            notify,
            devices,
            trust: Trust::default(),
            image_key: None,
            plain: PlainNetworks::default(),
            vhost_user: vhost_user::Features::default(),
            refuses_jobs: None,
            resuming: false,
            left_paused: false,
            retired: Vec::new(),
        }
    }

    /// The status of the job that runs or ran last.
    fn status(&self) -> JobStatus {
        self.job.as_ref().map_or_else(JobStatus::default, |(job, _)| job.status())
    }

    /// The status to report. If this VMM has had no job yet, it is that of the previous VMM's job,
    /// unless that job had ended before this VMM connected.
    pub fn reported_status(&self) -> JobStatus {
        let status = match (&self.job, &self.previous) {
            (None, PreviousJob::Ending(job, _)) => job.status(),
            (None, PreviousJob::Ended(status) | PreviousJob::BeforeUpgrade(status)) => {
                (**status).clone()
            }
            _ => self.status(),
        };
        // The reported trackers are those that the next job would use, not those of the last job.
        JobStatus { trackers: self.trackers.declared, ..status }
    }

    /// Forgets the job that has ended, so that it does not forbid other jobs any more. Its status
    /// can still be queried.
    fn retire_job(&mut self) {
        if let Some((job, thread)) = self.job.take() {
            self.count_job(&job);
            let ended = PreviousJob::Ended(Box::new(job.status()));
            self.retired.push(DeferredDrop::Job(job, thread));
            self.forget_previous(ended);
        }
    }

    /// To be called when a job has changed its phase. If the job of the previous VMM has ended,
    /// this drops the job and its memory.
    pub fn job_changed(&mut self) {
        if let PreviousJob::Ending(job, _) = &self.previous
            && job.phase().is_final()
        {
            let ended = PreviousJob::Ended(Box::new(job.status()));
            self.forget_previous(ended);
        }
    }

    fn forget_previous(&mut self, ended: PreviousJob) {
        self.count_previous();
        if let PreviousJob::Ending(job, thread) = std::mem::replace(&mut self.previous, ended) {
            self.retired.push(DeferredDrop::Job(job, thread));
        }
    }

    /// The session of the next VMM, after [`Session::end`]. It continues to count the jobs.
    pub fn next_session(&mut self) -> Self {
        let before = match self.job.take() {
            Some((job, thread)) => {
                self.count_previous();
                PreviousJob::Ending(job, thread)
            }
            None => std::mem::take(&mut self.previous),
        };
        self.vm_name.set_by_vmm(String::new());
        let mut next = Self {
            previous: before,
            jobs: self.jobs,
            totals: self.totals,
            refuses_jobs: self.refuses_jobs,
            trust: self.trust.clone(),
            image_key: self.image_key.clone(),
            plain: self.plain,
            ..Self::new(self.notify.clone(), self.vm_name.clone(), self.devices.clone())
        };
        next.job_changed();
        next
    }

    /// A VMM has connected, and owns the memory from now on. The last job of the previous VMM is
    /// none of its own.
    fn begin(&mut self, vmm_pid: Option<u32>) {
        self.vmm_pid = vmm_pid;
        if let PreviousJob::Ended(_) = self.previous {
            self.previous = PreviousJob::None;
        }
    }

    /// True if the VMM has handed over nothing.
    fn is_empty(&self) -> bool {
        let memory = &self.memory;
        memory.blocks().is_empty()
            && memory.log.is_none()
            && !memory.current.is_fenced()
            && !self.hooks.are_set()
            && !self.trackers.declared.is_declared()
            && self.vhost_user == vhost_user::Features::default()
    }

    /// The connection that was the VMM's is not: what it asked for was refused.
    fn forget_vmm(&mut self) {
        self.vmm_pid = None;
    }

    /// The running job.
    fn running(&self) -> Option<&SessionJob> {
        self.job.as_ref().map(|(job, _)| job).filter(|job| !job.phase().is_final())
    }

    /// The job that an operator's request is about: the running job, or else the job of the
    /// previous VMM, if it has not ended.
    fn operator_job(&self) -> Option<&SessionJob> {
        self.running().or_else(|| self.previous.job().filter(|job| !job.phase().is_final()))
    }

    /// The job that is paused in postcopy. It may be the job of the previous VMM, which still holds
    /// that VMM's memory.
    fn paused(&self) -> Option<SessionJob> {
        let mut jobs = self.job.as_ref().map(|(job, _)| job).into_iter().chain(self.previous.job());
        jobs.find(|job| job.phase() == Phase::PostcopyPaused).cloned()
    }

    /// Refuses to start a job while the agent is ending or is to be upgraded, or while it still has
    /// the guest of the previous VMM. A new job would replace that VMM's job, which could not be
    /// recovered any more.
    fn check_takes_jobs(&self) -> Result<(), RemoteError> {
        if let Some(why) = self.refuses_jobs {
            return Err(RemoteError::new(ErrorCode::Busy, why));
        }
        // A cancelled job ends by itself, and nobody recovers it.
        if let Some(job) = self.previous.job().filter(|job| !job.cancel.is_cancelled()) {
            let JobStatus { job, phase, .. } = job.status();
            if !phase.is_final() {
                let sentence = format!(
                    "job {job} of the previous VMM is in phase {}, and its guest's memory is here: \
                     start a job after that one has ended",
                    phase.name()
                );
                return Err(RemoteError::new(ErrorCode::Busy, sentence));
            }
        }
        Ok(())
    }

    /// Returns an error if a job is running. `what` says what is refused.
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

    /// Refuses a job unless this VMM owns the guest (`one-owner`): the last migration may have
    /// moved the guest away.
    fn check_guest_is_here(&self) -> Result<(), RemoteError> {
        let JobStatus { job, kind, phase, .. } = self.status();
        match (kind, phase) {
            (JobKind::Outgoing, Phase::Unconfirmed) => Err(RemoteError::new(
                ErrorCode::State,
                format!(
                    "job {job} handed the guest over, and the destination did not confirm it: \
                     if the guest does not run there, resume it here by force first"
                ),
            )),
            (JobKind::Outgoing, Phase::Completed) => Err(RemoteError::new(
                ErrorCode::State,
                format!("job {job} has moved the guest away: it is not here any more"),
            )),
            _ => Ok(()),
        }
    }

    /// To be called when the memory or the trackers change: no increment can build on the last
    /// image any more.
    fn end_checkpoint(&self, why: &str) {
        // The next job stops the trackers. This thread must not: it would wait for a hook, and the
        // VMM may handle hooks on the thread that waits for the answer to this request.
        self.checkpoint.end(why);
    }

    /// Ends the session, because its VMM is gone: cancels the job, and wakes it if it waits for a
    /// hook.
    pub fn end(&mut self) {
        if let Some(job) = self.running()
            && job.cancel.cancel(CancelledBy::VmmGone) == Err(TooLate::HandedOver)
        {
            match job.kind {
                // The guest ran in this VMM, and ended with it.
                JobKind::Incoming | JobKind::Restore => {
                    job.cancel.force_cancel(CancelledBy::VmmGone)
                }
                JobKind::Snapshot => {
                    log::info!(
                        "job {}: the VMM is gone; its image is complete, and gets its name",
                        job.id
                    );
                }
                // The guest runs at the destination, or is about to. It needs its memory, and the
                // agent has that also without the VMM.
                JobKind::Outgoing | JobKind::None => {
                    log::warn!(
                        "job {}: the VMM is gone after its guest was handed over; the job continues",
                        job.id
                    );
                }
            }
        }
        self.close_hooks();
    }

    /// Ends the channel of the hooks. A job that waits for a hook is woken.
    pub fn close_hooks(&self) {
        if let Some(socket) = &self.hook_socket {
            self.hooks.close(socket.as_fd());
        }
    }

    /// Refuses later jobs. The one that runs goes on.
    pub fn prepare_upgrade(&mut self) {
        let why = "the agent is to be upgraded when its job has ended, and starts no other before: \
                   try again after that";
        self.refuses_jobs.get_or_insert(why);
    }

    /// Cancels the job, and refuses later ones.
    pub fn stop(&mut self) {
        self.refuses_jobs = Some("the agent is ending, and starts no job any more");
        if let Some(job) = self.running() {
            let _ = job.cancel.cancel(CancelledBy::AgentEnds);
        }
        // A postcopy cannot be cancelled, so it continues until all memory is sent. But if it is
        // paused, now or later, nobody will recover it, because the agent is ending. Then it is
        // abandoned.
        for job in self.job.as_ref().map(|(job, _)| job).into_iter().chain(self.previous.job()) {
            if let Some(recovery) = job.recovery() {
                recovery.request(RecoveryRequest::Abandon);
            }
        }
    }

    /// True if no job runs, also none of a previous VMM.
    pub fn is_idle(&self) -> bool {
        self.running().is_none() && self.previous.job().is_none_or(|job| job.phase().is_final())
    }

    /// The last job, if it has ended.
    pub fn ended_job(&self) -> Option<JobStatus> {
        let status = self.reported_status();
        (status.job != 0 && status.phase.is_final()).then_some(status)
    }

    /// Remembers the last job of this agent before it was upgraded.
    pub fn remember_job(&mut self, status: JobStatus) {
        self.jobs = status.job;
        self.previous = PreviousJob::BeforeUpgrade(Box::new(status));
    }

    /// True if nothing is lost when this agent ends now: no job runs, or one that the next agent
    /// continues.
    pub fn survives_agent(&self) -> bool {
        self.running().is_none_or(|job| job.is_continued_by_next())
            && self.previous.job().is_none_or(|job| job.phase().is_final())
    }

    /// Takes the threads of the jobs, to wait for them. The jobs stay, so their status can still be
    /// queried.
    fn take_threads(&mut self) -> Vec<(SessionJob, Option<JoinHandle<()>>)> {
        let previous = match &mut self.previous {
            PreviousJob::Ending(job, thread) => Some((&*job, thread)),
            PreviousJob::None | PreviousJob::Ended(_) | PreviousJob::BeforeUpgrade(_) => None,
        };
        let own = self.job.as_mut().map(|(job, thread)| (&*job, thread));
        let threads = own.into_iter().chain(previous);
        threads.map(|(job, thread)| (job.clone(), thread.take())).collect()
    }
}

fn join(job: &Job, thread: Option<JoinHandle<()>>) {
    may_wait("wait for the thread of a job");
    if thread.is_some_and(|thread| thread.join().is_err()) {
        log::error!("job {} panicked", job.id);
    }
}

/// The refusal of a request with a wrong field.
fn invalid(error: &dyn std::error::Error) -> RemoteError {
    RemoteError::new(ErrorCode::Invalid, crate::error::chain(error))
}

/// Refuses a request that has not `expected` descriptors.
fn check_fds(request: &str, fds: &[OwnedFd], expected: usize) -> Result<(), RemoteError> {
    if fds.len() == expected {
        return Ok(());
    }
    Err(wrong_fds(request, fds.len(), expected))
}

/// The descriptors of a request that must have exactly `N`.
fn take_fds<const N: usize>(request: &str, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], RemoteError> {
    fds.try_into().map_err(|fds: Vec<OwnedFd>| wrong_fds(request, fds.len(), N))
}

fn wrong_fds(request: &str, count: usize, expected: usize) -> RemoteError {
    let sentence =
        format!("{request}: {count} file descriptors came with it, expected are {expected}");
    RemoteError::new(ErrorCode::Invalid, sentence)
}
