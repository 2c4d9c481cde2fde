//! pageferry's own requests.

use super::registry::NewBlock;
use super::shared::SharedSession;
use super::{Role, Session, check_fds, invalid, take_fds};
use crate::hooks::Hooks;
use crate::incoming::accept::Source;
use crate::job::{self, Job, JobError, TooLate};
use crate::memory::current::CurrentAgent;
use crate::outgoing::connect::Target;
use crate::tracking::TrackerChoice;
use crate::tracking::pagemap::Pagemap;
use crate::transport::address::check_socket;
use crate::transport::{Address, Listener};
use crate::waiting::may_wait;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::codec::Encoder;
use pageferry_protocol::control::frame::{Frame, MAX_BODY};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{
    IncomingOptions, JobKind, MAX_STREAMS, Mode, NonConvergence, OutgoingOptions, Phase,
};
use pageferry_protocol::control::reply::{
    AddBlockReply, ErrorCode, HelloReply, JobStarted, RangesReply, RemoteError, Reply, encode_reply,
};
use pageferry_protocol::control::request::{
    BLOCK_DISCARDED, BlockRange, CONTROL_VERSION, DISCARD_PUNCH, FEATURE_FENCE, MAX_RANGES, Request,
};
use pageferry_protocol::memory::BlockGeometry;
use rustix::process::PidfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM may take to resume a guest that an operator forces. Whoever asked waits 10
/// seconds for the answer, and is to read this one's reason.
const RESUME_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a paused job may take to end once it was told to give up.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a VMM that comes back waits for the end of its last job. It waits 10 seconds for the
/// answer.
const LAST_JOB_TIMEOUT: Duration = Duration::from_secs(5);

/// An answer whose fields are encoded already.
pub(super) type Answer = Reply<Encoded>;
/// Puts the fields of an answer into a body.
pub(super) type Encoded = Box<dyn FnOnce(Encoder) -> Encoder>;

impl SharedSession {
    /// Answers one of our own requests.
    pub fn handle_native(&self, role: Role, frame: Frame) -> Frame {
        let code = frame.request;
        let mut fds = Vec::new();
        let answer = match Request::decode(code, &frame.body) {
            Some(Ok(Request::Hello { version_min, version_max, features, agent })) => {
                self.hello(role, (version_min, version_max), features, agent, frame.fds, &mut fds)
            }
            // Of a VMM that gave this agent up only what it sent before can still be read here. It
            // has done that by itself by now, and its guest may use what it discarded then.
            Some(Ok(request)) if role == Role::Vmm => {
                let memory = self.lock().memory.clone();
                let current = memory
                    .current
                    .check()
                    .map_err(|replaced| RemoteError::new(ErrorCode::State, replaced));
                current.and_then(|()| self.answer(role, request, frame.fds))
            }
            None => {
                let sentence = format!("request {code:#x} is unknown");
                Err(RemoteError::new(ErrorCode::Unsupported, sentence))
            }
            Some(Err(error)) => {
                Err(RemoteError::new(ErrorCode::Invalid, format!("request {code:#x}: {error}")))
            }
            Some(Ok(request)) => self.answer(role, request, frame.fds),
        };
        match &answer {
            // It passes, and whoever waits for that asks again and again.
            Err(error) if error.code == ErrorCode::Busy => {
                log::debug!("request {code:#x} refused: {error}")
            }
            Err(error) => log::info!("request {code:#x} refused: {error}"),
            Ok(_) => {}
        }
        let mut fields = None;
        let unit = answer.map(|encoded| fields = Some(encoded));
        let body = encode_reply(&unit, |(), encoder| {
            fields.map_or(Encoder::new(), |fields| fields(encoder))
        });
        Frame { fds, ..Frame::reply(code, body) }
    }

