// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One step of a connection of rustls.
//!
//! rustls keeps no buffers here. It opens records in the buffer that they were received in, and
//! seals them into the buffer from which they are sent. So a page is copied twice less than through
//! the buffers of rustls (`docs/decisions/tls-copies.md`).

use super::received::Received;
use super::sealed::{Added, Sealed};
use crate::trust::{Connection, TrustError};
use rustix::io::IoSlice;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
};

/// What a step of the connection brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A record was opened.
    Opened,
    /// Something else was done. The next step may bring more.
    GoOn,
    /// All that was received is opened, and the handshake needs more.
    NeedsBytes,
    /// All that was received is opened, and so many plain bytes were sealed.
    Sealed(usize),
    /// The peer has said that it sends no more.
    Ended,
}

/// Plain bytes of a record that was opened. What has no room in the buffer of the reader is kept.
#[derive(Debug)]
pub(super) struct Opened<'a> {
    pub(super) buffer: &'a mut [u8],
    /// Bytes of `buffer` that are filled.
    pub(super) filled: usize,
    pub(super) rest: &'a mut Vec<u8>,
}

impl Opened<'_> {
    fn add(&mut self, bytes: &[u8]) {
        let room = &mut self.buffer[self.filled..];
        let (here, rest) = bytes.split_at(bytes.len().min(room.len()));
        room[..here.len()].copy_from_slice(here);
        self.filled += here.len();
        self.rest.extend_from_slice(rest);
    }
}

/// Opens the next record of `received` into `opened`.
///
/// # Errors
/// If the peer does not prove who it is, or a record was changed on its way.
pub(super) fn open(
    connection: &mut Connection, received: &mut Received, sealed: &mut Sealed,
    opened: &mut Opened<'_>,
) -> Result<Step, TrustError> {
    let incoming = received.all();
    let (taken, step) = match connection {
        Connection::Client(client) => {
            advance(client.process_tls_records(incoming), sealed, opened, &[])
        }
        Connection::Server(server) => {
            advance(server.process_tls_records(incoming), sealed, opened, &[])
        }
    };
    received.remove(taken);
    if matches!(step, Ok(Step::NeedsBytes | Step::Sealed(_))) {
        received.rest_is_incomplete();
    }
    step
}

/// Seals the beginning of `parts`. Opens no record: what was received may hold some that nobody has
/// asked for yet.
///
/// # Errors
/// If no record may be sealed any more.
pub(super) fn seal(
    connection: &mut Connection, received: &mut Received, sealed: &mut Sealed,
    opened: &mut Opened<'_>, parts: &[IoSlice<'_>],
) -> Result<Step, TrustError> {
    let incoming = received.incomplete();
    let (taken, step) = match connection {
        Connection::Client(client) => {
            advance(client.process_tls_records(incoming), sealed, opened, parts)
        }
        Connection::Server(server) => {
            advance(server.process_tls_records(incoming), sealed, opened, parts)
        }
    };
    received.remove(taken);
    step
}

/// Does what the connection asks for, and returns how many bytes to remove from what was received.
fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>, sealed: &mut Sealed, opened: &mut Opened<'_>,
    parts: &[IoSlice<'_>],
) -> (usize, Result<Step, TrustError>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error.into()),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                None => break Ok(Step::Opened),
                Some(Err(error)) => break Err(error.into()),
                Some(Ok(record)) => {
                    discard += record.discard;
                    opened.add(record.payload);
                }
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            sealed.add(0, |room| encode(&mut data, room)).map(|()| Step::GoOn)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // All that is sealed is sent in its order.
            data.done();
            Ok(Step::GoOn)
        }
        Ok(ConnectionState::WriteTraffic(mut traffic)) => {
            sealed.seal(&mut traffic, parts).map(Step::Sealed)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::NeedsBytes),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Step::Ended),
        // Only servers that offer early data get it, and ours does not.
        Ok(_) => Err(rustls::Error::General("unexpected state of TLS".into()).into()),
    };
    (discard, step)
}

/// What seals plain bytes.
pub(super) trait Outgoing {
    /// Seals all of `plain` into `room`, or says how much room that needs.
    ///
    /// # Errors
    /// If no record may be sealed any more.
    fn seal(&mut self, plain: &[u8], room: &mut [u8]) -> Result<Added, TrustError>;
}

impl<Data> Outgoing for WriteTraffic<'_, Data> {
    fn seal(&mut self, plain: &[u8], room: &mut [u8]) -> Result<Added, TrustError> {
        match self.encrypt(plain, room) {
            Ok(count) => Ok(Added::Bytes(count)),
            Err(EncryptError::InsufficientSize(size)) => Ok(Added::NeedsRoom(size.required_size)),
            Err(EncryptError::EncryptExhausted) => Err(rustls::Error::EncryptError.into()),
        }
    }
}

/// Writes a message of rustls' own into `room`, or says how much room that needs.
fn encode<Data>(
    message: &mut EncodeTlsData<'_, Data>, room: &mut [u8],
) -> Result<Added, TrustError> {
    match message.encode(room) {
        Ok(count) => Ok(Added::Bytes(count)),
        Err(EncodeError::InsufficientSize(size)) => Ok(Added::NeedsRoom(size.required_size)),
        Err(EncodeError::AlreadyEncoded) => Ok(Added::Bytes(0)),
    }
}
