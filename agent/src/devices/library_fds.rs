// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptors that the library has.
//!
//! - The event by which the thread of a connection's queues is ended: the library (0.24) takes the
//!   reading end out of its owner and never closes it. An agent that serves many front-ends would
//!   run out of descriptors, so this closes it.
//! - The event by which a driver hears of used buffers: whether a write to it would wait.
#![allow(unsafe_code)]

use crate::lock::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// True if a write to the event would not wait. It is non-blocking, but its other owners can change
/// that.
pub(super) fn is_writable(event: &EventNotifier) -> bool {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    let polls = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polls.is_ok() && polled[0].revents().contains(PollFlags::OUT)
}

/// The event that ends the thread. Drop it after the library's thread.
#[derive(Debug, Default)]
pub(super) struct ExitEvent(Mutex<Option<RawFd>>);

impl ExitEvent {
    /// Both ends, for the library. `None` if there is one already, or the kernel refuses it.
    pub(super) fn make(&self) -> Option<(EventConsumer, EventNotifier)> {
        let mut reading_end = lock(&self.0);
        if reading_end.is_some() {
            return None;
        }
        let made =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        *reading_end = Some(made.0.as_raw_fd());
        Some(made)
    }
}

impl Drop for ExitEvent {
    fn drop(&mut self) {
        if let Some(fd) = lock(&self.0).take() {
            // SAFETY: the library has called `into_raw_fd` on the only owner of this descriptor,
            // and keeps the number in its epoll instance alone. So nobody else closes it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