    /// Answers a hello; what is to go with the answer is put into `sent`.
    fn hello(
        &self, role: Role, (min, max): (u16, u16), features: u64, number: u64, fds: Vec<OwnedFd>,
        sent: &mut Vec<OwnedFd>,
    ) -> Answer {
        if min > CONTROL_VERSION || max < CONTROL_VERSION {
            let sentence =
                format!("version {min} to {max} offered, this agent speaks {CONTROL_VERSION}");
            return Err(RemoteError::new(ErrorCode::Unsupported, sentence));
        }
        let features = features & FEATURE_FENCE;
        check_fds("hello", &fds, usize::from(features != 0))?;
        if let Some(fence) = fds.into_iter().next() {
            sent.push(self.set_fence(role, &fence, number)?);
        }
        let reply = HelloReply {
            version: CONTROL_VERSION,
            features,
            max_body: MAX_BODY as u32,
            max_ranges: MAX_RANGES as u32,
            pid: std::process::id(),
        };
        Ok(Box::new(move |encoder| reply.encode(encoder)))
    }

    /// From now on this agent acts for the VMM only while it is number `number` in the word that
    /// lies in `fence`. Returns a pidfd of this process.
    fn set_fence(&self, role: Role, fence: &OwnedFd, number: u64) -> Result<OwnedFd, RemoteError> {
        if role == Role::Operator {
            let sentence = "features: bit 0, fence, is for the connection that owns the memory, and another one does";
            return Err(RemoteError::new(ErrorCode::Denied, sentence));
        }
        self.wait_for_last_job()?;
        may_wait("map the fence word");
        let failed = |errno| {
            RemoteError::new(
                ErrorCode::System,
                format!("cannot open a pidfd of this agent: {errno}"),
            )
        };
        let process = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
            .map_err(failed)?;
        let current = CurrentAgent::fenced(fence.as_fd(), number).map_err(|error| {
            let RemoteError { code, sentence } = invalid(&error);
            RemoteError::new(code, format!("fence: {sentence}"))
        })?;
        self.lock().fence(current)?;
        Ok(process)
    }

    /// A VMM that comes back to this process believes that nobody reads or writes its memory any
    /// more for the connection before: waits until the job of that one has ended. A guest that was
    /// handed over is elsewhere, and its job goes on.
    fn wait_for_last_job(&self) -> Result<(), RemoteError> {
        let last = self.lock().previous.job().filter(|job| job.cancel.is_cancelled()).cloned();
        match last {
            Some(job) if !job.wait_until_final(LAST_JOB_TIMEOUT) => {
                let sentence = format!(
                    "job {} of the VMM's connection before is still ending: try again, or use another agent",
                    job.id
                );
                Err(RemoteError::new(ErrorCode::Busy, sentence))
            }
            _ => Ok(()),
        }
    }

    fn answer(&self, role: Role, request: Request, fds: Vec<OwnedFd>) -> Answer {
        if role == Role::Operator && touches_memory(&request) {
            let sentence =
                "only the connection that owns the memory may do this, and another one does";
            return Err(RemoteError::new(ErrorCode::Denied, sentence));
        }
        match request {
            // Answered before it comes here.
            Request::Hello { .. } => Ok(nothing()),
            Request::AddBlock { geometry, fd_offset, vmm_address, flags } => {
                self.add_block(geometry, fd_offset, vmm_address, flags, fds)
            }
            Request::RemoveBlock { id } => self.lock().remove_block(id).map(|()| nothing()),
            Request::Discard { flags, ranges } => self.discard(&ranges, flags & DISCARD_PUNCH != 0),
            Request::Free { ranges } => self.free(&ranges),
            Request::Populate { ranges } => self.populate(&ranges),
            Request::SetTrackers { sources } => self.set_trackers(sources, fds),
            Request::StartOutgoing { target, options } => {
                self.lock().start_outgoing(&target, options, fds)
            }
            Request::StartIncoming { listen, options } => {
                self.start_incoming(&listen, &options, fds)
            }
            Request::Cancel => self.lock().cancel(),
            Request::SetParameters { options } => self.lock().set_parameters(&options),
            Request::QueryStatus => {
                let status = self.lock().report();
                Ok(Box::new(move |encoder| status.encode(encoder)))
            }
            // The server keeps the subscription; there is nothing for the session to do.
            Request::Subscribe { .. } => Ok(nothing()),
            Request::Resume { force } => self.resume(force),
            Request::StartPostcopy => self.lock().start_postcopy(),
            Request::StartSnapshot { path, options } => {
                self.lock().start_snapshot(role, path, options, &fds)
            }
            Request::StartRestore { path, options } => {
                self.lock().start_restore(role, &path, options, &fds)
            }
            Request::Recover { session, address, options } => {
                self.recover(role, session, &address, options)
            }
        }
    }

