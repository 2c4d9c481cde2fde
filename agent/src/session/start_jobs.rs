// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starts jobs: migrations, snapshots and restores; and recovers a paused postcopy, or one that
//! another agent began.
//!
//! A job starts if no other job runs, the guest is here, and there is memory and a socket for
//! hooks. What can wait, such as a name look-up, runs before the session is locked; the checks are
//! repeated under the lock. The job's thread first waits for the thread of the job before it.

use super::native_requests::{Answer, Success};
use super::shared::SharedSession;
use super::{Session, check_fds, invalid};
use crate::incoming::accept::Source;
use crate::job::{Job, JobError, RecoveryRequest};
use crate::outgoing::connect::Target;
use crate::restore::RestorePlan;
use crate::restore::reset::{DiscardsSinceRequest, RecordDiscards};
use crate::snapshot::Plan;
use crate::transport::address::check_socket;
use crate::transport::{Address, Listener};
use pageferry_protocol::control::job::{
    IncomingOptions, JobKind, MAX_STREAMS, Mode, OutgoingOptions, Phase, RestoreOptions,
    SnapshotOptions,
};
use pageferry_protocol::control::reply::{ErrorCode, JobStarted, RemoteError};
use pageferry_protocol::control::role::Role;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

impl SharedSession {
    pub(super) fn start_incoming(
        &self, listen: &str, options: &IncomingOptions, fds: Vec<OwnedFd>,
    ) -> Answer {
        self.lock().check_can_start()?;
        let source = match socket_of(listen, fds)? {
            Some(socket) => Source::Socket(socket),
            None => Source::Listener(listen_at(&parse(listen)?)?),
        };
        let address = match &source {
            Source::Listener(listener) => listener.address().to_owned(),
            Source::Socket(_) => listen.to_owned(),
        };
        let IncomingOptions { resume, peer_timeout, hook_timeout } = *options;
        let options =
            OutgoingOptions { resume, peer_timeout, hook_timeout, ..OutgoingOptions::default() };
        // A job may have been started while this looked up a name.
        let mut session = self.lock();
        session.check_can_start()?;
        let job = session.new_job(JobKind::Incoming, options)?;
        // The guest is not here yet, and what it will hold is not the VMM's to change.
        job.start_frozen();
        // No tracker sees what the job writes.
        session.end_checkpoint("a guest came by a migration");
        let checkpoint = session.checkpoint.clone();
        session.run_job(&job, move |job| {
            checkpoint.stop_idle();
            crate::incoming::run(job, source);
        })?;
        let reply = JobStarted { job: job.id, address };
        Ok(Success::Started(reply))
    }

    /// Has the job that is paused go on; or takes up one that another agent began.
    pub(super) fn recover(
        &self, role: Role, session: [u8; 16], address: &str, options: OutgoingOptions,
    ) -> Answer {
        let given = match address {
            "" => None,
            text => Some(parse(text)?),
        };
        let paused = self.lock().paused();
        let Some(job) = paused else {
            return self.lock().adopt(role, session, given, options);
        };
        let (id, kind) = (job.id, job.kind);
        let mut shown = address.to_owned();
        let request = match (kind, given) {
            (JobKind::Incoming, None) => {
                let sentence = format!(
                    "job {id} is the destination's: it listens where it did, and goes on when the source is recovered; give an address to have it listen there, too"
                );
                return Err(RemoteError::new(ErrorCode::State, sentence));
            }
            (JobKind::Incoming, Some(address)) => {
                let listener = listen_at(&address)?;
                listener.address().clone_into(&mut shown);
                RecoveryRequest::Listen(listener)
            }
            (_, given) => RecoveryRequest::Connect(given),
        };
        // The source's job leaves its pause before the answer: so who sees it paused after that
        // knows that it is paused again.
        let leave = || {
            if kind == JobKind::Outgoing {
                job.enter(Phase::Recovering)
            }
        };
        if !job.recovery.request_after(request, leave) {
            let sentence = format!("job {id} is being recovered, or was asked to already");
            return Err(RemoteError::new(ErrorCode::Busy, sentence));
        }
        Ok(Success::Started(JobStarted { job: id, address: shown }))
    }
}

impl Session {
    pub(super) fn new_job(
        &mut self, kind: JobKind, options: OutgoingOptions,
    ) -> Result<Arc<Job>, RemoteError> {
        let id = self.jobs + 1;
        let job = Job::new(
            id,
            kind,
            self.memory.clone(),
            self.hooks.clone(),
            options,
            self.notify.clone(),
        );
        let job = job.map(|job| job.tracked_by(self.trackers.declared)).map_err(|error| {
            RemoteError::new(ErrorCode::System, format!("cannot make a job: {error}"))
        })?;
        self.jobs = id;
        Ok(Arc::new(job))
    }

