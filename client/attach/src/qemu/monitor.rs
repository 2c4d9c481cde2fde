// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QMP: the machine protocol of a QEMU monitor.
//!
//! One JSON object a line, in both directions: a greeting, commands and their answers, and events
//! in between. This side sends one command at a time and keeps the events that arrive meanwhile.
//!
//! A connection that breaks while QEMU lives is replaced at the next command: a guest that a job
//! has paused must be resumed, and nobody else would. Events of the old connection are lost, so
//! whoever waits for one fails, and so does a command that was under way, unless it only asks. QEMU
//! serves one client at a time, and takes the next when the last is gone.
//!
//! Source: `docs/interop/qmp-spec.rst` in QEMU.

use pageferry_protocol::control::unix_path::connect_unix;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest time for the answer to a command. QEMU answers in milliseconds, but its main loop waits
/// for disks, and for the processor of a busy host.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time for the greeting. A monitor greets at once if it has no other client.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest line. The largest answers are those of `info mtree`, with some hundred kilobytes.
const MAX_LINE: usize = 64 << 20;
/// Events that are kept for who asks for them later. Older ones are dropped.
const MAX_EVENTS: usize = 1024;

/// Why QEMU cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Nobody listens at the socket.
    #[error("cannot connect to the monitor at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The monitor does not greet.
    #[error(
        "the monitor at {} does not greet: another program uses it, such as libvirt, or it is not a QMP \
         monitor. Start QEMU with one more: -qmp unix:PATH,server=on,wait=off", path.display()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke: QEMU has exited, or has closed it. The next command connects again.
    #[error("the connection to QEMU's monitor broke")]
    Broken {
        /// What the kernel said; nothing if QEMU has closed it.
        #[source]
        source: Option<std::io::Error>,
    },
    /// Another process than this QEMU listens at the socket, after the connection broke.
    #[error("another process than QEMU listens at {}, the path of its monitor", path.display())]
    OtherProcess {
        /// The socket.
        path: PathBuf,
    },
    /// The answer did not come in time.
    #[error("QEMU did not answer {command} within {ANSWER_TIMEOUT:?}")]
    Silent {
        /// The command.
        command: String,
    },
    /// QEMU refuses the command.
    #[error("QEMU refuses {command}: {sentence}")]
    Refused {
        /// The command.
        command: String,
        /// What QEMU said.
        sentence: String,
    },
    /// QEMU said something that is not QMP.
    #[error("QEMU's monitor said something else than {expected}: {said}")]
    Unexpected {
        /// What was expected.
        expected: &'static str,
        /// The beginning of what it said.
        said: String,
    },
}

impl MonitorError {
    fn unexpected(expected: &'static str, said: impl ToString) -> Self {
        Self::Unexpected { expected, said: said.to_string().chars().take(200).collect() }
    }
}

/// An event of QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// What comes with it.
    pub content: Value,
}

/// A connection to a monitor.
#[derive(Debug)]
pub struct Monitor {
    /// Where it listens.
    path: PathBuf,
    socket: UnixStream,
    /// The connection has failed, and nothing more is to be read from it.
    is_broken: bool,
    /// What was read and is not a whole line yet.
    received: Vec<u8>,
    /// Bytes of `received` that have no end of line.
    searched: usize,
    events: std::collections::VecDeque<Event>,
    commands: u64,
}

impl Monitor {
    /// Connects to the QMP monitor that listens at `path`, and leaves its negotiation mode.
    ///
    /// # Errors
    /// If nobody listens there, or it does not greet.
    pub fn connect(path: &Path) -> Result<Self, MonitorError> {
        let mut this = Self::greeted(path)?;
        this.command("qmp_capabilities", Value::Null)?;
        Ok(this)
    }

