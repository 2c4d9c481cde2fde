// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Native requests of pageferry: decoded and answered, except those that start jobs or resume a
//! guest by force, which have files of their own.

use super::program_pipe;
use super::registry::NewBlock;
use super::session_job::SessionJob;
use super::shared::SharedSession;
use super::start_jobs::check_path;
use super::{Session, check_fds, invalid, wrong_fds};
use crate::base;
use crate::image::Chain;
use crate::job::{CancelledBy, TooLate};
use crate::memory::clone_view::CloneView;
use crate::memory::current::CurrentAgent;
use crate::opener;
use crate::pagemap::Pagemap;
use crate::store;
use crate::tracking::TrackerChoice;
use crate::waiting::may_wait;
use pageferry_protocol::control::clones::OpenBaseReply;
use pageferry_protocol::control::codec::{DecodeError, Encoder};
use pageferry_protocol::control::devices::{BalloonStatus, MemStatus};
use pageferry_protocol::control::frame::{Frame, MAX_BODY};
use pageferry_protocol::control::grants::MAX_GRANTS;
use pageferry_protocol::control::job::{
    JobKind, JobStatus, Mode, NonConvergence, Parameters, Phase,
};
use pageferry_protocol::control::reply::{
    AddBlockReply, ErrorCode, HelloReply, JobStarted, RangesReply, RemoteError, Reply, encode_reply,
};
use pageferry_protocol::control::request::{
    BLOCK_CLONE, BLOCK_DISCARDED, BlockRange, CONTROL_VERSION, DISCARD_PUNCH, FEATURE_FENCE,
    FEATURE_GRANTS, FEATURE_OWED, FEATURE_PROGRAM_PIPE, FEATURES, MAX_RANGES, Request,
};
use pageferry_protocol::control::role::Role;
use pageferry_protocol::control::{AgentInfo, Trackers};
use pageferry_protocol::memory::BlockGeometry;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::PidfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM that comes back waits for the end of its last job. It waits 10 seconds for the
/// answer.
const LAST_JOB_TIMEOUT: Duration = Duration::from_secs(5);

/// What a native request returns if it succeeds.
pub(super) enum Success {
    /// Nothing else.
    Done,
    /// For a hello.
    Hello(HelloReply),
    /// For a block that was added.
    Block(AddBlockReply),
    /// For a discard, free or populate.
    Ranges(RangesReply),
    /// For a job that was started or recovered.
    Started(JobStarted),
    /// For a query of the status.
    Status(Box<JobStatus>),
    /// For a query of what the agent serves.
    Agent(AgentInfo),
    Balloon(BalloonStatus),
    PluggedMemory(MemStatus),
    /// For the base of an image, and the base itself.
    Base(OpenBaseReply, OwnedFd),
}

impl Success {
    fn encode(&self, encoder: Encoder) -> Encoder {
        match self {
            Self::Done => encoder,
            Self::Hello(reply) => reply.encode(encoder),
            Self::Block(reply) => reply.encode(encoder),
            Self::Ranges(reply) => reply.encode(encoder),
            Self::Started(reply) => reply.encode(encoder),
            Self::Status(status) => status.encode(encoder),
            Self::Agent(info) => info.encode(encoder),
            Self::Balloon(status) => status.encode(encoder),
            Self::PluggedMemory(status) => status.encode(encoder),
            Self::Base(reply, _) => reply.encode(encoder),
        }
    }
}

/// The answer to a native request.
pub(super) type Answer = Reply<Success>;

impl SharedSession {
    /// Answers native request number `code`, which [`Request::decode`] has decoded, from a
    /// connection with this role.
    pub fn handle_native(
        &self, role: Role, code: u32, request: Option<Result<Request, DecodeError>>,
        fds: Vec<OwnedFd>,
    ) -> Frame {
        let mut sent = Vec::new();
        let answer = match request {
            Some(Ok(request)) => check_hello(&request, &fds)
                .and_then(|()| self.check_sender(role, &request))
                .and_then(|()| check_takes_fds(&request, &fds))
                .and_then(|()| match request {
                    Request::Hello { version_min, version_max, features, agent, name } => {
                        let answer =
                            self.hello((version_min, version_max), features, agent, fds, &mut sent);
                        if answer.is_ok() && features & FEATURE_FENCE != 0 {
                            self.lock().vm_name.set_by_vmm(name);
                        }
                        answer
                    }
                    request => self.answer(role, request, fds),
                }),
            None => {
                let sentence = format!("request {code:#x} is unknown");
                Err(RemoteError::new(ErrorCode::Unsupported, sentence))
            }
            Some(Err(error)) => {
                Err(RemoteError::new(ErrorCode::Invalid, format!("request {code:#x}: {error}")))
            }
        };
        match &answer {
            // This passes, and the client asks again and again until it does.
            Err(error) if error.code == ErrorCode::Busy => {
                log::debug!("request {code:#x} refused: {error}")
            }
            Err(error) => log::info!("request {code:#x} refused: {error}"),
            Ok(_) => {}
        }
        let body = encode_reply(&answer, Success::encode);
        if let Ok(Success::Base(_, base)) = answer {
            sent.push(base);
        }
        Frame { fds: sent, ..Frame::reply(code, body) }
    }

