// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starts jobs: migrations, snapshots and restores; recovers a paused postcopy, or one that another
//! agent began; and continues a lazy restore, or the destination of a postcopy, whose agent was
//! lost.
//!
//! A job starts if no other job runs, the guest is here, and there is memory and a socket for
//! hooks. What can wait, such as a name look-up, runs before the session is locked; the checks are
//! repeated under the lock. The job's thread first waits for the thread of the job before it.

use super::native_requests::{Answer, Success};
use super::session_job::SessionJob;
use super::shared::SharedSession;
use super::{Session, check_fds, invalid, take_fds};
use crate::hooks::HookError;
use crate::incoming::IncomingPlan;
use crate::incoming::accept::Source;
use crate::incoming::handshake::KnownSource;
use crate::incoming::job::IncomingJob;
use crate::incoming::postcopy::ContinuedPostcopy;
use crate::job::{CommonOptions, Job, JobError, RecoveryRequest};
use crate::outgoing::connect::Target;
use crate::outgoing::job::OutgoingJob;
use crate::restore::RestorePlan;
use crate::restore::lazy::{ContinuedRestore, OwedImage};
use crate::restore::reset::{DiscardsSinceRequest, RecordDiscards};
use crate::snapshot::SnapshotPlan;
use crate::transport::address::check_socket;
use crate::transport::{Address, Listener, TransportError};
use crate::trust::Peer;
use crate::waiting::may_wait;
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::job::{
    IncomingOptions, JobKind, MAX_STREAMS, Mode, OutgoingOptions, Phase, RestoreOptions,
    SnapshotOptions,
};
use pageferry_protocol::control::journal::Journal;
use pageferry_protocol::control::reply::{ErrorCode, JobStarted, RemoteError};
use pageferry_protocol::control::role::Role;
use pageferry_protocol::image::stored::is_stored;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM may take to say whether it would accept a guest. The operator's command waits 10
/// seconds for the agent, and must get the reason before that.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(8);

impl SharedSession {
    /// Listens for a source.
    fn listen_at(&self, address: &Address) -> Result<Listener, RemoteError> {
        let (trust, plain) = {
            let session = self.lock();
            (session.trust.clone(), session.plain)
        };
        if address.secured_host().is_some() {
            trust.check_listen().map_err(|error| invalid(&error))?;
        }
        address.listen(plain).map_err(|error| match error {
            TransportError::PlainNetwork { .. } => invalid(&error),
            error => RemoteError::new(ErrorCode::System, crate::error::chain(&error)),
        })
    }

    /// Refuses a target to which the certificates of this side cannot lead. It reads them if they
    /// have changed, so it waits without the lock of the session.
    pub(super) fn check_target(&self, target: &str) -> Result<(), RemoteError> {
        let trust = self.lock().trust.clone();
        // What else is wrong with it is said when the job starts.
        match Address::parse(target).as_ref().map(Address::secured_host) {
            Ok(Some(host)) => trust.check_target(host).map_err(|error| invalid(&error)),
            _ => Ok(()),
        }
    }

    /// Starts to wait for a guest.
    pub(super) fn start_incoming(
        &self, role: Role, listen: &str, options: &IncomingOptions, fds: Vec<OwnedFd>,
    ) -> Answer {
        self.lock().check_can_start()?;
        let source = match socket_of(listen, fds)? {
            Some(socket) => Source::Socket(socket),
            None => Source::Listener(self.listen_at(&parse(listen)?)?),
        };
        let address = match &source {
            Source::Listener(listener) => listener.address().to_owned(),
            Source::Socket(_) => listen.to_owned(),
        };
        if role == Role::Operator {
            self.check_guest_expected(&address, options.hook_timeout)?;
        }
        // Another job may have started while this looked up a name, or asked the VMM.
        let mut session = self.lock();
        session.check_can_start()?;
        let job = session.new_job(JobKind::Incoming, options.into())?;
        let job = IncomingJob::new(job, options.clone()).map_err(no_job)?;
        let consent_for = (role == Role::Operator).then(|| address.clone());
        if consent_for.is_none() {
            // The guest is not here yet, so the VMM must not change what it will hold.
            job.start_refusing_populates();
        }
        let plan = IncomingPlan { source, consent_for, checkpoint: session.checkpoint.clone() };
        let job = Arc::new(job);
        session.run_job(SessionJob::Incoming(job.clone()), move || {
            crate::incoming::run(&job, plan);
        })?;
        Ok(Success::Started(JobStarted { job: session.jobs, address }))
    }