    pub(super) fn run_job(
        &mut self, job: &Arc<Job>, run: impl FnOnce(&Arc<Job>) + Send + 'static,
    ) -> Result<(), RemoteError> {
        let (inner, before, last_vmms) =
            (job.clone(), self.job.take(), self.previous.job().cloned());
        let run = move || {
            let _ended = Ended(&inner);
            // It has ended, and its thread is about to.
            if let Some((before, thread)) = before {
                super::join(&before, thread);
            }
            // That of the VMM before, on the same memory perhaps, was cancelled and ends by itself.
            match last_vmms.map_or(Ok(()), |last| wait_for_end(&last, &inner)) {
                Ok(()) => run(&inner),
                Err(error) => inner.finish(Err(error)),
            }
        };
        let thread = std::thread::Builder::new().name(format!("job-{}", job.id)).spawn(run);
        let thread = thread.map_err(|error| {
            RemoteError::new(ErrorCode::System, format!("cannot start a thread: {error}"))
        })?;
        self.job = Some((job.clone(), Some(thread)));
        Ok(())
    }

    fn check_can_start(&self) -> Result<(), RemoteError> {
        self.check_takes_jobs()?;
        self.check_idle("a job cannot be started")?;
        self.check_guest_is_here()?;
        if self.memory.blocks().is_empty() {
            return Err(RemoteError::new(ErrorCode::State, "there is no memory: add blocks first"));
        }
        if !self.hooks.are_set() {
            let sentence = "the VMM has set no socket for hooks (SET_BACKEND_REQ_FD): the guest could not be paused or resumed";
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        Ok(())
    }

    /// Refuses a job that relies on dirty pages while the VMM has not said who reports them: a
    /// default would lose writes.
    fn check_declared(&self, what: &str, instead: &str) -> Result<(), RemoteError> {
        if self.trackers.declared.is_declared() {
            return Ok(());
        }
        let sentence = format!(
            "{what} relies on dirty pages, and the VMM has declared no tracker: it must say who reports the guest's \
             writes (Client::set_trackers), or that every writer marks the dirty log (log-is-complete); {instead}"
        );
        Err(RemoteError::new(ErrorCode::State, sentence))
    }

    pub(super) fn start_outgoing(
        &mut self, target: &str, options: OutgoingOptions, fds: Vec<OwnedFd>,
    ) -> Answer {
        self.check_can_start()?;
        options.check_start().map_err(|error| invalid(&error))?;
        if options.mode != Mode::Postcopy {
            let what = format!("mode {}", options.mode.name());
            self.check_declared(&what, "mode postcopy needs no tracker")?;
        }
        let destination = match socket_of(target, fds)? {
            Some(_) if options.mode.may_postcopy() => {
                let mode = options.mode.name();
                let sentence = format!(
                    "mode is {mode}, a target that is a descriptor is one connection, and takes precopy only"
                );
                return Err(RemoteError::new(ErrorCode::Invalid, sentence));
            }
            Some(socket) if options.streams != 1 => {
                drop(socket);
                let sentence =
                    format!("streams is {}, a target that is a descriptor has 1", options.streams);
                return Err(RemoteError::new(ErrorCode::Invalid, sentence));
            }
            Some(socket) => Target::Socket(socket),
            None => Target::Address(parse(target)?),
        };
        let job = self.new_job(JobKind::Outgoing, options)?;
        let (trackers, checkpoint) = (self.trackers.clone(), self.checkpoint.clone());
        self.run_job(&job, move |job| {
            // The same trackers, which start anew.
            checkpoint.end("a migration asked the trackers");
            checkpoint.stop_idle();
            crate::outgoing::run(job, destination, &trackers);
        })?;
        let reply = JobStarted { job: job.id, address: target.to_owned() };
        Ok(Success::Started(reply))
    }

    /// Goes on with a migration that another agent began for this guest, and left when it died.
    fn adopt(
        &mut self, role: Role, session: [u8; 16], address: Option<Address>,
        options: OutgoingOptions,
    ) -> Answer {
        self.check_takes_jobs()?;
        self.check_idle("no job is paused")?;
        if session == [0; 16] || role == Role::Operator {
            let sentence = "no job is paused here; one that another agent began can be taken up by the VMM alone, which knows its session";
            return Err(RemoteError::new(ErrorCode::NotFound, sentence));
        }
        let Some(address) = address else {
            let sentence = "address is empty: this agent did not begin the migration and does not know where the destination listens";
            return Err(RemoteError::new(ErrorCode::Invalid, sentence));
        };
        if self.memory.blocks().is_empty() {
            return Err(RemoteError::new(ErrorCode::State, "there is no memory: add blocks first"));
        }
        let mode = if options.mode.may_postcopy() { options.mode } else { Mode::Postcopy };
        let urgent_streams = options.urgent_streams.clamp(1, MAX_STREAMS - 1);
        let streams = options.streams.min(MAX_STREAMS - urgent_streams);
        let job = self.new_job(
            JobKind::Outgoing,
            OutgoingOptions { mode, streams, urgent_streams, ..options },
        )?;
        job.set_adopted();
        let (id, shown) = (job.id, format!("{address:?}"));
        self.run_job(&job, move |job| {
            crate::outgoing::postcopy::recover::run(job, session, address)
        })?;
        Ok(Success::Started(JobStarted { job: id, address: shown }))
    }

    /// Starts to save the guest.
    pub(super) fn start_snapshot(
        &mut self, path: String, options: SnapshotOptions, fds: &[OwnedFd],
    ) -> Answer {
        self.check_can_start()?;
        check_fds("start snapshot", fds, 0)?;
        check_path("path", &path)?;
        if !options.base.is_empty() {
            check_path("base", &options.base)?;
        }
        let without = "a snapshot with neither needs no tracker";
        if !options.base.is_empty() {
            self.check_declared("base, an increment,", without)?;
        }
        if options.track {
            self.check_declared("track", without)?;
        }
        let SnapshotOptions { bandwidth, hook_timeout, .. } = options;
        let job = OutgoingOptions { bandwidth, hook_timeout, ..OutgoingOptions::default() };
        let job = self.new_job(JobKind::Snapshot, job)?;
        let (trackers, checkpoint) = (self.trackers.clone(), self.checkpoint.clone());
        let reply = JobStarted { job: job.id, address: path.clone() };
        let plan = Plan { path: path.into(), options, trackers, checkpoint };
        self.run_job(&job, move |job| crate::snapshot::run(job, &plan))?;
        Ok(Success::Started(reply))
    }

    /// Starts to restore a guest.
    pub(super) fn start_restore(
        &mut self, role: Role, path: &str, options: RestoreOptions, fds: &[OwnedFd],
    ) -> Answer {
        self.check_can_start()?;
        check_fds("start restore", fds, 0)?;
        check_path("path", path)?;
        if !options.working_set.is_empty() {
            check_path("working_set", &options.working_set)?;
        }
        let RestoreOptions { resume, hook_timeout, bandwidth, .. } = options;
        let given =
            OutgoingOptions { resume, hook_timeout, bandwidth, ..OutgoingOptions::default() };
        let job = self.new_job(JobKind::Restore, given)?;
        let asks_first = role == Role::Operator;
        if !asks_first {
            // The guest is not here yet, and what it will hold is not the VMM's to change.
            job.start_frozen();
        }
        let before = match asks_first {
            true => RecordDiscards::FromPause,
            false => RecordDiscards::SinceRequest(
                DiscardsSinceRequest::start(&self.memory).map_err(|error| invalid(&error))?,
            ),
        };
        let order = RestorePlan {
            path: path.into(),
            options,
            asks_first,
            record_discards: before,
            checkpoint: self.checkpoint.clone(),
        };
        self.run_job(&job, move |job| crate::restore::run(job, &order))?;
        let reply = JobStarted { job: job.id, address: path.to_owned() };
        Ok(Success::Started(reply))
    }
}

/// Waits until the job `last` has ended, for the next one.
fn wait_for_end(last: &Job, next: &Job) -> Result<(), JobError> {
    /// Time between two looks whether the next was cancelled meanwhile.
    const LOOK: Duration = Duration::from_millis(50);
    while !last.wait_until_final(LOOK) {
        next.cancel.check()?;
    }
    Ok(())
}

/// A job that panics has ended, too: on drop, if it has not said so itself.
struct Ended<'a>(&'a Job);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if !self.0.status().phase.is_final() {
            self.0.finish(Err(JobError::Panicked));
        }
    }
}

/// The socket that came for the address `fd`; none for any other address, with which none may come.
fn socket_of(address: &str, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>, RemoteError> {
    check_fds("start", &fds, usize::from(address == "fd"))?;
    fds.into_iter().next().map(check_socket).transpose().map_err(|error| invalid(&error))
}

fn parse(address: &str) -> Result<Address, RemoteError> {
    Address::parse(address).map_err(|error| invalid(&error))
}

fn listen_at(address: &Address) -> Result<Listener, RemoteError> {
    address
        .listen()
        .map_err(|error| RemoteError::new(ErrorCode::System, crate::error::chain(&error)))
}

/// Refuses a path that means one file here and another where it was written.
fn check_path(field: &str, path: &str) -> Result<(), RemoteError> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(RemoteError::new(
        ErrorCode::Invalid,
        format!("{field} is {path:?}, expected is a path from the root"),
    ))
}
