// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests to the agent and their answers, one at a time, over the control socket.
//!
//! An agent that breaks the protocol or its deadline is lost for good. The client shuts down the
//! control socket and also the hook channel, so that an agent that hangs cannot keep the guest
//! paused (`vmm-survives`). A new connection is the only way to continue: after a late answer
//! nobody can tell which request the next answer belongs to.

use crate::agent_process::AgentProcess;
use crate::block::{Block, BlockAdded};
use crate::continuation::Kept;
use crate::deadline::deadline;
use crate::error::Error;
use crate::heartbeat::BUSY_INTERVAL;
use crate::link::Link;
use crate::memfd::Fence;
use crate::ownership::SharedOwnership;
use crate::private_memory::Service;
use crate::timeouts::Timeouts;
use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder};
use pageferry_protocol::control::frame::FLAG_NEED_REPLY;
use pageferry_protocol::control::reply::{AddBlockReply, HelloReply, JobStarted, decode_reply};
use pageferry_protocol::control::request::{
    BLOCK_CLONE, CONTROL_VERSION, FEATURE_CLONES, FEATURE_FENCE, FEATURE_GRANTS, FEATURE_OWED,
    FEATURE_PROGRAM_PIPE, FEATURES, MAX_RANGES, Request, code, name,
};
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::error::{chain, rounded};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `VHOST_USER_SET_LOG_BASE`.
const SET_LOG_BASE: u32 = 6;
/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;

/// A pair of connected sockets, close-on-exec.
pub(crate) fn socket_pair() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(Error::kernel("create a pair of sockets"))
}

/// Both ends of a hook channel.
#[derive(Debug)]
pub(crate) struct HookEnds {
    pub(crate) ours: OwnedFd,
    pub(crate) agents: OwnedFd,
}

/// The control socket of one agent, and whether the agent is lost.
#[derive(Debug)]
pub(crate) struct Control {
    socket: FrameSocket,
    link: Arc<Link>,
    timeouts: Timeouts,
    /// The hand-over is complete, so the timeout depends on what waits for the agent.
    is_attached: bool,
    /// Largest number of ranges that the agent accepts in one request.
    pub(crate) max_ranges: usize,
    /// The agent knows of owed pages, and can continue the job of another.
    knows_owed: bool,
    /// The agent is in a sandbox.
    wants_grants: bool,
    /// The agent knows clones.
    knows_clones: bool,
    lost: Option<String>,
}

impl Control {
    /// Opens the connection with a hello. Afterwards the process of the agent is known. The agent
    /// has nothing of the guest yet; see [`Control::hand_over`].
    pub(crate) fn open(
        socket: OwnedFd, name: &str, fence: &Arc<Fence>, ownership: &Arc<SharedOwnership>,
        timeouts: Timeouts,
    ) -> Result<(Self, HookEnds), Error> {
        let (ours, agents) = socket_pair()?;
        let duplicate = |fd: &OwnedFd| fd.try_clone().map_err(Error::io("duplicate a socket"));
        let link = Link::new(duplicate(&socket)?, duplicate(&ours)?, fence, ownership);
        let mut control = Self {
            socket: socket.into(),
            link: Arc::new(link),
            timeouts,
            is_attached: false,
            max_ranges: MAX_RANGES,
            knows_owed: false,
            wants_grants: false,
            knows_clones: false,
            lost: None,
        };
        control.hello(name)?;
        Ok((control, HookEnds { ours, agents }))
    }

