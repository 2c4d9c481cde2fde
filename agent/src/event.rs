// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An event that wakes a thread which waits in `poll`: an eventfd.

use rustix::event::EventfdFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// An event. Its descriptor is readable from a signal until the next reset.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// An event that is not signalled.
    ///
    /// # Errors
    /// If the kernel refuses the descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// The same event with a descriptor of its own.
    ///
    /// # Errors
    /// If the kernel refuses the descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Makes the descriptor readable.
    pub fn signal(&self) {
        // If this fails, the counter is full, so the descriptor is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes the descriptor unreadable until the next signal. Returns whether it was readable.
    pub fn reset(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_is_readable_from_a_signal_until_its_reset() {
        let event = Event::new().unwrap();
        assert!(!event.reset());
        event.try_clone().unwrap().signal();
        event.signal();
        assert!(event.reset());
        assert!(!event.reset());
    }
}
