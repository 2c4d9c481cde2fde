// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's end of the socket to its opener.
//!
//! Each request brings a socket of its own for the answer. So any number of threads may ask at
//! once, and one that waits for a slow disk or a name server holds up no other.

use super::wire::{Op, Reply};
use crate::inherited;
use crate::lock::lock;
use crate::waiting::may_wait;
use pageferry_protocol::control::socket::wait;
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Longest time until the opener takes a request. It does nothing else but to take them.
const SEND: Duration = Duration::from_secs(10);
/// Longest time until it answers: a disk or a name server may be slow. It still does later what was
/// asked.
const ANSWER: Duration = Duration::from_secs(60);
/// The same once the agent ends.
const LAST_ANSWER: Duration = Duration::from_secs(5);
/// How often a thread that waits looks whether the agent ends.
const LOOK: Duration = Duration::from_millis(250);

/// A socket to an opener.
#[derive(Debug)]
pub struct Channel {
    socket: Mutex<FrameSocket>,
    /// When the agent has begun to end.
    ends: OnceLock<Instant>,
    /// It has begun to end, and the opener has not answered since.
    hangs: AtomicBool,
}

impl Channel {
    /// The agent's end of a pair of which an opener has the other one.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Mutex::new(socket.into()),
            ends: OnceLock::new(),
            hangs: AtomicBool::new(false),
        }
    }

    /// The agent ends: nobody waits long for an opener that does not answer.
    pub fn hurry(&self) {
        self.ends.get_or_init(Instant::now);
    }

    /// Lets the program have the socket that this process executes next. Returns the value of a
    /// variable for it ([`inherited`]).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn inherit(&self) -> io::Result<String> {
        inherited::hand_over(lock(&self.socket).as_fd())
    }

    /// Has the opener remember what the descriptors name.
    ///
    /// # Errors
    /// [`Errno::INVAL`] or [`Errno::NOTDIR`] if one of them names nothing.
    pub fn grant(&self, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.done(&Op::Grant, fds)
    }

    /// The same, for what the options of the agent name.
    ///
    /// # Errors
    /// As [`Channel::grant`].
    pub fn grant_for_good(&self, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.done(&Op::GrantForGood, fds)
    }

    /// Asks for something that has no result.
    pub(super) fn done(&self, op: &Op, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.ask(op, fds).map(drop)
    }

    /// Asks for a descriptor.
    pub(super) fn descriptor(&self, op: &Op, fds: &[BorrowedFd<'_>]) -> Result<OwnedFd, Errno> {
        self.ask(op, fds)?.1.into_iter().next().ok_or(Errno::PROTO)
    }

    /// Asks for two descriptors.
    pub(super) fn pair(&self, op: &Op) -> io::Result<(OwnedFd, OwnedFd)> {
        let mut fds = self.told(op)?.1.into_iter();
        fds.next().zip(fds.next()).ok_or_else(|| Errno::PROTO.into())
    }

    /// Asks for the addresses of a name.
    pub(super) fn addresses(&self, name: &str) -> io::Result<Vec<SocketAddr>> {
        Ok(self.told(&Op::LookUp { name: name.to_owned() })?.0.addresses)
    }

    /// Asks for something that can fail in words.
    fn told(&self, op: &Op) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let answer = self.exchange(op, &[])?;
        match &answer.0 {
            Reply { errno: 0, .. } => Ok(answer),
            Reply { sentence, .. } if !sentence.is_empty() => Err(io::Error::other(&**sentence)),
            Reply { errno, .. } => Err(io::Error::from_raw_os_error(*errno)),
        }
    }

    fn ask(&self, op: &Op, fds: &[BorrowedFd<'_>]) -> Result<(Reply, Vec<OwnedFd>), Errno> {
        let answer = self.exchange(op, fds)?;
        match answer.0.errno {
            0 => Ok(answer),
            errno => {
                let errno = Errno::from_raw_os_error(errno);
                // The opener tells nobody what there is. But this process may see that.
                let missing = |path| rustix::fs::stat(path).err() == Some(Errno::NOENT);
                if errno == Errno::ACCESS && op.needs().is_some_and(missing) {
                    return Err(Errno::NOENT);
                }
                if errno == Errno::ACCESS && !matches!(op, Op::IsNamed { .. }) {
                    log::warn!(
                        "cannot {op}: its user may not, or nobody has named its folder or address \
                         (--folder; docs/sandbox.md)"
                    );
                }
                Err(errno)
            }
        }
    }

    fn exchange(&self, op: &Op, fds: &[BorrowedFd<'_>]) -> Result<(Reply, Vec<OwnedFd>), Errno> {
        may_wait("ask the opener");
        self.send_and_wait(op, fds).inspect_err(|errno| match *errno {
            Errno::PIPE => log::error!(
                "the opener of this agent is gone: it reaches no other file and no other host. \
                 Start a new agent as soon as its job allows that"
            ),
            Errno::TIMEDOUT => log::error!(
                "the opener of this agent has not answered in time: it is stopped, or a disk or a \
                 name server hangs: {op}"
            ),
            _ => {}
        })
    }

    fn send(&self, op: &Op, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let socket = lock(&self.socket);
        let until = Instant::now() + SEND;
        socket.send_parts(op.code(), 0, &op.encode(), fds, until).map_err(|error| match error {
            SocketError::Timeout { .. } => Errno::TIMEDOUT,
            SocketError::PartlySent { .. } => {
                // What follows would be taken for the rest.
                let _ = rustix::net::shutdown(socket.as_fd(), rustix::net::Shutdown::Both);
                Errno::TIMEDOUT
            }
            _ => Errno::PIPE,
        })
    }

    fn send_and_wait(
        &self, op: &Op, fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), Errno> {
        let (ours, openers) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let sent = [openers.as_fd()].into_iter().chain(fds.iter().copied()).collect::<Vec<_>>();
        let gone = |_| Errno::PIPE;
        self.send(op, &sent)?;
        drop(openers);
        let mut answer = FrameSocket::from(ours);
        let asked = Instant::now();
        loop {
            match answer.try_recv().map_err(gone)? {
                Some(frame) => {
                    self.hangs.store(false, Ordering::Relaxed);
                    let reply = Reply::decode(&frame.body).map_err(|_| Errno::PROTO)?;
                    return Ok((reply, frame.fds));
                }
                // If the opener ends, its end of the pair closes.
                None => {
                    let now = Instant::now();
                    let until = match self.ends.get() {
                        None => asked + ANSWER,
                        Some(_) if self.hangs.load(Ordering::Relaxed) => asked + LOOK,
                        Some(ends) => asked.max(*ends) + LAST_ANSWER,
                    };
                    if now >= until {
                        self.hangs.store(self.ends.get().is_some(), Ordering::Relaxed);
                        return Err(Errno::TIMEDOUT);
                    }
                    wait(answer.as_fd(), PollFlags::IN, until.min(now + LOOK))?;
                }
            }
        }
    }
}