    /// Refuses a request that this connection may not send.
    fn check_sender(&self, role: Role, request: &Request) -> Result<(), RemoteError> {
        if role < request.required_role() {
            let sentence = match request {
                Request::StartSnapshot { .. } => {
                    "mode is stopped, which only the VMM can ask for, after it has stopped its guest; use mode paused"
                        .to_owned()
                }
                _ => {
                    let vmm = self.lock().vmm();
                    format!(
                        "only the VMM may send this, and this agent serves {vmm}, on another connection: \
                         an agent serves one VMM, so start another agent for another VMM"
                    )
                }
            };
            return Err(RemoteError::new(ErrorCode::Denied, sentence));
        }
        // The VMM sent this request before it gave this agent up, and has done the work itself
        // since. Its guest may use by now what the request discards.
        if role == Role::Vmm && !matches!(request, Request::Hello { .. }) {
            let current = self.lock().memory.current.clone();
            current.check().map_err(|replaced| RemoteError::new(ErrorCode::State, replaced))?;
        }
        Ok(())
    }

    /// Answers a hello; what is to go with the answer is put into `sent`.
    fn hello(
        &self, (min, max): (u16, u16), features: u64, number: u64, fds: Vec<OwnedFd>,
        sent: &mut Vec<OwnedFd>,
    ) -> Answer {
        if min > CONTROL_VERSION || max < CONTROL_VERSION {
            let sentence =
                format!("version {min} to {max} offered, this agent speaks {CONTROL_VERSION}");
            return Err(RemoteError::new(ErrorCode::Unsupported, sentence));
        }
        // Only a VMM with a fence makes sure that there are not two agents.
        let known = if features & FEATURE_FENCE == 0 { FEATURE_GRANTS } else { FEATURES };
        let wanted = if opener::is_asked() { known } else { known & !FEATURE_GRANTS };
        let features = features & wanted;
        if let Some(fence) = fds.into_iter().next() {
            sent.push(self.set_fence(&fence, number)?);
            if features & FEATURE_PROGRAM_PIPE != 0 {
                sent.push(program_pipe::reading_end().map_err(|error| {
                    RemoteError::new(ErrorCode::System, format!("cannot make a pipe: {error}"))
                })?);
            }
            self.lock().owed = features & FEATURE_OWED != 0;
        }
        let reply = HelloReply {
            version: CONTROL_VERSION,
            features,
            max_body: MAX_BODY as u32,
            max_ranges: MAX_RANGES as u32,
            pid: std::process::id(),
        };
        Ok(Success::Hello(reply))
    }

