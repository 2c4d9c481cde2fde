//! The one place that knows epoll.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// Most events of one wait.
const BATCH: usize = 64;

/// Waits for many descriptors. Each has a token of the caller's choosing.
#[derive(Debug)]
pub struct Reactor {
    epoll: RawFd,
    ready: Vec<epoll::Event>,
}

impl Reactor {
    /// A reactor that waits for nothing yet.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(true)?,
            ready: vec![epoll::Event::new(epoll::Events::empty(), 0); BATCH],
        })
    }

    /// Waits for `fd` to be readable from now on, until it is closed or removed.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.watch(fd, epoll::Events::EPOLLIN, token)
    }

    /// Waits for the other side of the socket `fd` to hang up, and says so once.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add_hangup(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.watch(fd, epoll::Events::EPOLLRDHUP | epoll::Events::EPOLLONESHOT, token)
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, events: epoll::Events, token: u64) -> io::Result<()> {
        let event = epoll::Event::new(events, token);
        epoll::ctl(self.epoll, epoll::ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    /// Waits no more for `fd`. A descriptor of which a duplicate lives elsewhere must be removed
    /// before it is closed.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) {
        let event = epoll::Event::new(epoll::Events::empty(), 0);
        // Fails only if it was never added.
        let _ = epoll::ctl(self.epoll, epoll::ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), event);
    }

    /// The tokens that are ready, at the latest after `timeout`; `None` is no limit.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<u64>> {
        // Rounded up, so that a timer is not polled in its last millisecond.
        let millis = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        match epoll::wait(self.epoll, millis, &mut self.ready) {
            Ok(count) => Ok(self.ready[..count].iter().map(|event| event.data).collect()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // The crate has no type that closes; a failing close leaves nothing to do.
        let _ = epoll::close(self.epoll);
    }
}