    fn hello(&mut self, name: &str) -> Result<(), Error> {
        let (version_min, version_max) = (CONTROL_VERSION, CONTROL_VERSION);
        let hello = Request::Hello {
            version_min,
            version_max,
            features: FEATURES,
            agent: self.link.id,
            name: name.to_owned(),
        };
        let asked = |errno| Error::kernel("ask for the sender of a message")(errno);
        self.socket.report_sender(true).map_err(asked)?;
        let link = Arc::clone(&self.link);
        let frame = self.round_trip(hello.code(), 0, &hello.encode(), &[link.fence_fd()])?;
        self.socket.report_sender(false).map_err(asked)?;
        let reply = match decode_reply(&frame.body, HelloReply::decode) {
            Ok(Ok(reply)) => reply,
            Ok(Err(refused)) => {
                return Err(Error::Refused { code: refused.code, sentence: refused.sentence });
            }
            Err(malformed) => return Err(self.give_up(malformed_answer(code::HELLO, &malformed))),
        };
        if reply.version != CONTROL_VERSION {
            return Err(self
                .give_up(format!("version is {}, offered was {CONTROL_VERSION}", reply.version)));
        }
        if reply.max_ranges == 0 {
            return Err(self.give_up("max_ranges is 0".to_owned()));
        }
        if reply.features & FEATURE_FENCE == 0 || reply.features & !FEATURES != 0 {
            let features = reply.features;
            return Err(self.give_up(format!(
                "features is {features:#x}, expected is {FEATURE_FENCE:#x}, fence, or {FEATURES:#x}"
            )));
        }
        self.knows_owed = reply.features & FEATURE_OWED != 0;
        self.wants_grants = reply.features & FEATURE_GRANTS != 0;
        self.knows_clones = reply.features & FEATURE_CLONES != 0;
        let expected = 1 + usize::from(reply.features & FEATURE_PROGRAM_PIPE != 0);
        let (count, mut fds) = (frame.fds.len(), frame.fds.into_iter());
        let (true, Some(pidfd), pipe) = (count == expected, fds.next(), fds.next()) else {
            let expected = if expected == 1 { "1, a pidfd" } else { "2, a pidfd and a pipe" };
            return Err(self.give_up(format!(
                "the answer to hello has {count} file descriptors, expected is {expected}"
            )));
        };
        let process = AgentProcess::new((pidfd, pipe), self.socket.sender(), reply.pid);
        let process = process.map_err(|why| self.give_up(format!("the answer to hello: {why}")))?;
        self.link.set_process(process);
        self.max_ranges = MAX_RANGES.min(reply.max_ranges as usize);
        Ok(())
    }

    /// Makes the agent the current one: gives it the dirty log and its end of the hook channel. All
    /// agents before it must have exited.
    pub(crate) fn hand_over(
        &mut self, log: BorrowedFd<'_>, log_bytes: u64, hooks: &OwnedFd,
    ) -> Result<(), Error> {
        self.link.admit();
        let body = Encoder::new().u64(log_bytes).u64(0).finish();
        let taken = self.standard_request(SET_LOG_BASE, 0, &body, &[log], |reply| {
            Ok((reply.u64("mmap_size")?, reply.u64("mmap_offset")?))
        })?;
        if taken != (log_bytes, 0) {
            let (size, offset) = taken;
            return Err(self.give_up(format!(
                "it refused the dirty log of {log_bytes:#x} bytes: its answer is size {size:#x}, offset {offset:#x}"
            )));
        }
        match self.standard_request(
            SET_BACKEND_REQ_FD,
            FLAG_NEED_REPLY,
            &[],
            &[hooks.as_fd()],
            |reply| reply.u64("result"),
        )? {
            0 => Ok(()),
            code => Err(self.give_up(format!("it refused the hook channel with code {code}"))),
        }
    }

    /// The connection.
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// The hand-over is complete. From now on the guest may wait for the agent, which may shorten
    /// its timeout.
    pub(crate) fn set_attached(&mut self) {
        self.is_attached = true;
    }

    /// The longest time that the agent may take to answer or to exit.
    pub(crate) fn longest_timeout(&self) -> Duration {
        self.timeouts.longest()
    }

    /// How long the agent may take to answer now.
    fn timeout(&self) -> Duration {
        if self.is_attached { self.timeouts.current() } else { self.timeouts.longest() }
    }

    /// The error for every request to a lost agent; `None` while it is not known to be lost.
    pub(crate) fn lost_error(&self) -> Option<Error> {
        self.lost.clone().map(|reason| Error::AgentLost { reason })
    }