    fn add_block(
        &self, geometry: BlockGeometry, fd_offset: u64, vmm_address: u64, flags: u32,
        fds: Vec<OwnedFd>,
    ) -> Answer {
        let [memory, bitmap] = take_fds("add block", fds)?;
        let new = NewBlock { geometry, memory, fd_offset, vmm_address, bitmap: Some(bitmap) };
        let added = self.add_blocks(vec![new])?;
        let block = &added[0];
        if flags & BLOCK_DISCARDED != 0 {
            block.discarded.set(block.all());
            block.unsettled.set(block.all());
        }
        let reply = AddBlockReply {
            host_page_size: block.backing.host_page_size(),
            sealed: u32::from(block.backing.is_sealed()),
        };
        Ok(Box::new(move |encoder| reply.encode(encoder)))
    }

    fn discard(&self, ranges: &[BlockRange], punch: bool) -> Answer {
        let memory = self.lock().memory.clone();
        let changed_pages = memory.discard(ranges, punch).map_err(|error| invalid(&error))?;
        Ok(Box::new(move |encoder| RangesReply { changed_pages }.encode(encoder)))
    }

    fn free(&self, ranges: &[BlockRange]) -> Answer {
        let memory = self.lock().memory.clone();
        let changed_pages = memory.free(ranges).map_err(|error| invalid(&error))?;
        Ok(Box::new(move |encoder| RangesReply { changed_pages }.encode(encoder)))
    }

    fn populate(&self, ranges: &[BlockRange]) -> Answer {
        let memory = self.lock().memory.clone();
        let populating = memory.populating();
        let job = self.lock().job.as_ref().map(|(job, _)| job.clone());
        let populate = || memory.populate(ranges);
        let populated = match job {
            Some(job) => job
                .populate_unless_frozen(populate)
                .map_err(|frozen| RemoteError::new(frozen.code(), frozen))?,
            None => populate(),
        };
        drop(populating);
        let changed_pages = populated.map_err(|error| invalid(&error))?;
        Ok(Box::new(move |encoder| RangesReply { changed_pages }.encode(encoder)))
    }

    fn set_trackers(&self, sources: Trackers, fds: Vec<OwnedFd>) -> Answer {
        self.lock().check_idle("the trackers cannot be changed")?;
        let scans = sources.contains(Trackers::WRITE_PROTECT);
        check_fds("set trackers", &fds, usize::from(scans))?;
        may_wait("look at the pagemap");
        let pagemap = fds
            .into_iter()
            .next()
            .map(Pagemap::new)
            .transpose()
            .map_err(|error| invalid(&error))?;
        let mut session = self.lock();
        session.check_idle("the trackers cannot be changed")?;
        let asked = scans || sources.contains(Trackers::HOOKS);
        if asked && !session.hooks.are_set() {
            let sentence =
                format!("sources: {sources} needs a socket for hooks (SET_BACKEND_REQ_FD)");
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        session.end_checkpoint("the trackers were changed");
        session.trackers = TrackerChoice { declared: sources, pagemap: pagemap.map(Arc::new) };
        Ok(nothing())
    }

    fn start_incoming(&self, listen: &str, options: &IncomingOptions, fds: Vec<OwnedFd>) -> Answer {
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
        Ok(Box::new(move |encoder| reply.encode(encoder)))
    }

    /// Has the job that is paused go on; or takes up one that another agent began.
    fn recover(
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
                job::RecoveryRequest::Listen(listener)
            }
            (_, given) => job::RecoveryRequest::Connect(given),
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
        Ok(Box::new(move |encoder| JobStarted { job: id, address: shown }.encode(encoder)))
    }

