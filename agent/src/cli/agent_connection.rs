// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An operator's connection to a running agent.
//!
//! A command connects to the agent's control socket, sends requests, and reads the answers. After
//! it has subscribed, it reads events too.
//!
//! The agent has `TIMEOUT` to answer a request, and `EVENT_TIMEOUT` between two events. After that
//! the command fails and says that the agent hangs.

use pageferry_protocol::control::codec::{DecodeError, Decoder};
use pageferry_protocol::control::job::JobStatus;
use pageferry_protocol::control::reply::{HelloReply, decode_reply};
use pageferry_protocol::control::request::{CONTROL_VERSION, FEATURE_GRANTS, Request, code};
use pageferry_protocol::control::unix_path::connect_unix;
use pageferry_protocol::control::{FrameSocket, Grants, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest time that the agent may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time between two events before the command says that the agent hangs.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to an agent.
pub struct AgentConnection {
    socket: FrameSocket,
    /// The agent is in a sandbox.
    wants_grants: bool,
    /// It has answered.
    is_served: bool,
    /// The path on which the agent listens.
    path: PathBuf,
}

/// What a wait for an event returns.
pub enum Event {
    /// The status of the job has changed, or an interval has passed.
    Status(Box<JobStatus>),
    /// The descriptor that was given is readable.
    Interrupted,
    /// The time is over.
    TimedOut,
}

impl AgentConnection {
    /// Connects to the agent that listens on `path`, and says hello.
    ///
    /// # Errors
    /// If no agent listens there, or it does not answer. The error names the path.
    pub fn open(path: &Path) -> Result<Self, Box<dyn Error>> {
        let socket = connect_unix(path, Instant::now() + TIMEOUT);
        let socket =
            socket.map_err(|error| format!("no agent answers on {}: {error}", path.display()))?;
        let mut agent = Self {
            socket: socket.into(),
            wants_grants: false,
            is_served: false,
            path: path.to_owned(),
        };
        let (version_min, version_max) = (CONTROL_VERSION, CONTROL_VERSION);
        let name = String::new();
        let features = FEATURE_GRANTS;
        let hello = Request::Hello { version_min, version_max, features, agent: 0, name };
        let reply = agent.ask(&hello, HelloReply::decode)?;
        agent.is_served = true;
        agent.wants_grants = reply.features & FEATURE_GRANTS != 0;
        Ok(agent)
    }

    /// The path on which the agent listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the agent closes the connection. False if that takes longer than `timeout`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ends_within(&mut self, timeout: Duration) -> Result<bool, Box<dyn Error>> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.socket.try_recv() {
                Ok(Some(_)) => {}
                Ok(None) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(false);
                    }
                    readable(None, self.socket.as_fd(), left)?;
                }
                Err(_) => return Ok(true),
            }
        }
    }

    /// Allows an agent in a sandbox what the next request names.
    ///
    /// # Errors
    /// If the agent refuses, or does not answer. The error names the path.
    pub fn grant(&mut self, grants: &Grants) -> Result<(), Box<dyn Error>> {
        if !self.wants_grants || grants.is_empty() {
            return Ok(());
        }
        self.ask_with(&Request::Grant, &grants.fds(), |_| Ok(()))
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// If the agent refuses, or does not answer. The error names the path.
    pub fn ask<T>(
        &mut self, request: &Request,
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Box<dyn Error>> {
        self.ask_with(request, &[], fields)
    }

    fn ask_with<T>(
        &mut self, request: &Request, fds: &[BorrowedFd<'_>],
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Box<dyn Error>> {
        let deadline = Instant::now() + TIMEOUT;
        let body = request.encode();
        let sent = self.socket.send_parts(request.code(), 0, &body, fds, deadline);
        sent.map_err(|error| self.failed(error))?;
        loop {
            let reply = self.socket.recv(deadline).map_err(|error| self.failed(error))?;
            // Events may arrive before the answer.
            if reply.is_reply() && reply.request == request.code() {
                return Ok(decode_reply(&reply.body, fields)??);
            }
        }
    }

    /// Waits for the next event, until `interrupt` is readable or `until` is reached.
    ///
    /// # Errors
    /// If the agent ends or hangs. The error names the path.
    pub fn next_event(
        &mut self, interrupt: Option<BorrowedFd<'_>>, until: Option<Instant>,
    ) -> Result<Event, Box<dyn Error>> {
        let silent = Instant::now() + EVENT_TIMEOUT;
        loop {
            match self.socket.try_recv() {
                Ok(Some(frame)) if frame.request == code::EVENT => {
                    let status = JobStatus::decode(&mut Decoder::new(&frame.body))?;
                    return Ok(Event::Status(Box::new(status)));
                }
                Ok(Some(_)) => continue,
                Ok(None) => {}
                Err(SocketError::Closed) => {
                    return Err(format!("the agent on {} ended", self.path.display()).into());
                }
                Err(error) => return Err(self.failed(error)),
            }
            let now = Instant::now();
            if until.is_some_and(|until| now >= until) {
                return Ok(Event::TimedOut);
            }
            if now >= silent {
                return Err(self.hangs(EVENT_TIMEOUT));
            }
            let left = until.map_or(silent, |until| until.min(silent)) - now;
            if readable(interrupt, self.socket.as_fd(), left)? {
                return Ok(Event::Interrupted);
            }
        }
    }

    /// The error for the operator. It names the agent.
    fn failed(&self, error: SocketError) -> Box<dyn Error> {
        match error {
            SocketError::Timeout { waited, .. } => self.hangs(waited),
            error => {
                let (path, why) = (self.path.display(), crate::error::chain(&error));
                let is_refused = matches!(error, SocketError::Closed) && !self.is_served;
                let hint = if is_refused { ": it serves its own user and root alone" } else { "" };
                format!("the agent on {path}: {why}{hint}").into()
            }
        }
    }

    fn hangs(&self, waited: Duration) -> Box<dyn Error> {
        let (path, waited) = (self.path.display(), waited.as_secs());
        format!("the agent on {path} has not answered for {waited} s: it is stopped, or hangs")
            .into()
    }
}

/// Waits until one of the two is readable. True if it is `first`.
fn readable(
    first: Option<BorrowedFd<'_>>, second: BorrowedFd<'_>, timeout: Duration,
) -> Result<bool, Errno> {
    let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    let mut polled = vec![PollFd::from_borrowed_fd(second, PollFlags::IN)];
    polled.extend(first.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) => Ok(polled.get(1).is_some_and(|fd| !fd.revents().is_empty())),
        // A signal: its handler has made `first` readable, if this command handles it.
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}