    /// Refuses to wait for a guest that the VMM would not accept: its operator learns that now, and
    /// not when a source has come.
    fn check_guest_expected(&self, address: &str, timeout: Duration) -> Result<(), RemoteError> {
        let hooks = self.lock().hooks.clone();
        let origin = GuestOrigin::Migration { address: address.to_owned() };
        let asked = hooks.ask(&Hook::ExpectGuest { origin }, timeout.min(QUESTION_TIMEOUT));
        let sentence = match asked {
            Ok(()) => return Ok(()),
            // A VMM that does not know the question is asked when a source is here.
            Err(HookError::Refused { error, .. }) if error.code == ErrorCode::Unsupported => {
                return Ok(());
            }
            Err(HookError::Refused { error, .. }) => {
                format!("the VMM does not wait for a guest: {}", error.sentence)
            }
            Err(error) => {
                let why = crate::error::chain(&error);
                format!("it is not known whether the VMM accepts a guest: {why}")
            }
        };
        Err(RemoteError::new(ErrorCode::State, sentence))
    }

    /// Refuses to migrate or save a guest that the VMM does not have: its operator learns that now,
    /// and no destination is used up.
    pub(super) fn check_guest_exists(
        &self, role: Role, timeout: Duration,
    ) -> Result<(), RemoteError> {
        if role != Role::Operator {
            return Ok(());
        }
        let hooks = {
            let session = self.lock();
            session.check_can_start()?;
            session.hooks.clone()
        };
        match hooks.ask(&Hook::CheckGuest, timeout.min(QUESTION_TIMEOUT)) {
            Err(HookError::Refused { error, .. }) if error.code != ErrorCode::Unsupported => {
                Err(RemoteError::new(ErrorCode::State, error.sentence))
            }
            Ok(()) => Ok(()),
            // A VMM that does not know the question has a guest. Of one that does not answer the
            // job says why it fails.
            Err(error) => {
                log::debug!("{}", crate::error::chain(&error));
                Ok(())
            }
        }
    }

    /// Recovers the paused job, or adopts one that another agent began.
    pub(super) fn recover(
        &self, role: Role, session: [u8; 16], address: &str, options: OutgoingOptions,
    ) -> Answer {
        let given = match address {
            "" => None,
            text => Some(parse(text)?),
        };
        let (paused, plain) = {
            let session = self.lock();
            (session.paused(), session.plain)
        };
        if let Some(address) = &given {
            address.check_plain(plain).map_err(|error| invalid(&error))?;
        }
        let Some(job) = paused else {
            return self.lock().adopt(role, session, given, options);
        };
        let id = job.id;
        let mut shown = address.to_owned();
        let (recovery, request) = match (&job, given) {
            (SessionJob::Incoming(_), None) => {
                let sentence = format!(
                    "this side of job {id} is the destination, which still listens: recover the source; give an address here to listen there, too"
                );
                return Err(RemoteError::new(ErrorCode::State, sentence));
            }
            (SessionJob::Incoming(job), Some(address)) => {
                let listener = self.listen_at(&address)?;
                listener.address().clone_into(&mut shown);
                (&job.recovery, RecoveryRequest::Listen(listener))
            }
            (SessionJob::Outgoing(job), given) => (&job.recovery, RecoveryRequest::Connect(given)),
            (SessionJob::Snapshot(_) | SessionJob::Restore(_), _) => {
                let sentence = format!("job {id} is no migration");
                return Err(RemoteError::new(ErrorCode::State, sentence));
            }
        };
        // The source's job leaves its pause before the answer. If a client sees it paused after the
        // answer, it is paused again.
        let leave = || {
            if job.outgoing().is_some() {
                job.enter(Phase::Recovering)
            }
        };
        if !recovery.request_after(request, leave) {
            let sentence = format!("job {id} is being recovered, or has ended");
            return Err(RemoteError::new(ErrorCode::Busy, sentence));
        }
        Ok(Success::Started(JobStarted { job: id, address: shown }))
    }
}