    /// From now on this agent acts for the VMM only while it is number `number` in the word that
    /// lies in `fence`. Returns a pidfd of this process.
    fn set_fence(&self, fence: &OwnedFd, number: u64) -> Result<OwnedFd, RemoteError> {
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

    /// Waits until the job of the VMM's previous connection has ended. A VMM that comes back to
    /// this process relies on that: that job must not read or write its memory any more. If the
    /// guest was handed over, it is elsewhere, and the job continues.
    fn wait_for_last_job(&self) -> Result<(), RemoteError> {
        let last = self.lock().previous.job().filter(|job| job.cancel.is_cancelled()).cloned();
        match last {
            Some(job) if !job.wait_until_final(LAST_JOB_TIMEOUT) => {
                let sentence = format!(
                    "job {} of the VMM's previous connection is still ending: try again, or use another agent",
                    job.id
                );
                Err(RemoteError::new(ErrorCode::Busy, sentence))
            }
            _ => Ok(()),
        }
    }

    fn answer(&self, role: Role, request: Request, fds: Vec<OwnedFd>) -> Answer {
        match request {
            // Answered before it comes here.
            Request::Hello { .. } => Ok(Success::Done),
            Request::AddBlock { geometry, fd_offset, vmm_address, flags } => {
                self.add_block(geometry, fd_offset, vmm_address, flags, fds)
            }
            Request::RemoveBlock { id } => {
                self.lock().remove_block(id)?;
                self.wait_for_devices();
                Ok(Success::Done)
            }
            Request::Discard { flags, ranges } => self.discard(&ranges, flags & DISCARD_PUNCH != 0),
            Request::Free { ranges } => self.free(&ranges),
            Request::Populate { ranges } => self.populate(&ranges),
            Request::SetTrackers { sources } => self.set_trackers(sources, fds),
            Request::StartOutgoing { target, options } => {
                self.check_target(&target)?;
                self.check_guest_exists(role, options.hook_timeout)?;
                self.lock().start_outgoing(&target, options, fds)
            }
            Request::StartIncoming { listen, options } => {
                self.start_incoming(role, &listen, &options, fds)
            }
            Request::Cancel => self.lock().cancel(role),
            Request::SetParameters { parameters } => self.lock().set_parameters(&parameters),
            Request::QueryStatus => {
                let status = self.lock().reported_status();
                Ok(Success::Status(Box::new(status)))
            }
            Request::QueryAgent => Ok(Success::Agent(self.agent_info())),
            Request::Balloon { target, ask_stats } => self.balloon(target, ask_stats),
            Request::PluggedMemory { requested } => self.plugged_memory(requested),
            Request::ConnectDevice { device } => self.connect_device(device, fds),
            Request::Continue { journal } => self.continue_job(&journal, fds),
            Request::Grant => grant(fds),
            Request::OpenBase { path } => self.open_base(&path, &fds),
            // The server does what they ask for; there is nothing for the session to do.
            Request::Subscribe { .. } | Request::Upgrade { .. } => Ok(Success::Done),
            Request::Resume { force } => self.resume(force),
            Request::StartPostcopy => self.lock().start_postcopy(),
            Request::StartSnapshot { path, options } => {
                check_named("path", &path, true)?;
                if !options.base.is_empty() {
                    check_named("base", &options.base, false)?;
                }
                self.check_guest_exists(role, options.hook_timeout)?;
                self.lock().start_snapshot(path, options, &fds)
            }
            Request::StartRestore { path, options } => {
                check_fds("start restore", &fds, 0)?;
                check_named("path", &path, false)?;
                if !options.working_set.is_empty() {
                    check_named("working_set", &options.working_set, true)?;
                }
                check_opens(&path)?;
                self.lock().start_restore(role, &path, options)
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
        let is_clone = flags & BLOCK_CLONE != 0;
        let is_owing = (fds.len() == 3 || is_clone) && self.lock().owed;
        let expected = if is_owing { 3 } else { 2 } + if is_clone { 3 } else { 0 };
        check_fds("add block", &fds, expected)?;
        let mut fds = fds.into_iter();
        let (memory, bitmap) = (fds.next(), fds.next());
        let owed = if is_owing { fds.next() } else { None };
        let Some(memory) = memory else { return Err(wrong_fds("add block", 0, 2)) };
        let clone = match (fds.next(), fds.next(), fds.next()) {
            (Some(view), Some(pagemap), Some(service)) => {
                let pagemap = Pagemap::new(pagemap).map_err(|error| invalid(&error))?;
                Some(CloneView::new(view, pagemap, service, vmm_address))
            }
            _ => None,
        };
        let new = NewBlock { geometry, memory, fd_offset, vmm_address, bitmap, owed, clone };
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
        Ok(Success::Block(reply))
    }

    /// Opens the base of the image at `path`.
    fn open_base(&self, path: &str, fds: &[OwnedFd]) -> Answer {
        check_fds("open base", fds, 0)?;
        check_path("path", path)?;
        check_named("path", path, false)?;
        may_wait("open an image");
        let image_key = self.lock().image_key.clone();
        let chain = Chain::open_with(Path::new(path), image_key.as_ref());
        let chain = chain.map_err(|error| invalid(&error))?;
        let base::Layout { places, reserved, length } = base::Layout::of(&chain);
        let blocks = places.into_iter().map(|place| place.block).collect();
        let name = base::BaseName::of(&chain);
        let failed = |error: &dyn std::fmt::Display| {
            RemoteError::new(ErrorCode::System, format!("the base of {path}: {error}"))
        };
        let opened = opener::base(&name.file_name(), length, reserved);
        let (agents, file) = opened.map_err(|error| failed(&error))?;
        name.write_to(&agents).map_err(|errno| failed(&errno))?;
        Ok(Success::Base(OpenBaseReply { blocks }, file))
    }

    fn discard(&self, ranges: &[BlockRange], punch: bool) -> Answer {
        let memory = self.lock().memory.clone();
        let changed_pages = memory.discard(ranges, punch).map_err(|error| invalid(&error))?;
        Ok(Success::Ranges(RangesReply { changed_pages }))
    }

    fn free(&self, ranges: &[BlockRange]) -> Answer {
        let memory = self.lock().memory.clone();
        let changed_pages = memory.free(ranges).map_err(|error| invalid(&error))?;
        Ok(Success::Ranges(RangesReply { changed_pages }))
    }

    fn populate(&self, ranges: &[BlockRange]) -> Answer {
        let memory = self.lock().memory.clone();
        let populating = memory.populating();
        let job = self.lock().job.as_ref().map(|(job, _)| job.clone());
        let populate = || memory.populate(ranges);
        let populated = match job {
            Some(job) => job
                .populate_if_allowed(populate)
                .map_err(|refused| RemoteError::new(refused.code(), refused))?,
            None => populate(),
        };
        drop(populating);
        let changed_pages = populated.map_err(|error| invalid(&error))?;
        Ok(Success::Ranges(RangesReply { changed_pages }))
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
        Ok(Success::Done)
    }
}

impl Session {
    fn cancel(&mut self, role: Role) -> Answer {
        let Some(job) = self.operator_job() else {
            return Err(RemoteError::new(ErrorCode::NotFound, "no job is running"));
        };
        let by = match role {
            Role::Vmm => CancelledBy::Vmm,
            Role::Operator => CancelledBy::Operator,
        };
        job.cancel.cancel(by).map_err(|error| match (error, job.kind) {
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
        Ok(Success::Done)
    }

    fn set_parameters(&mut self, parameters: &Parameters) -> Answer {
        let refused = |sentence: String| Err(RemoteError::new(ErrorCode::Invalid, sentence));
        match self.operator_job() {
            Some(job @ (SessionJob::Snapshot(_) | SessionJob::Restore(_))) => {
                if let Some(name) = parameters.only_for_migrations().next() {
                    let (id, kind) = (job.id, job.kind.name());
                    return refused(format!(
                        "{name}: job {id} is a {kind}, of which only the bandwidth can be changed"
                    ));
                }
                if let Some(bandwidth) = parameters.bandwidth {
                    job.limiter.set_rate(bandwidth);
                }
                Ok(Success::Done)
            }
            Some(SessionJob::Outgoing(job)) => {
                let (id, mode) = (job.id, job.options().mode);
                if parameters.policy == Some(NonConvergence::Postcopy) && mode != Mode::Hybrid {
                    let mode = mode.name();
                    return refused(format!(
                        "policy is postcopy, and the mode of job {id} is {mode}: it takes hybrid"
                    ));
                }
                if parameters.switch_after.is_some_and(|passes| passes != 0) && mode != Mode::Hybrid
                {
                    let mode = mode.name();
                    return refused(format!(
                        "switch to postcopy: the mode of job {id} is {mode}, and this takes hybrid"
                    ));
                }
                if let Some(name) = parameters.only_for_migrations().next()
                    && job.phase() > Phase::Passes
                {
                    let phase = job.phase().name();
                    return refused(format!(
                        "{name}: the passes of job {id} are over (phase {phase}), and only the \
                         bandwidth can be changed"
                    ));
                }
                job.set_parameters(parameters);
                Ok(Success::Done)
            }
            Some(SessionJob::Incoming(job)) => {
                let sentence = format!(
                    "job {} is an incoming migration: its parameters are those of its source",
                    job.id
                );
                Err(RemoteError::new(ErrorCode::State, sentence))
            }
            None => Err(RemoteError::new(ErrorCode::NotFound, "no job is running")),
        }
    }

    fn start_postcopy(&mut self) -> Answer {
        match self.running() {
            Some(SessionJob::Outgoing(job)) => {
                if job.request_postcopy() {
                    return Ok(Success::Done);
                }
                let (mode, phase) = (job.options().mode.name(), job.phase().name());
                let sentence = format!(
                    "mode is {mode} and the phase {phase}: only mode hybrid can be switched, until its passes end"
                );
                Err(RemoteError::new(ErrorCode::State, sentence))
            }
            _ => Err(RemoteError::new(ErrorCode::NotFound, "no outgoing migration is running")),
        }
    }
}

/// Lets the opener of this agent open what the descriptors stand for.
fn grant(fds: Vec<OwnedFd>) -> Answer {
    if !(1..=MAX_GRANTS).contains(&fds.len()) {
        let sentence =
            format!("grant: {} file descriptors, expected are 1 to {MAX_GRANTS}", fds.len());
        return Err(RemoteError::new(ErrorCode::Invalid, sentence));
    }
    opener::grant(fds).map(|()| Success::Done).map_err(|errno| match errno {
        Errno::INVAL | Errno::NOTDIR => {
            let what = "grant: a descriptor is neither a folder nor a connected UDP socket";
            RemoteError::new(ErrorCode::Invalid, what)
        }
        errno => {
            let what = "the opener of this agent (--sandbox) does not answer, or is gone";
            RemoteError::new(ErrorCode::System, format!("{what}: {errno}"))
        }
    })
}

/// Refuses a path which the opener of this agent would not open.
fn check_named(field: &str, path: &str, write: bool) -> Result<(), RemoteError> {
    // A relative path is another file here than for the sender.
    check_path(field, path)?;
    may_wait("ask the opener");
    if store::is_stored(Path::new(path)) {
        return store::client::check(Path::new(path))
            .map_err(|error| RemoteError::new(ErrorCode::Denied, format!("{field}: {error}")));
    }
    match opener::is_named(Path::new(path), write) {
        // What else is wrong with it is found when it is used.
        Ok(true) | Err(_) => Ok(()),
        Ok(false) => {
            let how = if write { "written" } else { "read" };
            let sentence = format!(
                "{field}: no file may be {how} in the folder of {path}: this agent is in a sandbox, \
                 and nobody has named the folder (by GRANT, or by --folder of the agent)"
            );
            Err(RemoteError::new(ErrorCode::Denied, sentence))
        }
    }
}

/// Refuses an image that cannot be opened, before anything is given up for it.
fn check_opens(path: &str) -> Result<(), RemoteError> {
    may_wait("open an image");
    if store::is_stored(Path::new(path)) {
        // It may take seconds. The job opens it before it gives anything up.
        return Ok(());
    }
    // Does not wait for the other end of a pipe.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    opener::open(path, flags, rustix::fs::Mode::empty()).map(drop).map_err(|errno| {
        RemoteError::new(ErrorCode::Invalid, format!("path: cannot open {path}: {errno}"))
    })
}

/// Refuses a hello with a wrong number of descriptors. This comes before all else that is wrong
/// with its sender.
fn check_hello(request: &Request, fds: &[OwnedFd]) -> Result<(), RemoteError> {
    let Request::Hello { features, .. } = request else { return Ok(()) };
    check_fds("hello", fds, usize::from(features & FEATURE_FENCE != 0))
}

/// Refuses descriptors that came with a request which takes none, such as those of another request
/// whose code the sender got wrong. The other requests check their descriptors by themselves.
fn check_takes_fds(request: &Request, fds: &[OwnedFd]) -> Result<(), RemoteError> {
    let name = match request {
        Request::RemoveBlock { .. } => "remove block",
        Request::Discard { .. } => "discard",
        Request::Free { .. } => "free",
        Request::Populate { .. } => "populate",
        Request::Cancel => "cancel",
        Request::SetParameters { .. } => "set parameters",
        Request::QueryStatus => "query status",
        Request::QueryAgent => "query agent",
        Request::Balloon { .. } => "balloon",
        Request::PluggedMemory { .. } => "plugged memory",
        Request::Subscribe { .. } => "subscribe",
        Request::Resume { .. } => "resume",
        Request::StartPostcopy => "start postcopy",
        Request::Upgrade { .. } => "upgrade",
        Request::Recover { .. } => "recover",
        Request::Hello { .. }
        | Request::AddBlock { .. }
        | Request::SetTrackers { .. }
        | Request::ConnectDevice { .. }
        | Request::Continue { .. }
        | Request::Grant
        | Request::OpenBase { .. }
        | Request::StartOutgoing { .. }
        | Request::StartIncoming { .. }
        | Request::StartSnapshot { .. }
        | Request::StartRestore { .. } => return Ok(()),
    };
    check_fds(name, fds, 0)
}
