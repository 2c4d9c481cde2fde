//! Whether the agent lives, found out by a thread of its own: while somebody may wait for the agent at a page of guest memory, nobody else can be relied on
//! to look. The threads of the VMM may be the ones that wait, that of the hook channel among them. And while the guest is paused for the agent, nobody may have a
//! reason to.
//!
//! An agent that dies is found at once, by the end of the connection. One that hangs is asked for a sign of life once a second, and is given up like any
//! other that owes an answer for too long ([`Config::request_timeout`](crate::Config::request_timeout)), which ends the connection, too.
//!
//! # What this thread may wait for
//!
//! For the agent, until that deadline; for nobody else. Above all not for the lock of the session, under which a VMM's thread may wait: it is tried, and a beat is
//! left out where it is held. Nothing is lost by that, since whoever holds it asks the agent something, so the answer is a sign of life, and the lack of one is found there.
//! Those requests come to their end without guest memory: what is sent is encoded on the heap, the bitmaps of discarded pages and the log are
//! files of their own, and freeing a range of guest memory faults at none of its pages.

use crate::client::WeakClient;
use crate::control::Link;
use crate::error::Error;
use pageferry_protocol::control::job::JobStatus;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Time between two signs of life of the agent.
const HEARTBEAT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    _stop: OwnedFd,
}

/// What tells the thread that nobody is interested any more.
#[derive(Debug)]
pub(crate) struct Stopped(OwnedFd);

impl Stopped {
    /// True if it came within this time.
    pub(crate) fn within(&self, time: Duration) -> bool {
        let deadline = std::time::Instant::now() + time;
        // Its other end is never written to, only closed.
        pageferry_protocol::control::socket::wait(self.0.as_fd(), PollFlags::IN, deadline) != Ok(false)
    }
}

impl Heartbeat {
    /// Starts the thread, which calls `lost` when the connection ends: the control channel, and with `hooks` already when the hook channel does. Also when `is_lost` says so
    /// of how the job of an agent that lives stands. They may be called before this returns.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn start(
        client: WeakClient, link: Arc<Link>, hooks: bool, is_lost: impl Fn(&JobStatus) -> bool + Send + 'static,
        lost: impl FnOnce(Stopped) + Send + 'static,
    ) -> Result<Self, Error> {
        let (stopped, stop) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(Error::kernel("make a pipe"))?;
        let stopped = Stopped(stopped);
        let run = move || {
            while let Some(alive) = beat(&stopped, &link.ends()[..if hooks { 2 } else { 1 }]) {
                if !alive {
                    return lost(stopped);
                }
                // A client that is dropped cuts the link.
                let status = client.upgrade().and_then(|client| client.ask_for_life());
                if status.is_some_and(|status| is_lost(&status)) {
                    return lost(stopped);
                }
            }
        };
        let thread = std::thread::Builder::new().name("pageferry-watch".into()).spawn(run);
        thread.map(|_| Self { _stop: stop }).map_err(|source| Error::Thread { source })
    }
}

/// Waits for the time between two beats: false if one of these sockets ended, `None` if the thread is to.
fn beat(stopped: &Stopped, ends: &[BorrowedFd<'_>]) -> Option<bool> {
    let mut polled = vec![PollFd::new(&stopped.0, PollFlags::IN)];
    // Not for reading: answers are for whoever asked.
    polled.extend(ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::RDHUP)));
    match poll(&mut polled, Some(&HEARTBEAT)) {
        Ok(0) | Err(Errno::INTR) => Some(true),
        Ok(_) if !polled[0].revents().is_empty() => None,
        // Nothing can be told any more without poll, and it counts as the end.
        Ok(_) | Err(_) => Some(false),
    }
}