    /// Gives up an agent that hangs or breaks the protocol. Returns the error for the caller.
    pub(crate) fn give_up(&mut self, reason: String) -> Error {
        // Before it is logged: a thread may wait for this, and the VMM's logger may be slow.
        self.link.give_up();
        self.set_lost(reason)
    }

    /// Gives the agent up by the VMM's own decision. The caller decides what becomes of the
    /// process.
    pub(crate) fn retire(&mut self, reason: &str) {
        // Before it is shut down from this side.
        let ended = if self.lost.is_none() { self.link.end_in_words() } else { None };
        self.link.retire();
        if self.lost.is_none() {
            self.set_lost(ended.unwrap_or_else(|| reason.to_owned()));
        }
    }

    fn set_lost(&mut self, reason: String) -> Error {
        log::warn!("the agent is lost: {reason}");
        self.lost = Some(reason.clone());
        Error::AgentLost { reason }
    }

    /// The request cannot be sent.
    fn send_failed(&mut self, request: u32, error: &SocketError) -> Error {
        let cause = match error {
            SocketError::PartlySent { source, .. } => source,
            error => error,
        };
        match cause {
            SocketError::Closed => self.closed(request),
            SocketError::Timeout { waited, .. } => {
                let waited = rounded(*waited);
                self.give_up(format!("it has not read {} within {waited}", name(request)))
            }
            _ => self.give_up(format!("{} cannot be sent: {}", name(request), chain(error))),
        }
    }

    /// The answer cannot be read.
    fn answer_failed(&mut self, request: u32, error: &SocketError) -> Error {
        match error {
            SocketError::Closed | SocketError::ClosedInFrame { .. } => self.closed(request),
            _ => {
                let why = chain(error);
                self.give_up(format!("the answer to {} cannot be read: {why}", name(request)))
            }
        }
    }

    /// The agent ended the connection. It is about to exit and is not killed yet.
    fn closed(&mut self, request: u32) -> Error {
        self.link.shut_down();
        let ended = self.link.end_in_words().unwrap_or_default();
        self.set_lost(format!("{ended} and has not answered {}", name(request)))
    }

