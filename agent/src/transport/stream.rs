// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connected stream of bytes, with deadlines.
//!
//! Every wait for the peer is bounded:
//!
//! - The peer has `timeout` to begin a record or an answer.
//! - From the first byte of a record, the peer has `timeout` and the time that the record takes at
//!   [`MIN_BANDWIDTH`]. The same holds for a write, from the moment when the socket first has no
//!   room. So a slow link has enough time, and a peer that sends or receives a byte now and then
//!   cannot extend the deadline.
//! - While a guest is paused for its hand-over, every wait also ends with the deadline of the stop
//!   ([`Deadline`]).
//!
//! Threads block only in `poll`. Cancelling a job shuts the socket down, which ends every wait at
//! once (see [`crate::job::Cancel`]).

use super::error::TransportError;
use super::socket::{peek, receive, send};
use super::tls::{Proof, Shaken, TlsLayer, Written};
use crate::job::Deadline;
use crate::trust::{Peer, Secured};
use pageferry_protocol::control::job::MIN_BANDWIDTH;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most parts of one write; the kernel's `UIO_MAXIOV`.
const MAX_PARTS: usize = 1024;

/// A connected socket. Clones refer to the same socket.
#[derive(Debug, Clone)]
pub struct StreamSocket {
    fd: Arc<OwnedFd>,
    /// Seals what is written and opens what is read, if the address says so.
    tls: Option<Arc<TlsLayer>>,
    timeout: Duration,
    stop: Deadline,
}

impl StreamSocket {
    /// A stream over `fd`. `timeout` is how long the peer may send and receive nothing.
    ///
    /// # Errors
    /// If the kernel refuses an option of the socket.
    pub fn new(fd: OwnedFd, timeout: Duration) -> Result<Self, TransportError> {
        super::tcp_options::tune(fd.as_fd(), timeout)
            .map_err(|errno| TransportError::Kernel(errno.into()))?;
        Ok(Self { fd: Arc::new(fd), tls: None, timeout, stop: Deadline::default() })
    }

    /// The same socket, over TLS. The handshake is made by [`StreamSocket::shake_hands`], or by the
    /// first reads.
    #[must_use]
    pub fn secured(self, secured: Option<Secured>) -> Self {
        Self { tls: secured.map(|secured| Arc::new(TlsLayer::new(secured))), ..self }
    }

