// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The TLS layer of a stream: what a stream writes is sealed, and what it reads is opened.
//!
//! One thread may read while another one writes. Both change one state, which is locked while bytes
//! are sealed or opened, and while the kernel copies them. Nobody waits for the peer with it.
//!
//! The peer has proved who it is before [`TlsLayer::read`] returns its first byte, and before
//! [`TlsLayer::write`] takes one.

mod connection;
mod received;
mod sealed;

use super::error::TransportError;
use crate::lock::lock;
use crate::trust::{Peer, Secured, TrustError};
use connection::{Opened, Step, open, seal};
use received::{Incoming, Received};
use rustix::io::{Errno, IoSlice};
use sealed::Sealed;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

/// The TLS layer of a socket.
#[derive(Debug)]
pub(super) struct TlsLayer(Mutex<State>);

#[derive(Debug)]
struct State {
    secured: Secured,
    /// Who the peer is, once it has proved that.
    peer: Option<Peer>,
    /// The peer sends no more.
    is_ended: bool,
    /// Why the connection cannot be used any more.
    failed: Option<rustls::Error>,
    received: Received,
    sealed: Sealed,
    /// Opened bytes for which a reader had no room: those from `used` on.
    rest: Vec<u8>,
    used: usize,
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
    pub(super) fn new(secured: Secured) -> Self {
        Self(Mutex::new(State {
            secured,
            peer: None,
            is_ended: false,
            failed: None,
            received: Received::default(),
            sealed: Sealed::default(),
            rest: Vec::new(),
            used: 0,
        }))
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
        if state.peer.is_none() {
            state.shake_hands(socket)?;
            if state.peer.is_none() {
                return Ok(None);
            }
        }
        state.read(socket, buffer)
    }

    /// Seals the beginning of `parts`, and sends what is sealed, as far as the socket has room.
    ///
    /// # Errors
    /// If the peer is gone, or the handshake is not done.
    pub(super) fn write(
        &self, socket: BorrowedFd<'_>, parts: &[IoSlice<'_>],
    ) -> Result<Written, TransportError> {
        let state = &mut *lock(&self.0);
        // A peer that has proved who it is, and is not allowed, may be told so.
        if state.is_handshaking() {
            return Err(TrustError::NotProved.into());
        }
        // What was sealed before goes first, so that no more than one batch is kept.
        if !state.send(socket)? {
            return Ok(Written::NoRoom);
        }
        let taken = state.seal(parts)?;
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
        let is_answered = state.secured.connection.common().negotiated_cipher_suite().is_some();
        match state.peer {
            Some(_) => Proof::Given,
            None if is_answered => Proof::Answered,
            None => Proof::Missing,
        }
    }

    /// Who the peer is, once it has proved that.
    pub(super) fn peer(&self) -> Option<Peer> {
        lock(&self.0).peer
    }
}

impl State {
    fn is_handshaking(&self) -> bool {
        self.secured.connection.common().is_handshaking()
    }

    fn shake_hands(&mut self, socket: BorrowedFd<'_>) -> Result<Shaken, TransportError> {
        while self.peer.is_none() {
            match self.open(socket, &mut [])? {
                (Step::Ended, _) => return Err(TransportError::Closed),
                (Step::GoOn, _) => {}
                // What this side says last is only sealed here. A peer that is not allowed does not
                // get it.
                _ if !self.is_handshaking() => self.peer = Some(self.secured.check_peer()?),
                _ if !self.send(socket)? => return Ok(Shaken::NeedsRoom),
                _ => match self.receive(socket)? {
                    Incoming::Bytes => {}
                    Incoming::Nothing => return Ok(Shaken::NeedsBytes),
                    Incoming::End => return Err(TransportError::Closed),
                },
            }
        }
        if self.send(socket)? { Ok(Shaken::Done) } else { Ok(Shaken::NeedsRoom) }
    }

    fn read(
        &mut self, socket: BorrowedFd<'_>, buffer: &mut [u8],
    ) -> Result<Option<usize>, TransportError> {
        loop {
            if self.used < self.rest.len() {
                let count = buffer.len().min(self.rest.len() - self.used);
                buffer[..count].copy_from_slice(&self.rest[self.used..self.used + count]);
                self.used += count;
                return Ok(Some(count));
            }
            // Cut without a farewell: the records say whether something is missing.
            if self.is_ended {
                return Ok(Some(0));
            }
            match self.open(socket, buffer)? {
                (_, filled @ 1..) => return Ok(Some(filled)),
                (Step::NeedsBytes | Step::Sealed(_), _) => match self.receive(socket)? {
                    Incoming::Nothing => return Ok(None),
                    Incoming::End => self.is_ended = true,
                    Incoming::Bytes => {}
                },
                _ => {}
            }
        }
    }

    /// Opens the next record into `buffer`. Returns how many bytes that were.
    fn open(
        &mut self, socket: BorrowedFd<'_>, buffer: &mut [u8],
    ) -> Result<(Step, usize), TransportError> {
        if let Some(error) = &self.failed {
            return Err(self.secured.explain(error.clone()).into());
        }
        if self.used == self.rest.len() {
            self.rest.clear();
            self.used = 0;
        }
        let mut opened = Opened { buffer, filled: 0, rest: &mut self.rest };
        let connection = &mut self.secured.connection;
        let step = open(connection, &mut self.received, &mut self.sealed, &mut opened);
        let filled = opened.filled;
        match step {
            Ok(step) => {
                self.is_ended |= step == Step::Ended;
                Ok((step, filled))
            }
            Err(TrustError::Tls(error)) => Err(self.fail(socket, error)),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the connection, and tells the peer why. It may be gone.
    fn fail(&mut self, socket: BorrowedFd<'_>, error: rustls::Error) -> TransportError {
        let mut opened = Opened { buffer: &mut [], filled: 0, rest: &mut self.rest };
        // rustls has queued the alert.
        while self.secured.connection.common().wants_write() {
            let connection = &mut self.secured.connection;
            if open(connection, &mut self.received, &mut self.sealed, &mut opened).is_err() {
                break;
            }
        }
        let _ = self.send(socket);
        self.failed = Some(error.clone());
        self.secured.explain(error).into()
    }

    fn seal(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, TransportError> {
        if let Some(error) = &self.failed {
            return Err(self.secured.explain(error.clone()).into());
        }
        loop {
            let mut opened = Opened { buffer: &mut [], filled: 0, rest: &mut self.rest };
            let connection = &mut self.secured.connection;
            match seal(connection, &mut self.received, &mut self.sealed, &mut opened, parts)? {
                Step::Sealed(taken) => return Ok(taken),
                Step::NeedsBytes => return Err(TrustError::NotProved.into()),
                step => self.is_ended |= step == Step::Ended,
            }
        }
    }

    fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Incoming, TransportError> {
        self.received.make_room(self.peer.is_none())?;
        self.received.receive(socket).map_err(failed)
    }

    fn send(&mut self, socket: BorrowedFd<'_>) -> Result<bool, TransportError> {
        self.sealed.send(socket).map_err(failed)
    }
}

fn failed(errno: Errno) -> TransportError {
    match errno {
        Errno::PIPE | Errno::CONNRESET => TransportError::Closed,
        errno => TransportError::Kernel(errno.into()),
    }
}

#[cfg(test)]
mod tests;
