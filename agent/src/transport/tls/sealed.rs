// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sealed bytes that are not sent yet, and how plain bytes become sealed ones.

use super::super::socket::send;
use super::connection::Outgoing;
use crate::trust::TrustError;
use rustix::io::{Errno, IoSlice};
use std::os::fd::BorrowedFd;

/// Plain bytes of one record of TLS at most; RFC 8446, section 5.1.
const RECORD: usize = 16 << 10;
/// Most that a record adds: its header, the byte of the inner type, and the tag; RFC 8446, section
/// 5.2.
const OVERHEAD: usize = 5 + 1 + 16;
/// Room for what rustls adds by itself: a key update.
const SPARE: usize = 256;
/// Plain bytes that are sealed before they are sent. They stay in the cache until the kernel copies
/// them.
const BATCH: usize = 256 << 10;

/// Sealed bytes that are not sent yet.
#[derive(Debug, Default)]
pub(super) struct Sealed {
    bytes: Vec<u8>,
    /// The bytes from `start` to `end` are not sent yet.
    start: usize,
    end: usize,
    /// Short parts, gathered for one record.
    gathered: Vec<u8>,
}

impl Sealed {
    /// Seals the beginning of `parts`, and returns how many bytes of them. It seals all of them, or
    /// at least [`BATCH`] and less than twice as many.
    ///
    /// Long parts are sealed where they lie. Short parts are gathered: a record of TLS costs the
    /// same time whether it is full or not.
    ///
    /// # Errors
    /// If no record may be sealed any more.
    pub(super) fn seal(
        &mut self, connection: &mut impl Outgoing, parts: &[IoSlice<'_>],
    ) -> Result<usize, TrustError> {
        let mut taken = 0;
        for part in parts {
            let part = &part[..part.len().min(BATCH)];
            if self.gathered.len() + part.len() > RECORD {
                self.seal_gathered(connection)?;
            }
            if part.len() >= RECORD {
                self.add(part.len(), |room| connection.seal(part, room))?;
            } else {
                self.gathered.extend_from_slice(part);
            }
            taken += part.len();
            if taken >= BATCH {
                break;
            }
        }
        self.seal_gathered(connection)?;
        Ok(taken)
    }

    fn seal_gathered(&mut self, connection: &mut impl Outgoing) -> Result<(), TrustError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let mut gathered = std::mem::take(&mut self.gathered);
        let added = self.add(gathered.len(), |room| connection.seal(&gathered, room));
        gathered.clear();
        self.gathered = gathered;
        added
    }

    /// Adds what `write` puts into a buffer that has room for `plain` sealed bytes and some more.
    /// If it needs still more room, `write` says how much, and is called again.
    pub(super) fn add(
        &mut self, plain: usize, mut write: impl FnMut(&mut [u8]) -> Result<Added, TrustError>,
    ) -> Result<(), TrustError> {
        let mut needed = plain + (plain / RECORD + 1) * OVERHEAD + SPARE;
        loop {
            if self.bytes.len() < self.end + needed {
                self.bytes.resize(self.end + needed, 0);
            }
            match write(&mut self.bytes[self.end..])? {
                Added::Bytes(count) => {
                    self.end += count;
                    return Ok(());
                }
                Added::NeedsRoom(room) => needed = room,
            }
        }
    }

    /// Sends what is sealed. False if the socket has no room for all of it.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Errno> {
        while self.start < self.end {
            match send(socket, &[IoSlice::new(&self.bytes[self.start..self.end])]) {
                Ok(count) => self.start += count,
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
        (self.start, self.end) = (0, 0);
        Ok(true)
    }
}

/// What became of the room for sealed bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Added {
    /// So many bytes were written to it.
    Bytes(usize),
    /// Nothing was written. So many bytes are needed.
    NeedsRoom(usize),
}
