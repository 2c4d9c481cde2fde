// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames on a UNIX stream socket: 12 bytes of header, a body, and descriptors with the first byte.

use super::bytes::u32_at;
use pageferry_tests::scenario::SOON;
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Bytes of the header.
const HEADER: usize = 12;
/// Most descriptors with one frame.
const MAX_FDS: usize = 32;
/// Flags of a request or a hook: the version.
pub const ASK: u32 = 1;
/// Flags of an answer: the version and bit 2.
pub const ANSWER: u32 = 5;

/// A frame that has arrived.
#[derive(Debug)]
pub struct Frame {
    pub code: u32,
    pub flags: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Frame {
    /// Header and body, as they came.
    pub fn bytes(&self) -> Vec<u8> {
        [&header(self.code, self.flags, self.body.len())[..], &self.body].concat()
    }
}

pub fn header(code: u32, flags: u32, size: usize) -> [u8; HEADER] {
    let words = [code, flags, size as u32].map(u32::to_le_bytes);
    words.concat().try_into().unwrap()
}

/// A socket that carries frames.
#[derive(Debug)]
pub struct Frames(UnixStream);

impl Frames {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        Self(socket)
    }

    /// Another handle of the same socket.
    pub fn again(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }

    pub fn shut_down(&self) {
        // Fails only if the other side was faster.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }

    /// Sends a frame with its descriptors.
    pub fn send(&self, code: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&[&header(code, flags, body.len())[..], body].concat(), fds);
    }

    /// Sends any bytes. The descriptors go with the first of them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [IoSlice::new(bytes)];
        match sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => (&self.0).write_all(&bytes[sent..]).unwrap(),
            // The other side has ended the connection, which the next receive finds.
            Err(rustix::io::Errno::PIPE) => {}
            Err(errno) => panic!("cannot send: {errno}"),
        }
    }

    /// The next frame; `None` if the other side has closed the connection.
    pub fn receive(&self) -> Option<Frame> {
        let mut fds = Vec::new();
        let head = self.read_exactly(HEADER, &mut fds)?;
        let [code, flags, size] = [0, 4, 8].map(|offset| u32_at(&head, offset));
        let body = self.read_exactly(size as usize, &mut fds)?;
        Some(Frame { code, flags, body, fds })
    }

    fn read_exactly(&self, length: usize, fds: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
        let (mut bytes, mut have) = (vec![0; length], 0);
        while have < length {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let parts = &mut [IoSliceMut::new(&mut bytes[have..])];
            let read = recvmsg(&self.0, parts, &mut control, RecvFlags::CMSG_CLOEXEC);
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            match read {
                Ok(message) if message.bytes > 0 => have += message.bytes,
                Ok(_) | Err(rustix::io::Errno::CONNRESET) => return None,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => panic!("no frame in time: {errno}"),
            }
        }
        Some(bytes)
    }
}