impl Session {
    /// The common part of the next job. It has its number once [`Session::run_job`] succeeds.
    pub(super) fn new_job(
        &mut self, kind: JobKind, options: CommonOptions,
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
        let job = job.map_err(no_job)?.tracked_by(self.trackers.declared);
        let job = job.with_devices(self.devices.clone()).that_trusts(self.trust.clone());
        let job = job.with_plain_networks(self.plain);
        Ok(Arc::new(job.with_image_key(self.image_key.clone())))
    }

    /// Makes `job` the job of this session, and calls `run` on a new thread.
    pub(super) fn run_job(
        &mut self, job: SessionJob, run: impl FnOnce() + Send + 'static,
    ) -> Result<(), RemoteError> {
        self.left_paused = self.has_left_paused();
        let (common, before, last_vmms) =
            (job.common().clone(), self.job.take(), self.previous.job().cloned());
        if let Some((before, _)) = &before {
            self.count_job(before);
        }
        let run = move || {
            let _ended = Ended(&common);
            common.cancel.cover_this_thread();
            // This job has ended, and its thread is about to end.
            if let Some((before, thread)) = before {
                super::join(&before, thread);
            }
            // The job of the VMM before was cancelled, and ends by itself. It may have the same
            // memory.
            match last_vmms.map_or(Ok(()), |last| wait_for_end(&last, &common)) {
                Ok(()) => {
                    // A device that began a buffer before did not ask this job.
                    super::devices::wait_for_devices(&common.memory);
                    run();
                }
                Err(error) => common.finish(Err(error)),
            }
        };
        let thread = std::thread::Builder::new().name(format!("job-{}", job.id)).spawn(run);
        let thread = thread.map_err(|error| {
            RemoteError::new(ErrorCode::System, format!("cannot start a thread: {error}"))
        })?;
        self.jobs = job.id;
        self.job = Some((job, Some(thread)));
        Ok(())
    }

