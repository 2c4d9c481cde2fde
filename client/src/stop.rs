// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling a thread of the client to end.
//!
//! The two ends of a pipe. The owner keeps the [`StopSource`]; dropping it ends the thread, which
//! polls its [`StopToken`] beside whatever else it waits for. Nothing is ever written.

use crate::error::Error;
use pageferry_protocol::control::socket::wait;
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Dropping this tells the thread to end.
#[derive(Debug)]
pub(crate) struct StopSource {
    _write: OwnedFd,
}

/// What the thread looks at. The descriptor polls as hung up once the source is dropped.
#[derive(Debug)]
pub(crate) struct StopToken {
    read: OwnedFd,
}

/// A source and its token.
///
/// # Errors
/// If the kernel refuses a pipe.
pub(crate) fn stop_pair() -> Result<(StopSource, StopToken), Error> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(Error::kernel("make a pipe"))?;
    Ok((StopSource { _write: write }, StopToken { read }))
}

impl StopToken {
    /// Waits for the source to be dropped. False if that did not happen within `time`.
    pub(crate) fn is_stopped_within(&self, time: Duration) -> bool {
        wait(self.as_fd(), PollFlags::IN, Instant::now() + time) != Ok(false)
    }
}

impl AsFd for StopToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}
