// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The TLS layer of a stream: what a stream writes is sealed, and what it reads is opened.
//!
//! One thread may read while another one writes. Both change one state, which is locked while bytes
//! are sealed or opened, and while the kernel copies them. Nobody waits for the peer with it.
//!
//! The peer has proved who it is before [`TlsLayer::read`] returns its first byte, and before
//! [`TlsLayer::write`] takes one.

use super::error::TransportError;
use super::socket::{receive, send};
use crate::lock::lock;
use crate::trust::{Secured, TrustError};
use rustix::io::{Errno, IoSlice};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

/// Sealed bytes that are received at once. Few system calls, and it stays in the cache.
const RECEIVED: usize = 256 << 10;
/// The same, of a peer that has not proved who it is.
const RECEIVED_OF_STRANGER: usize = 4 << 10;
/// Bytes that are sealed before they are sent.
const SEALED: usize = 256 << 10;

/// The TLS layer of a socket.
#[derive(Debug)]
pub(super) struct TlsLayer(Mutex<State>);

#[derive(Debug)]
struct State {
    secured: Secured,
    /// The peer has proved who it is.
    is_proved: bool,
    /// Sealed bytes: those from `start` to `end` were received and are not opened yet.
    received: Vec<u8>,
    start: usize,
    end: usize,
}

/// How far a peer has got with the proof of who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// It has not begun, or not far enough for an answer.
    Missing,
    /// This side has answered with its certificate.
    Answered,
    /// The peer has proved who it is.
    Given,
}

/// What a write of the layer needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// So many bytes were taken. They may not be sent yet.
    Taken(usize),
    /// The socket has no room.
    NoRoom,
}

/// What the handshake needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shaken {
    Done,
    /// The socket must be readable, or have room.
    NeedsBytes,
    NeedsRoom,
}

impl TlsLayer {
    pub(super) fn new(mut secured: Secured) -> Self {
        secured.connection.set_buffer_limit(Some(2 * SEALED));
        let (received, start, end) = (Vec::new(), 0, 0);
        Self(Mutex::new(State { secured, is_proved: false, received, start, end }))
    }

    /// Goes on with the handshake as far as it can without waiting.
    ///
    /// # Errors
    /// If the peer does not prove that it is one that is trusted, or is gone.
    pub(super) fn shake_hands(&self, socket: BorrowedFd<'_>) -> Result<Shaken, TransportError> {
        lock(&self.0).shake_hands(socket)
    }

    /// Opens what is there into `buffer`. `None` if nothing is there, and 0 if the peer has closed
    /// the connection.
    ///
    /// # Errors
    /// If the peer does not prove who it is, or a record was changed on its way.
    pub(super) fn read(
        &self, socket: BorrowedFd<'_>, buffer: &mut [u8],
    ) -> Result<Option<usize>, TransportError> {
        let state = &mut *lock(&self.0);
        // Afterwards a read has nothing to do with what waits to be sent: what was received and not
        // opened yet wakes nobody.
        if !state.is_proved && state.shake_hands(socket)? == Shaken::NeedsBytes {
            return Ok(None);
        }
        loop {
            match state.secured.connection.reader().read(buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // Cut without a farewell: the records say whether something is missing.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Some(0)),
                Err(error) => return Err(TransportError::Kernel(error)),
            }
            if !state.receive(socket)? {
                return Ok(None);
            }
        }
    }

