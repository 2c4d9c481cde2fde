// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between a front-end and the library: hands every message on, in both directions, and has
//! `messages` look at those of the front-end.

use super::messages::Messages;
use super::port::DevicePort;
use pageferry_protocol::control::frame::Frame;
use pageferry_protocol::control::{FrameSocket, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long the other side may leave a message unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Messages of one side before the other has its turn.
const TURN: u32 = 64;

/// Why a relay ends.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A side breaks the framing, or does not read.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The library must not get a message.
    #[error("the front-end is refused: {0}")]
    Refused(String),
}

/// Hands messages on until one side ends the connection, or `stop` is readable.
///
/// # Errors
/// If a side breaks the framing, or does not read, or the front-end is refused.
pub fn run(
    mut front_end: FrameSocket, mut library: FrameSocket, port: &DevicePort, stop: BorrowedFd<'_>,
) -> Result<(), RelayError> {
    let mut messages = Messages::default();
    let front_end_end = front_end.as_fd().try_clone_to_owned().map_err(to_socket_error)?;
    loop {
        let mut polled = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(front_end.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(library.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(SocketError::from(errno).into()),
        }
        let [stopped, from_front_end, from_library] =
            [0, 1, 2].map(|at| !polled[at].revents().is_empty());
        if stopped {
            return Ok(());
        }
        let look_at = |frame: &Frame| {
            let go_on = || !is_over(front_end_end.as_fd(), stop);
            messages.look_at(frame, port, go_on).map_err(RelayError::Refused)
        };
        if from_front_end && !hand_on(&mut front_end, &library, look_at)? {
            return Ok(());
        }
        if from_library && !hand_on(&mut library, &front_end, |_| Ok(()))? {
            return Ok(());
        }
    }
}

fn to_socket_error(error: std::io::Error) -> SocketError {
    Errno::from_io_error(&error).unwrap_or(Errno::IO).into()
}

/// True if the front-end has ended the connection, or `stop` is readable.
fn is_over(front_end: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> bool {
    let mut polled = [
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
        PollFd::from_borrowed_fd(front_end, PollFlags::RDHUP),
    ];
    let polls = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polls.is_ok_and(|ready| ready > 0)
}

/// Hands on what is here. False if `from` has ended the connection.
fn hand_on(
    from: &mut FrameSocket, to: &FrameSocket,
    mut look_at: impl FnMut(&Frame) -> Result<(), RelayError>,
) -> Result<bool, RelayError> {
    // Then the other side has its turn, and `stop` is looked at.
    for _ in 0..TURN {
        match from.try_recv() {
            Ok(Some(frame)) => {
                log::trace!("request {} with {} bytes", frame.request, frame.body.len());
                look_at(&frame)?;
                to.send(&frame, Instant::now() + SEND_TIMEOUT)?;
            }
            Ok(None) => return Ok(true),
            Err(SocketError::Closed) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}
