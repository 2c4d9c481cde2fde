// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The event by which the thread of a connection's queues is ended.
//!
//! The library (0.24) takes the reading end out of its owner and never closes it. An agent that
//! serves many front-ends would run out of descriptors, so this closes it.
#![allow(unsafe_code)]

use crate::lock::lock;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// The event. Drop it after the library's thread.
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
