// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A reactor: waits for many descriptors with epoll. No other file uses epoll.
//!
//! The caller adds descriptors, each with a token of its choice. [`Reactor::wait`] returns the
//! tokens of the descriptors that are ready.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// Most events that one wait returns.
const BATCH: usize = 512;

/// Waits for many descriptors.
#[derive(Debug)]
pub struct Reactor {
    epoll: RawFd,
    ready: Vec<epoll::Event>,
}

impl Reactor {
    /// A reactor without descriptors.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(true)?,
            ready: vec![epoll::Event::new(epoll::Events::empty(), 0); BATCH],
        })
    }

    /// Adds `fd`: from now on it is ready whenever it is readable, until it is closed or removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.watch(fd, epoll::Events::EPOLLIN, token)
    }

    /// Adds the socket `fd`: it is ready once, when the other side closes the connection.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add_hangup(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.watch(fd, epoll::Events::EPOLLRDHUP | epoll::Events::EPOLLONESHOT, token)
    }

    /// Adds the socket `fd`: it is ready once, when it is readable or closed. Then the caller asks
    /// for the next time by [`Reactor::again`] or [`Reactor::until_hangup`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add_once(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.watch(fd, epoll::Events::EPOLLIN | epoll::Events::EPOLLONESHOT, token)
    }

    /// `fd`, which was added once, is ready once more when it is readable or closed.
    ///
    /// # Errors
    /// If `fd` was not added.
    pub fn again(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.change(fd, epoll::Events::EPOLLIN | epoll::Events::EPOLLONESHOT, token)
    }

    /// `fd`, which was added once, is ready once more when the other side closes the connection.
    ///
    /// # Errors
    /// If `fd` was not added.
    pub fn until_hangup(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.change(fd, epoll::Events::EPOLLRDHUP | epoll::Events::EPOLLONESHOT, token)
    }

    fn change(&mut self, fd: BorrowedFd<'_>, events: epoll::Events, token: u64) -> io::Result<()> {
        let event = epoll::Event::new(events, token);
        epoll::ctl(self.epoll, epoll::ControlOptions::EPOLL_CTL_MOD, fd.as_raw_fd(), event)
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, events: epoll::Events, token: u64) -> io::Result<()> {
        let event = epoll::Event::new(events, token);
        epoll::ctl(self.epoll, epoll::ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    /// Removes `fd`. This is necessary before `fd` is closed if a duplicate of it stays open:
    /// otherwise the kernel would go on to report it.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) {
        let event = epoll::Event::new(epoll::Events::empty(), 0);
        // Fails only if `fd` was never added.
        let _ = epoll::ctl(self.epoll, epoll::ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), event);
    }

    /// Waits until a descriptor is ready, at most for `timeout`, and returns the tokens of those
    /// that are. With `None` the wait has no limit.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<u64>> {
        // Rounded up: rounded down, the caller would call this in a loop during the last
        // millisecond before its timer is due.
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
        // The crate `epoll` has no type that closes its descriptor. If the close fails, nothing can
        // be done.
        let _ = epoll::close(self.epoll);
    }
}