    /// A connection whose monitor has greeted.
    fn greeted(path: &Path) -> Result<Self, MonitorError> {
        // A monitor that others wait for takes no connection.
        let connected = connect_unix(path, Instant::now() + GREETING_TIMEOUT);
        let socket = connected
            .map(UnixStream::from)
            .map_err(|source| MonitorError::Connect { path: path.to_owned(), source })?;
        let broken = |source| MonitorError::Broken { source: Some(source) };
        socket.set_nonblocking(true).map_err(broken)?;
        let (received, events) = (Vec::new(), Default::default());
        let (path, is_broken) = (path.to_owned(), false);
        let mut this = Self { path, socket, is_broken, received, searched: 0, events, commands: 0 };
        let greeting = this.line(Instant::now() + GREETING_TIMEOUT)?;
        let greeting =
            greeting.ok_or_else(|| MonitorError::NoGreeting { path: this.path.clone() })?;
        if greeting.get("QMP").is_none() {
            return Err(MonitorError::unexpected("a greeting", greeting));
        }
        Ok(this)
    }

    /// Replaces a connection that has broken.
    fn reconnect(&mut self) -> Result<(), MonitorError> {
        let before = self.process();
        let mut next = Self::greeted(&self.path)?;
        if next.process() != before {
            return Err(self.of_other_process());
        }
        // An answer to an old command cannot come any more, so their ids may come again.
        next.exchange("qmp_capabilities", Value::Null, None)?;
        log::warn!("the connection to QEMU's monitor broke, and was made again");
        *self = next;
        Ok(())
    }

    /// Another process than the one that was expected listens here.
    pub(super) fn of_other_process(&self) -> MonitorError {
        MonitorError::OtherProcess { path: self.path.clone() }
    }

