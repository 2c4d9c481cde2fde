// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The listening control socket: one that this process has bound to a path, or one that it has
//! inherited from a service manager.

use crate::transport::unix_path::UnixPathListener;
use crate::upgrade::HandedOver;
use rustix::net::SocketFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The control socket.
#[derive(Debug)]
pub(super) enum ControlListener {
    /// On drop, the path is removed if it is still this socket's.
    Bound(UnixPathListener),
    /// The path belongs to the service manager, which listens on when this process has ended. It is
    /// never removed here.
    Inherited(OwnedFd),
}

impl ControlListener {
    /// Accepts the next connection. Never waits.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(self, SocketFlags::CLOEXEC)?)
    }

    /// The socket for the program that this process executes next. The path stays.
    pub(super) fn hand_over(self) -> io::Result<HandedOver> {
        Ok(match self {
            Self::Bound(listener) => {
                let (socket, inode) = listener.leave()?;
                HandedOver { socket, file: Some(inode), last_job: None, image_key: None }
            }
            Self::Inherited(socket) => {
                HandedOver { socket, file: None, last_job: None, image_key: None }
            }
        })
    }

    /// Makes [`ControlListener::accept`] return at once if there is no connection.
    pub(super) fn set_nonblocking(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(self, true)?)
    }
}

impl AsFd for ControlListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Bound(listener) => listener.as_fd(),
            Self::Inherited(socket) => socket.as_fd(),
        }
    }
}
