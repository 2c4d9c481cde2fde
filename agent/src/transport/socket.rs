// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes into a socket and out of it, without waiting.

use rustix::io::{Errno, IoSlice};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use std::os::fd::BorrowedFd;

/// Sends as much as there is room for, and does not wait.
pub(super) fn send(socket: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags) {
            Err(Errno::INTR) => {}
            sent => return sent,
        }
    }
}

/// Receives the bytes that are there, and does not wait. `None` if there are none, and 0 if the
/// peer has closed the connection.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
    receive_with(socket, buffer, RecvFlags::empty())
}

/// As [`receive`], but the bytes stay there.
pub(super) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
    receive_with(socket, buffer, RecvFlags::PEEK)
}

fn receive_with(
    socket: BorrowedFd<'_>, buffer: &mut [u8], flags: RecvFlags,
) -> Result<Option<usize>, Errno> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT | flags) {
            Ok((_, count)) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(errno) => return Err(errno),
        }
    }
}
