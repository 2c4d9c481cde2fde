// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames with file descriptors over a UNIX stream socket.
//!
//! A [`FrameSocket`] reads exactly a header and then exactly its body, and never past the end of a
//! frame. So the descriptors that arrive belong to the frame that is being read, and a frame may
//! arrive in any number of pieces. It takes no lock and starts no thread.

use super::frame::{Frame, FrameHeader, HEADER_SIZE, HeaderError, MAX_FDS};
use super::receive::receive;
use crate::error::rounded;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, IntoBytes};

/// Why a frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other side closed the connection between two frames.
    #[error("the other side closed the connection")]
    Closed,
    /// The other side closed the connection inside a frame.
    #[error("the connection ended inside a frame, {missing} bytes before its end")]
    ClosedInFrame {
        /// Bytes of the header or body that did not come.
        missing: usize,
    },
    /// Nothing arrived, or nothing could be sent, until the deadline.
    #[error("no {what} within {}", rounded(*waited))]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The header is not valid.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The connection ended, or accepted no more, inside a frame that this side was sending.
    #[error("the connection took {sent} of the {total} bytes of a frame")]
    PartlySent {
        /// Bytes that were sent.
        sent: usize,
        /// Bytes of the frame.
        total: usize,
        /// What stopped it.
        #[source]
        source: Box<SocketError>,
    },
    /// More descriptors than a frame may carry.
    #[error("{count} file descriptors with one frame, allowed are {MAX_FDS}")]
    TooManyFds {
        /// How many came, at least.
        count: usize,
    },
    /// The kernel could not give this process all descriptors of a frame. The frame was read to its
    /// end, so the next one can be received.
    #[error(
        "file descriptors of request {:#x} did not arrive ({} did): this process is out of file \
         descriptors (RLIMIT_NOFILE)", frame.request, frame.fds.len()
    )]
    LostFds {
        /// The frame, with the descriptors that did arrive.
        frame: Box<Frame>,
    },
    /// The kernel refused.
    #[error("socket error")]
    Kernel(#[from] Errno),
}

impl SocketError {
    /// True if the socket can still be used: both sides agree where the next frame begins.
    pub fn keeps_framing(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::LostFds { .. } | Self::Kernel(_) => true,
            Self::Closed
            | Self::ClosedInFrame { .. }
            | Self::PartlySent { .. }
            | Self::Header(_)
            | Self::TooManyFds { .. } => false,
        }
    }
}

/// A connected UNIX stream socket that carries frames. Reading can continue after a timeout.
#[derive(Debug)]
pub struct FrameSocket {
    /// Shared with the threads that may end the connection.
    fd: Arc<OwnedFd>,
    header: FrameHeader,
    /// Bytes of the header and then of the body that have arrived.
    have: usize,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Descriptors of the current frame did not arrive.
    lost_fds: bool,
    /// Process id of the last sender, if the kernel reports it.
    sender: Option<i32>,
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for FrameSocket {
    fn from(fd: OwnedFd) -> Self {
        Arc::new(fd).into()
    }
}

impl From<Arc<OwnedFd>> for FrameSocket {
    fn from(fd: Arc<OwnedFd>) -> Self {
        Self {
            fd,
            header: FrameHeader::new_zeroed(),
            have: 0,
            body: Vec::new(),
            fds: Vec::new(),
            lost_fds: false,
            sender: None,
        }
    }
}

impl FrameSocket {
    /// Makes the kernel report which process sends each following message (`SO_PASSCRED`), or stops
    /// that.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn report_sender(&self, ask: bool) -> Result<(), Errno> {
        rustix::net::sockopt::set_socket_passcred(&self.fd, ask)
    }

    /// The process that sent the last frame, as a process id in this PID namespace; see
    /// [`FrameSocket::report_sender`]. The kernel vouches for it, except that a sender with
    /// CAP_SYS_ADMIN may name another process. It is not a valid process id if the sender is not
    /// visible from here, in another PID namespace.
    pub fn sender(&self) -> Option<i32> {
        self.sender
    }

    /// True if a part of a frame has arrived, but not all of it.
    pub fn is_inside_frame(&self) -> bool {
        self.have > 0
    }

