// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The frame of vhost-user: `request u32, flags u32, size u32`, then `size` bytes of body.
//!
//! Layout and flags: vhost-user specification, section "Header". File descriptors travel with the
//! first byte.

use std::os::fd::OwnedFd;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version in the two lowest bits of the flags; the only one vhost-user has.
pub const VERSION: u32 = 1;
/// Flag: this frame answers a request.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag: the sender wants an answer even where the request has none of its own
/// (`VHOST_USER_PROTOCOL_F_REPLY_ACK`).
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Largest body of any frame, in bytes. Holds 43,690 ranges of a discard.
pub const MAX_BODY: usize = 1 << 20;
/// Largest number of file descriptors in one frame, as in vhost-user.
pub const MAX_FDS: usize = 32;

/// Size of the header on the wire in bytes.
pub const HEADER_SIZE: usize = 12;

/// The header on the wire.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct FrameHeader {
    /// Request code: vhost-user's own below 0x1000, pageferry's from there.
    pub request: U32,
    /// Version and flags.
    pub flags: U32,
    /// Size of the body in bytes.
    pub size: U32,
}

/// Why a header is refused. The stream cannot be read any further, so the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The version is not 1.
    #[error("request {request:#x}: flags {flags:#x} carry version {}, allowed is {VERSION}", flags & 3)]
    Version {
        /// Request code.
        request: u32,
        /// Flags.
        flags: u32,
    },
    /// The body is larger than [`MAX_BODY`].
    #[error("request {request:#x}: size {size:#x} is over the limit of {MAX_BODY:#x}")]
    Size {
        /// Request code.
        request: u32,
        /// Size of the body in bytes.
        size: u32,
    },
}

impl FrameHeader {
    /// The header of a frame with these fields and the current version.
    pub fn new(request: u32, flags: u32, size: usize) -> Self {
        Self {
            request: request.into(),
            flags: (flags | VERSION).into(),
            size: (size as u32).into(),
        }
    }

    /// Checks version and size.
    ///
    /// # Errors
    /// The field that is wrong, and its value.
    pub fn check(&self) -> Result<(), HeaderError> {
        let (request, flags, size) = (self.request.get(), self.flags.get(), self.size.get());
        if flags & 3 != VERSION {
            return Err(HeaderError::Version { request, flags });
        }
        if size as usize > MAX_BODY {
            return Err(HeaderError::Size { request, size });
        }
        Ok(())
    }
}

/// A whole frame.
#[derive(Debug)]
pub struct Frame {
    /// Request code.
    pub request: u32,
    /// Flags, without the version.
    pub flags: u32,
    /// The body.
    pub body: Vec<u8>,
    /// File descriptors that came with it, all close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl Frame {
    /// A request with a body and no file descriptors.
    pub fn request(request: u32, body: Vec<u8>) -> Self {
        Self { request, flags: 0, body, fds: Vec::new() }
    }

    /// The answer to a request.
    pub fn reply(request: u32, body: Vec<u8>) -> Self {
        Self { request, flags: FLAG_REPLY, body, fds: Vec::new() }
    }

    /// True if this frame answers a request.
    pub fn is_reply(&self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    /// True if the sender asks for an answer in any case.
    pub fn needs_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_vhost_users_layout() {
        let header = FrameHeader::new(37, FLAG_NEED_REPLY, 0x20);
        assert_eq!(header.as_bytes(), [37, 0, 0, 0, 0b1001, 0, 0, 0, 0x20, 0, 0, 0]);
        header.check().unwrap();
    }

    #[test]
    fn wrong_version_and_huge_size_are_refused_by_name() {
        let version = FrameHeader { flags: 2.into(), ..FrameHeader::new(1, 0, 0) };
        assert_eq!(version.check(), Err(HeaderError::Version { request: 1, flags: 2 }));
        let size = FrameHeader::new(1, 0, MAX_BODY + 1);
        assert_eq!(size.check(), Err(HeaderError::Size { request: 1, size: MAX_BODY as u32 + 1 }));
    }
}