    /// Refuses a job that cannot start now.
    fn check_can_start(&self) -> Result<(), RemoteError> {
        self.check_takes_jobs()?;
        self.check_idle("a job cannot be started")?;
        self.check_guest_is_here()?;
        if self.memory.blocks().is_empty() {
            return Err(RemoteError::new(
                ErrorCode::State,
                "there is no memory: no VMM is connected, or it has added no blocks",
            ));
        }
        if !self.hooks.are_set() {
            let sentence = "the VMM has set no socket for hooks (SET_BACKEND_REQ_FD): the guest could not be paused or resumed";
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        Ok(())
    }

    /// Refuses a job that relies on dirty pages if the VMM has declared no tracker: a default would
    /// lose writes.
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

    /// Starts to migrate the guest.
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
            None => {
                let address = parse(target)?;
                address.check_plain(self.plain).map_err(|error| invalid(&error))?;
                Target::Address(address)
            }
        };
        let job = self.new_job(JobKind::Outgoing, (&options).into())?;
        let job = Arc::new(OutgoingJob::new(job, options).map_err(no_job)?);
        let (trackers, checkpoint) = (self.trackers.clone(), self.checkpoint.clone());
        self.run_job(SessionJob::Outgoing(job.clone()), move || {
            // The migration starts the same trackers anew.
            checkpoint.end("a migration asked the trackers");
            checkpoint.stop_idle();
            crate::outgoing::run(&job, destination, &trackers);
        })?;
        Ok(Success::Started(JobStarted { job: self.jobs, address: target.to_owned() }))
    }

    /// Continues a migration that another agent began for this guest, and left when it died.
    fn adopt(
        &mut self, role: Role, session: [u8; 16], address: Option<Address>,
        options: OutgoingOptions,
    ) -> Answer {
        self.check_takes_jobs()?;
        self.check_idle("no job is paused")?;
        if session == [0; 16] || role == Role::Operator {
            let sentence = "no job is paused here; only the VMM can continue a migration that another agent began (Client::recover)";
            return Err(RemoteError::new(ErrorCode::NotFound, sentence));
        }
        let Some(address) = address else {
            let sentence = "address is empty: this agent did not begin the migration and does not know where the destination listens";
            return Err(RemoteError::new(ErrorCode::Invalid, sentence));
        };
        if self.memory.blocks().is_empty() {
            return Err(RemoteError::new(
                ErrorCode::State,
                "there is no memory: no VMM is connected, or it has added no blocks",
            ));
        }
        let mode = if options.mode.may_postcopy() { options.mode } else { Mode::Postcopy };
        let urgent_streams = options.urgent_streams.clamp(1, MAX_STREAMS - 1);
        let streams = options.streams.min(MAX_STREAMS - urgent_streams);
        let options = OutgoingOptions { mode, streams, urgent_streams, ..options };
        let job = self.new_job(JobKind::Outgoing, (&options).into())?;
        let job = Arc::new(OutgoingJob::adopted(job, options).map_err(no_job)?);
        let shown = format!("{address:?}");
        self.run_job(SessionJob::Outgoing(job.clone()), move || {
            crate::outgoing::postcopy::recover::run(&job, session, address)
        })?;
        Ok(Success::Started(JobStarted { job: self.jobs, address: shown }))
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
        let job = self.new_job(JobKind::Snapshot, (&options).into())?;
        let (trackers, checkpoint) = (self.trackers.clone(), self.checkpoint.clone());
        let reply = JobStarted { job: job.id, address: path.clone() };
        let plan = SnapshotPlan { path: path.into(), options, trackers, checkpoint };
        self.run_job(SessionJob::Snapshot(job.clone()), move || crate::snapshot::run(&job, &plan))?;
        Ok(Success::Started(reply))
    }

    /// Starts to restore a guest. The caller has checked that the image at `path` opens, which can
    /// wait.
    pub(super) fn start_restore(
        &mut self, role: Role, path: &str, options: RestoreOptions,
    ) -> Answer {
        self.check_can_start()?;
        if !options.working_set.is_empty() {
            check_path("working_set", &options.working_set)?;
        }
        let job = self.new_job(JobKind::Restore, (&options).into())?;
        let needs_vmm_consent = role == Role::Operator;
        if !needs_vmm_consent {
            // The guest is not here yet, so the VMM must not change what it will hold.
            job.start_refusing_populates();
        }
        let before = match needs_vmm_consent {
            true => RecordDiscards::FromPause,
            false => RecordDiscards::SinceRequest(
                DiscardsSinceRequest::start(&self.memory).map_err(|error| invalid(&error))?,
            ),
        };
        let order = RestorePlan {
            path: path.into(),
            options,
            needs_vmm_consent,
            record_discards: before,
            checkpoint: self.checkpoint.clone(),
        };
        self.run_job(SessionJob::Restore(job.clone()), move || crate::restore::run(&job, &order))?;
        Ok(Success::Started(JobStarted { job: self.jobs, address: path.to_owned() }))
    }
}