    /// Seals the beginning of `parts`, and sends what is sealed, as far as the socket has room.
    ///
    /// # Errors
    /// If the peer is gone, or the handshake is not done.
    pub(super) fn write(
        &self, socket: BorrowedFd<'_>, parts: &[IoSlice<'_>],
    ) -> Result<Written, TransportError> {
        let state = &mut *lock(&self.0);
        if state.secured.connection.is_handshaking() {
            return Err(TrustError::NotProved.into());
        }
        // What was sealed before goes first, so that no more than one batch is kept.
        if !state.send(socket)? {
            return Ok(Written::NoRoom);
        }
        let (mut taken, connection) = (0, &mut state.secured.connection);
        for part in parts {
            let rest = &part[..part.len().min(SEALED - taken)];
            connection.writer().write_all(rest).map_err(TransportError::Kernel)?;
            taken += rest.len();
            if taken == SEALED {
                break;
            }
        }
        state.send(socket)?;
        Ok(Written::Taken(taken))
    }

    /// Sends what is sealed. False if the socket has no room for all of it.
    ///
    /// # Errors
    /// If the peer is gone.
    pub(super) fn flush(&self, socket: BorrowedFd<'_>) -> Result<bool, TransportError> {
        lock(&self.0).send(socket)
    }

    /// How far the peer has got with its proof.
    pub(super) fn proof(&self) -> Proof {
        let state = lock(&self.0);
        // It is chosen together with the answer to the peer's first message.
        let is_answered = state.secured.connection.negotiated_cipher_suite().is_some();
        match state.is_proved {
            true => Proof::Given,
            false if is_answered => Proof::Answered,
            false => Proof::Missing,
        }
    }

    /// The peer's certificate, once it has proved that it is its own.
    pub(super) fn peer(&self) -> Option<Vec<u8>> {
        let state = lock(&self.0);
        let certificates = state.secured.connection.peer_certificates().filter(|_| state.is_proved);
        certificates.and_then(<[_]>::first).map(|certificate| certificate.to_vec())
    }
}

impl State {
    fn shake_hands(&mut self, socket: BorrowedFd<'_>) -> Result<Shaken, TransportError> {
        while self.secured.connection.is_handshaking() {
            if !self.send(socket)? {
                return Ok(Shaken::NeedsRoom);
            }
            if self.secured.connection.is_handshaking() && !self.receive(socket)? {
                return Ok(Shaken::NeedsBytes);
            }
        }
        if !self.is_proved {
            self.secured.check_peer()?;
            self.is_proved = true;
        }
        if self.send(socket)? { Ok(Shaken::Done) } else { Ok(Shaken::NeedsRoom) }
    }

    /// Opens a record that was received, or receives more. False if there is nothing.
    fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<bool, TransportError> {
        let is_ended = if self.start == self.end {
            let size = if self.is_proved { RECEIVED } else { RECEIVED_OF_STRANGER };
            if self.received.len() < size {
                self.received.resize(size, 0);
            }
            let Some(count) = receive(socket, &mut self.received).map_err(failed)? else {
                return Ok(false);
            };
            (self.start, self.end) = (0, count);
            count == 0
        } else {
            false
        };
        let mut sealed = &self.received[self.start..self.end];
        let connection = &mut self.secured.connection;
        let count = connection.read_tls(&mut sealed).map_err(TransportError::Kernel)?;
        self.start += count;
        if let Err(error) = connection.process_new_packets() {
            // An alert says why. The peer may be gone.
            let _ = self.send(socket);
            return Err(TrustError::Tls(error).into());
        }
        if is_ended && self.secured.connection.is_handshaking() {
            return Err(TransportError::Closed);
        }
        Ok(true)
    }

    fn send(&mut self, socket: BorrowedFd<'_>) -> Result<bool, TransportError> {
        while self.secured.connection.wants_write() {
            match self.secured.connection.write_tls(&mut Sender(socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => {
                    return Err(Errno::from_io_error(&error)
                        .map_or_else(|| TransportError::Kernel(error), failed));
                }
            }
        }
        Ok(true)
    }
}

fn failed(errno: Errno) -> TransportError {
    match errno {
        Errno::PIPE | Errno::CONNRESET => TransportError::Closed,
        errno => TransportError::Kernel(errno.into()),
    }
}

/// Writes to a socket without waiting.
struct Sender<'a>(BorrowedFd<'a>);

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.0, &[IoSlice::new(bytes)])?)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(send(self.0, parts)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
