// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between a front-end and the library: hands every message on, in both directions.
//!
//! The library keeps the socket by which a device could tell of changes (SET_BACKEND_REQ_FD) to
//! itself, and has no message for a change of the configuration. So a copy is kept here on the
//! way. And before the library reads a ring, its pages must be here: it reads the used index when
//! it gets the addresses of a ring.

use super::back_end::DevicePort;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::vhost_user::FrontendReq;
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long the other side may leave a message unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Hands messages on until one side ends the connection, or `stop` is readable.
///
/// # Errors
/// If a side breaks the framing, or does not read.
pub fn run(
    mut front_end: FrameSocket, mut library: FrameSocket, port: &DevicePort, stop: BorrowedFd<'_>,
) -> Result<(), SocketError> {
    loop {
        let mut polled = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(front_end.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(library.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let [stopped, from_front_end, from_library] =
            [0, 1, 2].map(|at| !polled[at].revents().is_empty());
        if stopped {
            return Ok(());
        }
        if from_front_end && !hand_on(&mut front_end, &library, |frame| look_at(frame, port))? {
            return Ok(());
        }
        if from_library && !hand_on(&mut library, &front_end, |_| ())? {
            return Ok(());
        }
    }
}

/// Hands on what is here. False if `from` has ended the connection.
fn hand_on(
    from: &mut FrameSocket, to: &FrameSocket, look_at: impl Fn(&Frame),
) -> Result<bool, SocketError> {
    loop {
        match from.try_recv() {
            Ok(Some(frame)) => {
                log::trace!("request {} with {} bytes", frame.request, frame.body.len());
                look_at(&frame);
                to.send(&frame, Instant::now() + SEND_TIMEOUT)?;
            }
            Ok(None) => return Ok(true),
            Err(SocketError::Closed) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

fn look_at(frame: &Frame, port: &DevicePort) {
    if frame.request != FrontendReq::SET_BACKEND_REQ_FD as u32 {
        return;
    }
    let socket = frame.fds.first().map(|fd| fd.try_clone());
    match socket.transpose() {
        Ok(socket) => port.set_front_end(socket.map(FrameSocket::from)),
        Err(error) => {
            let name = port.device().name();
            log::warn!("{name}: the front-end will not hear of changes: {error}");
        }
    }
}