    /// Sends one of our requests and waits for its answer, whose fields `fields` reads.
    ///
    /// # Errors
    /// [`Error::Refused`] with the agent's sentence, or [`Error::AgentLost`].
    pub(crate) fn request<T>(
        &mut self, request: &Request, fds: &[BorrowedFd<'_>],
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Error> {
        let frame = self.round_trip(request.code(), 0, &request.encode(), fds)?;
        self.read_answer(request.code(), &frame, fields)
    }

    /// The same for a request whose answer carries a descriptor. Only an agent that knows clones
    /// knows such requests.
    pub(crate) fn request_with_fd<T>(
        &mut self, request: &Request,
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<(T, OwnedFd), Error> {
        if let (false, None) = (self.knows_clones, &self.lost) {
            return Err(Error::NoClones);
        }
        let mut frame = self.round_trip(request.code(), 0, &request.encode(), &[])?;
        let fields = self.read_answer(request.code(), &frame, fields)?;
        match (frame.fds.pop(), frame.fds.len()) {
            (Some(fd), 0) => Ok((fields, fd)),
            _ => {
                let name = name(request.code());
                Err(self.give_up(format!("the answer to {name} has not 1 file descriptor")))
            }
        }
    }

    fn read_answer<T>(
        &mut self, request: u32, frame: &Frame,
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Error> {
        match decode_reply(&frame.body, fields) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refused)) => {
                Err(Error::Refused { code: refused.code, sentence: refused.sentence })
            }
            Err(malformed) => Err(self.give_up(malformed_answer(request, &malformed))),
        }
    }

    /// Hands a block to the agent.
    pub(crate) fn add_block(&mut self, block: &Block, flags: u32) -> Result<BlockAdded, Error> {
        let request = |flags| Request::AddBlock {
            geometry: block.geometry.clone(),
            fd_offset: block.fd_offset,
            vmm_address: block.vmm_address,
            flags,
        };
        let fds = [block.memory.as_fd(), block.discarded_fd.as_fd(), block.owed_fd.as_fd()];
        let fds = &fds[..if self.knows_owed { 3 } else { 2 }];
        let reply = match &block.private {
            None => self.request(&request(flags), fds, AddBlockReply::decode)?,
            Some(_) if !(self.knows_clones && self.knows_owed) && self.lost.is_none() => {
                return Err(Error::NoClones);
            }
            Some(private) => {
                let (service, agents) = Service::start(&private.memory)?;
                let view = [private.view.memory.as_fd(), private.view.pagemap.as_fd()];
                let fds = [fds, &view, &[agents.as_fd()]].concat();
                let added =
                    self.request(&request(flags | BLOCK_CLONE), &fds, AddBlockReply::decode)?;
                self.link.add_service(block.geometry.id, service);
                added
            }
        };
        Ok(BlockAdded { host_page_size: reply.host_page_size, sealed: reply.sealed != 0 })
    }

    /// Allows an agent in a sandbox what the descriptors stand for.
    pub(crate) fn grant(&mut self, grants: &[OwnedFd]) -> Result<(), Error> {
        if !self.wants_grants || grants.is_empty() {
            return Ok(());
        }
        let fds: Vec<BorrowedFd<'_>> = grants.iter().map(AsFd::as_fd).collect();
        self.request(&Request::Grant, &fds, |_| Ok(()))
    }

    /// Has the agent continue the job of a lost agent: see [`Request::Continue`].
    pub(crate) fn continue_job(
        &mut self, kept: Kept, uffd: BorrowedFd<'_>,
    ) -> Result<JobStarted, Error> {
        if !self.knows_owed {
            return Err(Error::CannotContinue { why: "the agent is of an older version".into() });
        }
        self.grant(&kept.grants)?;
        let request = Request::Continue { journal: kept.journal };
        self.request(&request, &[uffd], JobStarted::decode)
    }

    /// As [`Control::request`], for a standard request of vhost-user, whose answer carries no
    /// result code.
    fn standard_request<T>(
        &mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>],
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Error> {
        let frame = self.round_trip(request, flags, body, fds)?;
        let mut decoder = Decoder::new(&frame.body);
        let value = fields(&mut decoder).and_then(|value| decoder.finish().map(|()| value));
        value.map_err(|malformed| self.give_up(malformed_answer(request, &malformed)))
    }

    fn round_trip(
        &mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>],
    ) -> Result<Frame, Error> {
        if let Some(lost) = self.lost_error() {
            return Err(lost);
        }
        let asked = Instant::now();
        if let Err(error) =
            self.socket.send_parts(request, flags, body, fds, deadline(self.timeout()))
        {
            return Err(self.send_failed(request, &error));
        }
        loop {
            let (timeout, waited) = (self.timeout(), asked.elapsed());
            // Wakes up at this interval, since the timeout may become shorter meanwhile.
            let look = deadline(timeout.saturating_sub(waited).min(BUSY_INTERVAL));
            let received = match self.socket.recv(look) {
                Err(SocketError::Timeout { .. }) => None,
                // An event. The client never subscribes, and ignores it; the answer is still due.
                Ok(frame) if frame.request == code::EVENT && !frame.is_reply() => None,
                received => Some(received),
            };
            match received {
                None if waited < timeout => {}
                None => {
                    let (name, waited) = (name(request), rounded(waited));
                    return Err(self.give_up(format!("it has not answered {name} within {waited}")));
                }
                Some(Ok(frame)) if frame.request == request && frame.is_reply() => {
                    return Ok(frame);
                }
                Some(Ok(frame)) => {
                    let (found, flags) = (frame.request, frame.flags);
                    let name = name(request);
                    return Err(self
                        .give_up(format!("{name} was answered by {found:#x}, flags {flags:#x}")));
                }
                Some(Err(error)) => {
                    return Err(self.answer_failed(request, &error));
                }
            }
        }
    }
}

fn malformed_answer(request: u32, error: &DecodeError) -> String {
    format!("the answer to {} is malformed: {error}", name(request))
}