    /// The next frame if all of it is here, without waiting.
    ///
    /// # Errors
    /// [`SocketError::LostFds`] in place of a frame whose descriptors did not all arrive; the next
    /// call reads the next frame. Other errors if the connection ended or the header is wrong; the
    /// socket is then of no use.
    pub fn try_recv(&mut self) -> Result<Option<Frame>, SocketError> {
        loop {
            if self.have < HEADER_SIZE {
                let mut bytes = [0u8; HEADER_SIZE];
                bytes[..self.have].copy_from_slice(&self.header.as_bytes()[..self.have]);
                let Some(read) = self.read_some(&mut bytes[self.have..])? else { return Ok(None) };
                self.header.as_mut_bytes().copy_from_slice(&bytes);
                self.have += read;
                if self.have == HEADER_SIZE {
                    self.header.check()?;
                    self.body = vec![0; self.header.size.get() as usize];
                }
            } else if self.have < HEADER_SIZE + self.body.len() {
                let at = self.have - HEADER_SIZE;
                let mut body = std::mem::take(&mut self.body);
                let read = self.read_some(&mut body[at..]);
                self.body = body;
                let Some(read) = read? else { return Ok(None) };
                self.have += read;
            } else {
                self.have = 0;
                let frame = Frame {
                    request: self.header.request.get(),
                    flags: self.header.flags.get() & !3,
                    body: std::mem::take(&mut self.body),
                    fds: std::mem::take(&mut self.fds),
                };
                if std::mem::take(&mut self.lost_fds) {
                    return Err(SocketError::LostFds { frame: Box::new(frame) });
                }
                return Ok(Some(frame));
            }
        }
    }

    /// The next frame, waiting for it until `deadline`.
    ///
    /// # Errors
    /// As [`FrameSocket::try_recv`], and [`SocketError::Timeout`]; reading may go on after that
    /// one.
    pub fn recv(&mut self, deadline: Instant) -> Result<Frame, SocketError> {
        let started = Instant::now();
        loop {
            if let Some(frame) = self.try_recv()? {
                return Ok(frame);
            }
            if !wait(self.fd.as_fd(), PollFlags::IN, deadline)? {
                return Err(SocketError::Timeout { what: "frame", waited: started.elapsed() });
            }
        }
    }

    /// Sends a whole frame. Waits for room until `deadline`.
    ///
    /// # Errors
    /// If the connection ended or there is no room in time. [`SocketError::PartlySent`] if a part
    /// of the frame was sent by then: drop the socket.
    pub fn send(&self, frame: &Frame, deadline: Instant) -> Result<(), SocketError> {
        let fds: Vec<BorrowedFd<'_>> = frame.fds.iter().map(AsFd::as_fd).collect();
        self.send_parts(frame.request, frame.flags, &frame.body, &fds, deadline)
    }

    /// Sends a frame from its parts, with descriptors that the caller keeps.
    ///
    /// # Errors
    /// As [`FrameSocket::send`].
    pub fn send_parts(
        &self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>], deadline: Instant,
    ) -> Result<(), SocketError> {
        let started = Instant::now();
        let header = FrameHeader::new(request, flags, body.len());
        header.check()?;
        if fds.len() > MAX_FDS {
            return Err(SocketError::TooManyFds { count: fds.len() });
        }
        let total = HEADER_SIZE + body.len();
        let mut sent = 0;
        let failed = |sent: usize, error: SocketError| match sent {
            0 => error,
            _ => SocketError::PartlySent { sent, total, source: Box::new(error) },
        };
        while sent < total {
            let head = &header.as_bytes()[sent.min(HEADER_SIZE)..];
            let tail = &body[sent.saturating_sub(HEADER_SIZE)..];
            let attached = if sent == 0 { fds } else { &[] };
            match send_some(self.fd.as_fd(), &[IoSlice::new(head), IoSlice::new(tail)], attached) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let room = wait(self.fd.as_fd(), PollFlags::OUT, deadline);
                    if !room.map_err(|errno| failed(sent, errno.into()))? {
                        let waited = started.elapsed();
                        return Err(failed(
                            sent,
                            SocketError::Timeout { what: "room to send", waited },
                        ));
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(SocketError::Closed),
                Err(errno) => return Err(failed(sent, errno.into())),
            }
        }
        Ok(())
    }

    /// Ends the connection for both sides and wakes all threads that wait on it, even if other
    /// descriptors of it are open.
    pub fn shutdown(&self) {
        // Fails only if it is not connected any more, which is what we want.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, SocketError> {
        let missing = buffer.len();
        let received = loop {
            match receive(self.fd.as_fd(), buffer) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) => break None,
                Err(errno) => return Err(errno.into()),
                Ok(received) => break Some(received),
            }
        };
        let Some(received) = received else {
            return Err(if self.have == 0 {
                SocketError::Closed
            } else {
                SocketError::ClosedInFrame { missing }
            });
        };
        self.fds.extend(received.fds);
        self.sender = received.sender.or(self.sender);
        // The buffer holds as many as a frame may carry, so it was full if more were sent.
        if self.fds.len() > MAX_FDS || (received.cut && self.fds.len() == MAX_FDS) {
            return Err(SocketError::TooManyFds { count: self.fds.len().max(MAX_FDS + 1) });
        }
        // The bytes that came with them are consumed, so the frame is read to its end.
        self.lost_fds |= received.cut;
        match received.bytes {
            0 if self.have == 0 => Err(SocketError::Closed),
            0 => Err(SocketError::ClosedInFrame { missing }),
            bytes => Ok(Some(bytes)),
        }
    }
}