    /// `one-owner`: after an unconfirmed commit only an operator who looked at both sides may
    /// resume the guest.
    fn resume(&self, force: bool) -> Answer {
        let abandoned = if force { self.lock().abandon_paused()? } else { None };
        if let Some(job) = abandoned {
            // It waits for nothing else, and is over at once.
            if !job.wait_until_final(ABANDON_TIMEOUT) {
                let sentence =
                    format!("job {} was told to give up, and is still ending: try again", job.id);
                return Err(RemoteError::new(ErrorCode::Busy, sentence));
            }
        }
        let (hooks, job) = self.lock().begin_resume(force)?;
        let asked = hooks.ask(&Hook::Resume { force, paused: false }, RESUME_TIMEOUT);
        let mut session = self.lock();
        // The VMM may be gone meanwhile, and another be here.
        if session.job.as_ref().is_some_and(|(own, _)| Arc::ptr_eq(own, &job)) {
            session.resuming = false;
            if asked.is_ok() {
                job.resumed_by_force();
                session.retire_job();
            }
        }
        asked.map_err(|error| {
            let sentence = format!(
                "the VMM did not say that the guest is resumed, and may resume it yet: {}",
                crate::error::chain(&error)
            );
            RemoteError::new(ErrorCode::Other, sentence)
        })?;
        Ok(nothing())
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

    pub(super) fn check_can_start(&self) -> Result<(), RemoteError> {
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
    pub(super) fn check_declared(&self, what: &str, instead: &str) -> Result<(), RemoteError> {
        if self.trackers.declared.is_declared() {
            return Ok(());
        }
        let sentence = format!(
            "{what} relies on dirty pages, and the VMM has declared no tracker: it must say who reports the guest's \
             writes (Client::set_trackers), or that every writer marks the dirty log (log-is-complete); {instead}"
        );
        Err(RemoteError::new(ErrorCode::State, sentence))
    }

    fn start_outgoing(
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
        Ok(Box::new(move |encoder| reply.encode(encoder)))
    }

    fn cancel(&mut self) -> Answer {
        let Some(job) = self.operator_job() else {
            return Err(RemoteError::new(ErrorCode::NotFound, "no job is running"));
        };
        job.cancel.cancel().map_err(|error| match (error, job.kind) {
            (TooLate::Ended, _) => RemoteError::new(ErrorCode::NotFound, error),
            (TooLate::HandedOver, JobKind::Restore) => RemoteError::new(
                ErrorCode::State,
                "too late to cancel: the guest that is restored runs",
            ),
            (TooLate::HandedOver, JobKind::Snapshot) => RemoteError::new(
                ErrorCode::State,
                "too late to cancel: the image is being completed",
            ),
            (TooLate::HandedOver, _) => RemoteError::new(ErrorCode::State, error),
        })?;
        Ok(nothing())
    }

    fn set_parameters(&mut self, options: &OutgoingOptions) -> Answer {
        match self.operator_job() {
            Some(job) if matches!(job.kind, JobKind::Snapshot | JobKind::Restore) => {
                job.set_bandwidth(options.bandwidth);
                Ok(nothing())
            }
            Some(job) if job.kind == JobKind::Outgoing => {
                let mode = job.options().mode;
                if options.policy == NonConvergence::Postcopy && mode != Mode::Hybrid {
                    let sentence = format!(
                        "policy is postcopy, and the mode of job {} is {}: it takes hybrid",
                        job.id,
                        mode.name()
                    );
                    return Err(RemoteError::new(ErrorCode::Invalid, sentence));
                }
                job.set_parameters(options);
                Ok(nothing())
            }
            _ => Err(RemoteError::new(ErrorCode::NotFound, "no job with parameters is running")),
        }
    }

    fn start_postcopy(&mut self) -> Answer {
        match self.running() {
            Some(job) if job.kind == JobKind::Outgoing => {
                if job.request_postcopy() {
                    return Ok(nothing());
                }
                let (mode, phase) = (job.options().mode.name(), job.status().phase.name());
                let sentence = format!(
                    "mode is {mode} and the phase {phase}: only mode hybrid can be switched, until its passes end"
                );
                Err(RemoteError::new(ErrorCode::State, sentence))
            }
            _ => Err(RemoteError::new(ErrorCode::NotFound, "no outgoing migration is running")),
        }
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
        Ok(Box::new(move |encoder| JobStarted { job: id, address: shown }.encode(encoder)))
    }

    /// Checks that the guest may be resumed by force, and that nobody is about to do so already:
    /// whom to ask, and the job that handed the guest over.
    fn begin_resume(&mut self, force: bool) -> Result<(Arc<Hooks>, Arc<Job>), RemoteError> {
        // It may have been on its way to a pause.
        if force && let Some((job, _)) = &self.job {
            check_whole(job)?;
        }
        if let Some(job) = self.paused().filter(|_| !force) {
            let sentence = format!(
                "job {} is paused in postcopy: recover it; if its destination is gone for good, resume by force, \
                 after the steps of docs/postcopy.md, \"When the source is unconfirmed\"",
                job.id
            );
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        self.check_idle("the guest cannot be resumed")?;
        let refused = |sentence: &str| Err(RemoteError::new(ErrorCode::State, sentence));
        let handed_over = self.job.as_ref().map(|(job, _)| job).filter(|job| {
            job.kind == JobKind::Outgoing
                && matches!(job.status().phase, Phase::Unconfirmed | Phase::Completed)
        });
        let Some(job) = handed_over.cloned() else {
            return refused("the guest was not handed over: the VMM resumes it by itself");
        };
        if job.status().phase == Phase::Completed {
            return refused(
                "the destination has confirmed that the guest is there, so it is not resumed here, also not by force; \
                 if that host is lost for good the VMM can take the guest back by itself (Client::take_by_force)",
            );
        }
        if !force {
            return refused(
                "ownership of the guest was handed over: force is needed, and it must not run at the destination",
            );
        }
        if std::mem::replace(&mut self.resuming, true) {
            return Err(RemoteError::new(
                ErrorCode::Busy,
                "the VMM is being asked to resume the guest already",
            ));
        }
        Ok((self.hooks.clone(), job))
    }

    /// A paused outgoing postcopy is given up, if there is one: the job, which is about to end.
    fn abandon_paused(&mut self) -> Result<Option<Arc<Job>>, RemoteError> {
        if let Some((job, _)) = &self.job {
            check_whole(job)?;
        }
        let Some(job) = self.paused().filter(|job| job.kind == JobKind::Outgoing) else {
            return Ok(None);
        };
        if !self.job.as_ref().is_some_and(|(own, _)| Arc::ptr_eq(own, &job)) {
            let sentence = format!(
                "job {} is paused, and the VMM that handed the guest over is gone: nobody can resume it here, only recover it",
                job.id
            );
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        job.recovery.request(job::RecoveryRequest::Abandon);
        Ok(Some(job))
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

/// Refuses to have the guest run from memory that is not whole.
fn check_whole(job: &Job) -> Result<(), RemoteError> {
    job.check_whole().map_err(|error| RemoteError::new(ErrorCode::State, error))
}

fn touches_memory(request: &Request) -> bool {
    matches!(
        request,
        Request::AddBlock { .. }
            | Request::RemoveBlock { .. }
            | Request::Discard { .. }
            | Request::Free { .. }
            | Request::Populate { .. }
            | Request::SetTrackers { .. }
            // The VMM must know that its memory is about to be filled, and by whom.
            | Request::StartIncoming { .. }
    )
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

fn nothing() -> Encoded {
    Box::new(|encoder| encoder)
}
