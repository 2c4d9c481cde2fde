// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's end of the socket to its opener.
//!
//! Each request brings a socket of its own for the answer. So any number of threads may ask at
//! once, and one that waits for a slow disk or a name server holds up no other.

use super::wire::{Op, Reply};
use crate::inherited;
use crate::lock::lock;
use crate::waiting::may_wait;
use pageferry_protocol::control::FrameSocket;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Longest time until the opener takes a request. It does nothing else but to take them.
const SEND: Duration = Duration::from_secs(10);
/// How often the thread that waits for an answer looks whether it has waited for ever.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A socket to an opener.
#[derive(Debug)]
pub struct Channel(Mutex<FrameSocket>);

impl Channel {
    /// The agent's end of a pair of which an opener has the other one.
    pub fn new(socket: OwnedFd) -> Self {
        Self(Mutex::new(socket.into()))
    }

    /// Lets the program have the socket that this process executes next. Returns the value of a
    /// variable for it ([`inherited`]).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn inherit(&self) -> io::Result<String> {
        inherited::hand_over(lock(&self.0).as_fd())
    }

    /// Has the opener remember what the descriptors name.
    ///
    /// # Errors
    /// [`Errno::INVAL`] or [`Errno::NOTDIR`] if one of them names nothing.
    pub fn grant(&self, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.done(&Op::Grant, fds)
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
        let mut fds = self.ask(op, &[])?.1.into_iter();
        fds.next().zip(fds.next()).ok_or_else(|| Errno::PROTO.into())
    }

    /// Asks for the addresses of a name.
    pub(super) fn addresses(&self, name: &str) -> io::Result<Vec<SocketAddr>> {
        match self.exchange(&Op::LookUp { name: name.to_owned() }, &[])?.0 {
            Reply { errno: 0, addresses, .. } => Ok(addresses),
            Reply { sentence, .. } if !sentence.is_empty() => Err(io::Error::other(sentence)),
            Reply { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
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
        self.send_and_wait(op, fds).inspect_err(|errno| {
            if *errno == Errno::PIPE {
                log::error!("the opener of this agent is gone: no other file or host is reached");
            }
        })
    }

    fn send_and_wait(
        &self, op: &Op, fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), Errno> {
        let (ours, openers) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let sent = [openers.as_fd()].into_iter().chain(fds.iter().copied()).collect::<Vec<_>>();
        let gone = |_| Errno::PIPE;
        let until = Instant::now() + SEND;
        lock(&self.0).send_parts(op.code(), 0, &op.encode(), &sent, until).map_err(gone)?;
        drop(openers);
        let mut answer = FrameSocket::from(ours);
        loop {
            match answer.try_recv().map_err(gone)? {
                Some(frame) => {
                    let reply = Reply::decode(&frame.body).map_err(|_| Errno::PROTO)?;
                    return Ok((reply, frame.fds));
                }
                // If the opener ends, its end of the pair closes.
                None => {
                    let until = Instant::now() + LONGEST_WAIT;
                    pageferry_protocol::control::socket::wait(
                        answer.as_fd(),
                        PollFlags::IN,
                        until,
                    )?;
                }
            }
        }
    }
}