    /// The process that listens for this monitor: QEMU.
    pub fn process(&self) -> Option<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.socket).ok()?;
        u32::try_from(peer.pid.as_raw_pid()).ok()
    }

    /// Sends a command and returns QEMU's answer. `arguments` is an object, or null.
    ///
    /// # Errors
    /// If QEMU refuses it, does not answer in time, or has exited.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.command_with(name, arguments, None)
    }

    /// The same for a command that takes a descriptor (`getfd`).
    ///
    /// # Errors
    /// As [`Monitor::command`].
    pub fn command_with_fd(
        &mut self, name: &str, arguments: Value, fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        self.command_with(name, arguments, Some(fd))
    }

    /// Runs a command of the human monitor. Returns its text.
    ///
    /// # Errors
    /// As [`Monitor::command`].
    pub fn human(&mut self, line: &str) -> Result<String, MonitorError> {
        let answer = self.command("human-monitor-command", json!({ "command-line": line }))?;
        match answer {
            Value::String(text) => Ok(text),
            other => Err(MonitorError::unexpected("a text", other)),
        }
    }

    fn command_with(
        &mut self, name: &str, arguments: Value, fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, MonitorError> {
        if self.is_broken {
            self.reconnect()?;
        } else if asks_only(name) {
            match self.exchange(name, arguments.clone(), fd) {
                Err(MonitorError::Broken { .. }) => self.reconnect()?,
                answered => return answered,
            }
        }
        self.exchange(name, arguments, fd)
    }

    fn exchange(
        &mut self, name: &str, arguments: Value, fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, MonitorError> {
        self.commands += 1;
        let id = self.commands;
        let mut command = json!({ "execute": name, "id": id });
        if !arguments.is_null() {
            command["arguments"] = arguments;
        }
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let silent = || MonitorError::Silent { command: name.to_owned() };
        if !self.send(format!("{command}\n").as_bytes(), fd, deadline)? {
            return Err(silent());
        }
        loop {
            let mut said = self.line(deadline)?.ok_or_else(silent)?;
            // An answer to an earlier command that came too late has another id.
            if said.get("id").and_then(Value::as_u64) != Some(id) {
                self.keep_event(said);
                continue;
            }
            if let Some(error) = said.get("error") {
                let sentence = error.get("desc").and_then(Value::as_str).unwrap_or("no reason");
                return Err(MonitorError::Refused {
                    command: name.to_owned(),
                    sentence: sentence.to_owned(),
                });
            }
            return match said.get_mut("return") {
                Some(answer) => Ok(answer.take()),
                None => Err(MonitorError::unexpected("an answer", said)),
            };
        }
    }

    fn keep_event(&mut self, mut said: Value) {
        let Some(name) = said.get("event").and_then(Value::as_str).map(str::to_owned) else {
            log::debug!("QEMU said {said}");
            return;
        };
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        let content = said.get_mut("data").map_or(Value::Null, Value::take);
        self.events.push_back(Event { name, content });
    }

    /// Waits until QEMU sends an event that `is_wanted` accepts, and returns it. Other events are
    /// kept. `None` if it does not come until the deadline.
    ///
    /// # Errors
    /// If QEMU has exited.
    pub fn wait_for_event(
        &mut self, deadline: Instant, is_wanted: impl Fn(&Event) -> bool,
    ) -> Result<Option<Event>, MonitorError> {
        loop {
            if let Some(at) = self.events.iter().position(&is_wanted) {
                return Ok(self.events.remove(at));
            }
            match self.line(deadline)? {
                Some(said) => self.keep_event(said),
                None => return Ok(None),
            }
        }
    }

    /// Forgets the events with this name that have arrived so far.
    ///
    /// # Errors
    /// If QEMU has exited.
    pub fn forget_events(&mut self, name: &str) -> Result<(), MonitorError> {
        while let Some(said) = self.line(Instant::now())? {
            self.keep_event(said);
        }
        self.events.retain(|event| event.name != name);
        Ok(())
    }

    /// The connection is of no use any more. QEMU takes the next one when it has noticed.
    fn broken(&mut self, source: Option<std::io::Error>) -> MonitorError {
        self.is_broken = true;
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        MonitorError::Broken { source }
    }

    /// Sends all bytes, with the descriptor beside the first. False if QEMU reads too slowly.
    fn send(
        &mut self, bytes: &[u8], fd: Option<BorrowedFd<'_>>, deadline: Instant,
    ) -> Result<bool, MonitorError> {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let rest = [IoSlice::new(&bytes[sent..])];
            match rustix::net::sendmsg(&self.socket, &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.poll(PollFlags::OUT, deadline)? {
                        return Ok(false);
                    }
                }
                Err(errno) => return Err(self.broken(Some(errno.into()))),
            }
        }
        Ok(true)
    }

    /// The next line. `None` if there is none until the deadline.
    fn line(&mut self, deadline: Instant) -> Result<Option<Value>, MonitorError> {
        loop {
            let end = self.received[self.searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let line: Vec<u8> = self.received.drain(..=self.searched + end).collect();
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let parsed = serde_json::from_slice(&line);
                return parsed
                    .map(Some)
                    .map_err(|_| MonitorError::unexpected("JSON", String::from_utf8_lossy(&line)));
            }
            self.searched = self.received.len();
            if self.received.len() > MAX_LINE {
                let said = String::from_utf8_lossy(&self.received[..200]).into_owned();
                return Err(MonitorError::unexpected("a line of at most 64 MiB", said));
            }
            let mut buffer = [0; 16 << 10];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(self.broken(None)),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.poll(PollFlags::IN, deadline)? {
                        return Ok(None);
                    }
                }
                Err(source) => return Err(self.broken(Some(source))),
            }
        }
    }

    fn poll(&self, flags: PollFlags, deadline: Instant) -> Result<bool, MonitorError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.socket, flags)], left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(MonitorError::Broken { source: Some(errno.into()) }),
            }
        }
    }
}

/// True if this command changes nothing, so that it may be sent twice. The human monitor is only
/// asked (`info`).
fn asks_only(command: &str) -> bool {
    command.starts_with("query-")
        || ["qom-list", "qom-get", "human-monitor-command"].contains(&command)
}

#[cfg(test)]
pub(super) mod test_support;
#[cfg(test)]
mod tests;
