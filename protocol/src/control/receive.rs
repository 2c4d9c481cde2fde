// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One `recvmsg`: bytes, descriptors, and the process of the sender.
//!
//! The kernel reports process id 0 for a sender in another PID namespace that is not visible from
//! here. The credentials type of rustix cannot hold that, so this file parses the message itself.

#![allow(unsafe_code)]

use super::frame::MAX_FDS;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of control messages: [`MAX_FDS`] descriptors, and the credentials of the sender.
const SPACE: usize = {
    let (fds, sender) = (MAX_FDS * size_of::<RawFd>(), size_of::<libc::ucred>());
    // SAFETY: these compute with their argument and touch no memory.
    unsafe { (libc::CMSG_SPACE(fds as u32) + libc::CMSG_SPACE(sender as u32)) as usize }
};

/// What has arrived.
#[derive(Debug, Default)]
pub(super) struct Received {
    /// Bytes that were put into the buffer; 0 at the end of the connection.
    pub(super) bytes: usize,
    /// Descriptors that came with them.
    pub(super) fds: Vec<OwnedFd>,
    /// Process id of the sender, if the kernel reports it (`SO_PASSCRED`); 0 if it is not visible
    /// from here.
    pub(super) sender: Option<i32>,
    /// Control messages were truncated: there were too many, or this process is out of descriptors.
    pub(super) cut: bool,
}

/// Receives into `buffer` what is there, without waiting.
///
/// # Errors
/// What the kernel said.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received, Errno> {
    // Of words, so that the headers in it are aligned.
    let mut control = [0u64; SPACE.div_ceil(8)];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a header of zeroes is one without any parts.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = SPACE as _;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header names the buffer and the space for control messages, which live until it
    // returns, with their lengths.
    let bytes = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let Ok(bytes) = usize::try_from(bytes) else {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    };
    let mut received =
        Received { bytes, cut: message.msg_flags & libc::MSG_CTRUNC != 0, ..Received::default() };
    // SAFETY: the kernel has filled in the space and its length.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: it is null at the end, or points to a whole header in `control`.
    while let Some(header) = unsafe { next.as_ref() } {
        // SAFETY: the data of a header follows it, still in `control`.
        let data = unsafe { libc::CMSG_DATA(next) };
        let length = header.cmsg_len - (data as usize - next as usize);
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for at in 0..length / size_of::<RawFd>() {
                    // SAFETY: that many descriptors are there, and each is this process's from now
                    // on.
                    let fd = unsafe {
                        OwnedFd::from_raw_fd(data.cast::<RawFd>().add(at).read_unaligned())
                    };
                    received.fds.push(fd);
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                // SAFETY: credentials are there, three integers of which any value is valid.
                received.sender = Some(unsafe { data.cast::<libc::ucred>().read_unaligned() }.pid);
            }
            _ => {}
        }
        // SAFETY: the header is one of this message.
        next = unsafe { libc::CMSG_NXTHDR(&raw const message, next) };
    }
    Ok(received)
}
