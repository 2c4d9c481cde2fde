// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sealed bytes that were received and are not opened yet.

use super::super::socket::receive;
use crate::trust::TrustError;
use rustix::io::Errno;
use rustls::InvalidMessage;
use std::os::fd::BorrowedFd;

/// Sealed bytes that are received at once. Few system calls, and it stays in the cache.
const SIZE: usize = 256 << 10;
/// The size at which the buffer begins.
const SIZE_OF_STRANGER: usize = 4 << 10;
/// The size to which it may grow for a peer that has not proved who it is. It must have room for a
/// chain of certificates, of which rustls takes at most 64 KiB.
const MAX_SIZE_OF_STRANGER: usize = 72 << 10;

/// Sealed bytes that were received and are not opened yet.
#[derive(Debug, Default)]
pub(super) struct Received {
    bytes: Vec<u8>,
    /// The bytes from `start` to `end` were received and are not opened yet.
    start: usize,
    end: usize,
    /// So many bytes from `start` on are known to be no whole record.
    incomplete: usize,
}

impl Received {
    /// All bytes, to be opened in place.
    pub(super) fn all(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// The bytes of a record that is incomplete. Nothing is opened in them.
    pub(super) fn incomplete(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.incomplete]
    }

    /// Removes `count` bytes from the front.
    pub(super) fn remove(&mut self, count: usize) {
        self.start += count;
        self.incomplete = self.incomplete.saturating_sub(count);
    }

    /// What is left is no whole record.
    pub(super) fn rest_is_incomplete(&mut self) {
        self.incomplete = self.end - self.start;
    }

    /// Makes room for more bytes.
    ///
    /// # Errors
    /// If the peer has begun something that is longer than allowed.
    pub(super) fn make_room(&mut self, is_stranger: bool) -> Result<(), TrustError> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let most = if is_stranger { MAX_SIZE_OF_STRANGER } else { SIZE };
        if self.end == most {
            return Err(rustls::Error::InvalidMessage(InvalidMessage::MessageTooLarge).into());
        }
        let size = if is_stranger { (2 * self.end).clamp(SIZE_OF_STRANGER, most) } else { most };
        if self.bytes.len() < size {
            self.bytes.resize(size, 0);
        }
        Ok(())
    }

    /// Receives as many bytes as there are and have room. Does not wait.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Incoming, Errno> {
        Ok(match receive(socket, &mut self.bytes[self.end..])? {
            None => Incoming::Nothing,
            Some(0) => Incoming::End,
            Some(count) => {
                self.end += count;
                Incoming::Bytes
            }
        })
    }
}

/// What came from the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Some bytes.
    Bytes,
    /// Nothing yet.
    Nothing,
    /// The peer has closed the connection.
    End,
}