fn send_some(
    socket: BorrowedFd<'_>, parts: &[IoSlice<'_>], fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(socket, parts, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

/// Waits until `fd` is ready for `events` or broken; false if the deadline came first.
///
/// # Errors
/// If the kernel cannot poll.
pub fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (FrameSocket, FrameSocket) {
        let (a, b) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        (a.into(), b.into())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn frames_and_their_descriptors_stay_together() {
        let (a, mut b) = pair();
        let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        a.send_parts(7, 0, b"first", &[file.as_fd(), file.as_fd()], soon()).unwrap();
        a.send_parts(8, FLAG, b"", &[], soon()).unwrap();
        a.send_parts(9, 0, &[1; 70_000], &[file.as_fd()], soon()).unwrap();
        let first = b.recv(soon()).unwrap();
        assert_eq!((first.request, first.body.as_slice(), first.fds.len()), (7, &b"first"[..], 2));
        for fd in &first.fds {
            assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
        let second = b.recv(soon()).unwrap();
        assert!(second.needs_reply() && second.body.is_empty() && second.fds.is_empty());
        assert_eq!(b.recv(soon()).unwrap().fds.len(), 1);
        drop(a);
        assert!(matches!(b.recv(soon()), Err(SocketError::Closed)));
    }

    const FLAG: u32 = crate::control::frame::FLAG_NEED_REPLY;

    #[test]
    fn the_kernel_tells_who_sent_a_frame_with_descriptors_if_it_is_asked_to() {
        let (a, mut b) = pair();
        let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        a.send_parts(7, 0, b"before", &[], soon()).unwrap();
        b.recv(soon()).unwrap();
        assert_eq!(b.sender(), None);
        b.report_sender(true).unwrap();
        a.send_parts(7, 0, b"after", &[file.as_fd()], soon()).unwrap();
        assert_eq!(b.recv(soon()).unwrap().fds.len(), 1);
        assert_eq!(b.sender(), Some(rustix::process::getpid().as_raw_pid()));
    }

    #[test]
    fn a_frame_may_come_byte_by_byte_and_after_a_timeout() {
        let (a, mut b) = pair();
        let mut bytes = FrameHeader::new(5, 0, 3).as_bytes().to_vec();
        bytes.extend_from_slice(b"abc");
        for (index, byte) in bytes.iter().enumerate() {
            assert!(
                matches!(b.recv(Instant::now()), Err(SocketError::Timeout { .. })),
                "byte {index}"
            );
            rustix::io::write(&a, &[*byte]).unwrap();
        }
        assert_eq!(b.recv(soon()).unwrap().body, b"abc");
    }

    #[test]
    fn a_cut_frame_and_a_huge_one_are_errors_before_anything_is_allocated() {
        let (a, mut b) = pair();
        rustix::io::write(&a, &FrameHeader::new(5, 0, 3).as_bytes()[..7]).unwrap();
        drop(a);
        assert!(matches!(b.recv(soon()), Err(SocketError::ClosedInFrame { missing: 5 })));

        let (a, mut b) = pair();
        rustix::io::write(&a, FrameHeader::new(5, 0, u32::MAX as usize).as_bytes()).unwrap();
        assert!(matches!(
            b.recv(soon()),
            Err(SocketError::Header(HeaderError::Size { request: 5, .. }))
        ));
    }

    #[test]
    fn more_descriptors_than_a_frame_may_carry_are_refused() {
        let (a, mut b) = pair();
        let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let bytes = FrameHeader::new(5, 0, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [file.as_fd(); MAX_FDS + 1];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&a, &[IoSlice::new(bytes.as_bytes())], &mut control, SendFlags::empty()).unwrap();
        let error = b.recv(soon()).unwrap_err();
        assert!(matches!(error, SocketError::TooManyFds { count: 33 }), "{error}");
    }

    #[test]
    fn a_frame_that_is_sent_in_part_says_so() {
        let (a, _b) = pair();
        let error = a
            .send_parts(5, 0, &vec![0; crate::control::frame::MAX_BODY], &[], Instant::now())
            .unwrap_err();
        assert!(matches!(&error, SocketError::PartlySent { sent, .. } if *sent > 0), "{error}");
        assert!(!error.keeps_framing());
        // And one of which nothing is sent leaves the socket in step.
        while a.send_parts(6, 0, &[], &[], Instant::now()).is_ok() {}
        let error = a.send_parts(6, 0, &[], &[], Instant::now()).unwrap_err();
        assert!(matches!(error, SocketError::Timeout { .. }) && error.keeps_framing(), "{error}");
    }
}
