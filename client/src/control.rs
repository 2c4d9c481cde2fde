//! Requests to the agent and its answers, one at a time, over the control socket.
//!
//! Whoever breaks the protocol or its deadline is lost, for good: the socket is shut down, and so is the hook channel, so that a
//! hanging agent cannot keep the guest paused (law 8). There is no way back into step with a stream whose answers came too late,
//! other than a new connection.

use crate::error::Error;
use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder};
use pageferry_protocol::control::frame::FLAG_NEED_REPLY;
use pageferry_protocol::control::request::{CONTROL_VERSION, HelloReply, MAX_RANGES, Request, code, decode_reply};
use pageferry_protocol::control::{Frame, FrameSocket};
use pageferry_protocol::error::chain;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// `VHOST_USER_SET_LOG_BASE`.
const SET_LOG_BASE: u32 = 6;
/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;

/// One connection to an agent: what it takes to cut it from any thread, without a lock.
#[derive(Debug)]
pub(crate) struct Link {
    /// Tells this connection from those before and after it.
    pub(crate) id: u64,
    control: OwnedFd,
    hooks: OwnedFd,
}

impl Link {
    /// Ends both channels for both sides. What came before can still be read.
    pub(crate) fn cut(&self) {
        // Fails only where there is no connection any more.
        let _ = shutdown(&self.control, Shutdown::Both);
        self.cut_hooks();
    }

    /// Both sockets, to see when they end: control, and hooks.
    pub(crate) fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.control.as_fd(), self.hooks.as_fd()]
    }

    /// Ends the hook channel for both sides.
    pub(crate) fn cut_hooks(&self) {
        let _ = shutdown(&self.hooks, Shutdown::Both);
    }
}

/// A pair of connected sockets, close-on-exec.
pub(crate) fn socket_pair() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(Error::kernel("create a pair of sockets"))
}

/// The control socket, and whether it is of any use.
#[derive(Debug)]
pub(crate) struct Control {
    socket: FrameSocket,
    link: Arc<Link>,
    timeout: Duration,
    /// Most ranges that the agent takes in one request.
    pub(crate) max_ranges: usize,
    lost: Option<String>,
}

impl Control {
    /// Opens the connection: hello, the dirty log, the hook channel. Returns our end of that, too.
    pub(crate) fn open(
        socket: OwnedFd, log: BorrowedFd<'_>, log_bytes: u64, timeout: Duration,
    ) -> Result<(Self, OwnedFd), Error> {
        static LINKS: AtomicU64 = AtomicU64::new(0);
        let (hooks, agents_end) = socket_pair()?;
        let duplicate = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|source| Error::Kernel { what: "duplicate a socket", source: crate::block::errno(&source) })
        };
        let link =
            Link { id: LINKS.fetch_add(1, Ordering::Relaxed), control: duplicate(&socket)?, hooks: duplicate(&hooks)? };
        let mut control =
            Self { socket: socket.into(), link: Arc::new(link), timeout, max_ranges: MAX_RANGES, lost: None };

        let hello = Request::Hello { version_min: CONTROL_VERSION, version_max: CONTROL_VERSION, features: 0 };
        let reply = control.request(&hello, &[], HelloReply::decode)?;
        if reply.version != CONTROL_VERSION {
            return Err(control.lose(format!("version is {}, offered was {CONTROL_VERSION}", reply.version)));
        }
        if reply.max_ranges == 0 {
            return Err(control.lose("max_ranges is 0".to_owned()));
        }
        control.max_ranges = MAX_RANGES.min(reply.max_ranges as usize);

        let body = Encoder::new().u64(log_bytes).u64(0).finish();
        let taken = control.exchange(SET_LOG_BASE, 0, &body, &[log], |reply| {
            Ok((reply.u64("mmap_size")?, reply.u64("mmap_offset")?))
        })?;
        if taken != (log_bytes, 0) {
            let (size, offset) = taken;
            return Err(control.lose(format!(
                "it refused the dirty log of {log_bytes:#x} bytes: its answer is size {size:#x}, offset {offset:#x}"
            )));
        }
        match control
            .exchange(SET_BACKEND_REQ_FD, FLAG_NEED_REPLY, &[], &[agents_end.as_fd()], |reply| reply.u64("result"))?
        {
            0 => Ok((control, hooks)),
            code => Err(control.lose(format!("it refused the hook channel with code {code}"))),
        }
    }

    /// The connection.
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Why the agent is lost; `None` if it is not, as far as is known.
    pub(crate) fn lost(&self) -> Option<Error> {
        self.lost.clone().map(|reason| Error::AgentLost { reason })
    }

    /// Gives the agent up. Returns the error to hand out.
    pub(crate) fn lose(&mut self, reason: String) -> Error {
        // First of all: somebody may wait for this, and the VMM's logger is not ours to rely on.
        self.link.cut();
        log::warn!("the agent is lost: {reason}");
        self.lost = Some(reason.clone());
        Error::AgentLost { reason }
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
        match decode_reply(&frame.body, fields) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refused)) => Err(Error::Refused { code: refused.code, sentence: refused.sentence }),
            Err(malformed) => Err(self.lose(malformed_answer(request.code(), &malformed))),
        }
    }

    /// As [`Control::request`], for a standard request, whose answer carries no code of success.
    fn exchange<T>(
        &mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>],
        fields: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, Error> {
        let frame = self.round_trip(request, flags, body, fds)?;
        let mut decoder = Decoder::new(&frame.body);
        let value = fields(&mut decoder).and_then(|value| decoder.finish().map(|()| value));
        value.map_err(|malformed| self.lose(malformed_answer(request, &malformed)))
    }

    fn round_trip(&mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Frame, Error> {
        if let Some(lost) = self.lost() {
            return Err(lost);
        }
        let deadline = Instant::now() + self.timeout;
        if let Err(error) = self.socket.send_parts(request, flags, body, fds, deadline) {
            return Err(self.lose(format!("cannot send request {request:#x}: {}", chain(&error))));
        }
        loop {
            match self.socket.recv(deadline) {
                // What a subscriber gets. We never subscribe, and need not care who did.
                Ok(frame) if frame.request == code::EVENT && !frame.is_reply() => {}
                Ok(frame) if frame.request == request && frame.is_reply() => return Ok(frame),
                Ok(frame) => {
                    let (found, flags) = (frame.request, frame.flags);
                    return Err(self.lose(format!("request {request:#x} was answered by {found:#x}, flags {flags:#x}")));
                }
                Err(error) => {
                    return Err(self.lose(format!("no answer to request {request:#x}: {}", chain(&error))));
                }
            }
        }
    }
}

fn malformed_answer(request: u32, error: &DecodeError) -> String {
    format!("the answer to request {request:#x} is malformed: {error}")
}