    /// Waits until both sides have proved who they are, if this is a stream over TLS.
    ///
    /// # Errors
    /// If the peer does not prove that it is one that is trusted, or not in time.
    pub fn shake_hands(&self) -> Result<(), TransportError> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let deadline = Instant::now() + self.timeout;
        loop {
            let events = match tls.shake_hands(self.fd.as_fd())? {
                Shaken::Done => return Ok(()),
                Shaken::NeedsBytes => PollFlags::IN,
                Shaken::NeedsRoom => PollFlags::OUT,
            };
            if !self.wait(events, Some(deadline))? {
                return Err(TransportError::Silent(self.timeout));
            }
        }
    }

    /// The first byte that was received and not read, whether the layer of TLS opens it or not.
    /// `None` if there is none.
    ///
    /// # Errors
    /// If the peer has closed the connection.
    pub fn first_byte(&self) -> Result<Option<u8>, TransportError> {
        let mut first = [0];
        match peek(self.fd.as_fd(), &mut first) {
            Ok(Some(0)) => Err(TransportError::Closed),
            Ok(count) => Ok(count.map(|_| first[0])),
            Err(errno) => Err(self.failed(errno)),
        }
    }

    /// How far the peer has got with the proof of who it is; `None` if this is no stream over TLS.
    pub fn proof(&self) -> Option<Proof> {
        self.tls.as_ref().map(|tls| tls.proof())
    }

    /// Who the peer is, once it has proved that. `None` without TLS.
    pub fn peer(&self) -> Option<Peer> {
        self.tls.as_ref().and_then(|tls| tls.peer())
    }

    /// True if the bytes go over TLS.
    pub(super) fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// The part of a payload that the checksum of its record covers: none over TLS, which proves
    /// by itself that no byte was changed.
    pub fn checked<'a>(&self, payload: &'a [u8]) -> &'a [u8] {
        if self.is_secured() { &[] } else { payload }
    }

    /// As [`StreamSocket::new`]; all waits also end with `stop`.
    ///
    /// # Errors
    /// If the kernel refuses an option of the socket.
    pub fn with_stop(
        fd: OwnedFd, timeout: Duration, stop: &Deadline,
    ) -> Result<Self, TransportError> {
        Ok(Self { stop: stop.clone(), ..Self::new(fd, timeout)? })
    }

    /// The same socket, with at most `timeout` for the peer to receive what is written.
    #[must_use]
    pub fn with_deadline(&self, timeout: Duration) -> Self {
        Self { timeout: timeout.min(self.timeout), ..self.clone() }
    }

    /// How long the peer may send and receive nothing.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The deadline of the guest's stop. It is set while the guest is paused for its hand-over.
    pub fn stop_deadline(&self) -> &Deadline {
        &self.stop
    }

    /// Ends both directions, and wakes the threads that read or write.
    pub fn shut_down(&self) {
        // Fails only if the socket is not connected any more.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Ends the receiving direction, and wakes the threads that read. The peer of a UNIX socket
    /// cannot send any more; the peer of a TCP socket does not notice.
    pub fn end_receiving(&self) {
        // Fails only if the socket is not connected any more.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read);
    }

    /// Ends the sending direction. The peer reads all that was sent, and then the end.
    pub fn end_sending(&self) {
        // Fails only if the socket is not connected any more.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    /// Writes all of `parts`.
    ///
    /// # Errors
    /// If the peer is gone, or has not received all bytes in time.
    pub fn write_all(&self, mut parts: &mut [IoSlice<'_>]) -> Result<(), TransportError> {
        let mut deadline = None;
        // What a layer has taken may be sealed and not sent yet.
        while !parts.is_empty() || !self.is_flushed()? {
            match self.write_some(parts)? {
                Written::Taken(count) => IoSlice::advance_slices(&mut parts, count),
                Written::NoRoom => {
                    let missing = parts.iter().map(|part| part.len()).sum();
                    let (deadline, timeout) = *deadline.get_or_insert_with(|| {
                        let timeout = self.time_for(missing);
                        (Instant::now() + timeout, timeout)
                    });
                    if !self.wait(PollFlags::OUT, Some(deadline))? {
                        return Err(TransportError::SendTimeout { timeout });
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes as much of `parts` as there is room for.
    fn write_some(&self, parts: &[IoSlice<'_>]) -> Result<Written, TransportError> {
        if let Some(tls) = &self.tls {
            return tls.write(self.fd.as_fd(), parts);
        }
        let batch = &parts[..parts.len().min(MAX_PARTS)];
        match send(self.fd.as_fd(), batch) {
            Ok(count) => Ok(Written::Taken(count)),
            Err(Errno::AGAIN) => Ok(Written::NoRoom),
            Err(errno) => Err(self.failed(errno)),
        }
    }

    fn is_flushed(&self) -> Result<bool, TransportError> {
        self.tls.as_ref().map_or(Ok(true), |tls| tls.flush(self.fd.as_fd()))
    }

    fn failed(&self, errno: Errno) -> TransportError {
        match errno {
            Errno::PIPE | Errno::CONNRESET => TransportError::Closed,
            Errno::TIMEDOUT => TransportError::Silent(self.timeout),
            errno => TransportError::Kernel(errno.into()),
        }
    }

    /// How long the peer may take to send or to receive `bytes` bytes.
    pub(super) fn time_for(&self, bytes: usize) -> Duration {
        self.timeout + Duration::from_secs_f64(bytes as f64 / MIN_BANDWIDTH as f64)
    }

    /// Reads the bytes that are there, without waiting. `None` if there are none, and 0 if the peer
    /// has closed the connection.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>, TransportError> {
        match &self.tls {
            Some(tls) => tls.read(self.fd.as_fd(), buffer),
            None => match receive(self.fd.as_fd(), buffer) {
                Err(Errno::TIMEDOUT) => Err(TransportError::Silent(self.timeout)),
                received => received.map_err(|errno| TransportError::Kernel(errno.into())),
            },
        }
    }

    /// Waits until the socket is ready for `events`. Returns false if `deadline` came first.
    pub(super) fn wait(
        &self, events: PollFlags, deadline: Option<Instant>,
    ) -> Result<bool, TransportError> {
        loop {
            // A stop may begin, or its deadline may move, while this thread waits. So it looks at
            // the deadline again after `STOP_CHECK`.
            let check = Instant::now() + STOP_CHECK;
            let until = self.stop.cap(deadline.map_or(check, |deadline| deadline.min(check)));
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.fd, events)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(TransportError::Kernel(errno.into())),
            }
            if self.stop.has_passed() {
                return Err(TransportError::StopDeadlinePassed);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
        }
    }
}

/// Longest delay before a wait sees that a stop has begun or ended.
const STOP_CHECK: Duration = Duration::from_secs(5);

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