impl SharedSession {
    /// Continues the job of a lost agent: the guest runs, and its memory is not all here.
    pub(super) fn continue_job(&self, journal: &[u8], fds: Vec<OwnedFd>) -> Answer {
        let [uffd] = take_fds("continue", fds)?;
        let session = self.lock();
        let (memory, image_key) = (session.memory.clone(), session.image_key.clone());
        drop(session);
        let address = match Journal::decode(journal).map_err(|error| invalid(&error))? {
            Journal::Restore { path, image, options } => {
                check_path("path", &path)?;
                may_wait("open an image");
                let of = (path.as_str(), image);
                let image = OwedImage::open(of, &options, &memory, image_key.as_ref());
                let image = image.map_err(|error| invalid(&error))?;
                let mut session = self.lock();
                session.check_can_start()?;
                let job = session.new_job(JobKind::Restore, (&options).into())?;
                cannot_be_cancelled(&job)?;
                let rest = ContinuedRestore::new(&job, image, uffd, options);
                let rest = rest.map_err(|error| invalid(&error))?;
                session.run_job(SessionJob::Restore(job.clone()), move || rest.run(&job))?;
                path
            }
            Journal::Incoming { session: number, peer, address, acknowledge, options } => {
                let source = known_source(number, &peer)?;
                let missing = memory.owed_pages().map_err(|error| invalid(&error))?;
                let listener = self.listen_at(&parse(&address)?)?;
                let mut session = self.lock();
                session.check_can_start()?;
                let job = session.new_job(JobKind::Incoming, (&options).into())?;
                cannot_be_cancelled(&job)?;
                let job = Arc::new(IncomingJob::new(job, options).map_err(no_job)?);
                let rest =
                    ContinuedPostcopy::new(&job, (source, acknowledge), listener, missing, uffd)
                        .map_err(|error| invalid(&error))?;
                session.run_job(SessionJob::Incoming(job.clone()), move || rest.run(&job))?;
                address
            }
        };
        Ok(Success::Started(JobStarted { job: self.lock().jobs, address }))
    }
}

/// The source of a migration that another agent received, as the journal has it.
fn known_source(session: [u8; 16], peer: &[u8]) -> Result<KnownSource, RemoteError> {
    if peer.is_empty() {
        return Ok(KnownSource { session, peer: None });
    }
    let unknown = || {
        let sentence = format!("the journal has {} bytes that name no source", peer.len());
        RemoteError::new(ErrorCode::Unsupported, sentence)
    };
    Ok(KnownSource { session, peer: Some(Peer::decode(peer).ok_or_else(unknown)?) })
}

/// The guest of this job runs already, and nobody else has its memory.
fn cannot_be_cancelled(job: &Job) -> Result<(), RemoteError> {
    job.set_kept();
    let refused = |error| RemoteError::new(ErrorCode::State, crate::error::chain(&error));
    job.cancel.commit_point().map_err(refused)
}

/// Waits for the job `last` to end, before the job `next` runs.
fn wait_for_end(last: &Job, next: &Job) -> Result<(), JobError> {
    /// Time between two checks whether the next job was cancelled.
    const LOOK: Duration = Duration::from_millis(50);
    while !last.wait_until_final(LOOK) {
        next.cancel.check()?;
    }
    Ok(())
}

/// Ends a job whose thread panicked: on drop, if the job has not ended.
struct Ended<'a>(&'a Job);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if !self.0.phase().is_final() {
            self.0.finish(Err(JobError::Panicked));
        }
    }
}

/// The socket that came with the address `fd`. Refuses a socket with any other address.
fn socket_of(address: &str, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>, RemoteError> {
    check_fds("start", &fds, usize::from(address == "fd"))?;
    fds.into_iter().next().map(check_socket).transpose().map_err(|error| invalid(&error))
}

/// A refusal because the kernel has no descriptors for a job.
fn no_job(error: std::io::Error) -> RemoteError {
    RemoteError::new(ErrorCode::System, format!("cannot make a job: {error}"))
}

fn parse(address: &str) -> Result<Address, RemoteError> {
    Address::parse(address).map_err(|error| invalid(&error))
}

/// Refuses a relative path: it would be another file here than for the sender.
pub(super) fn check_path(field: &str, path: &str) -> Result<(), RemoteError> {
    if (path.starts_with('/') || is_stored(path)) && !path.contains('\0') {
        return Ok(());
    }
    Err(RemoteError::new(
        ErrorCode::Invalid,
        format!(
            "{field} is {path:?}, expected is a path from the root, or the name of an object in a store"
        ),
    ))
}
