// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests to recover a paused postcopy.
//!
//! A postcopy pauses when it loses its connections. The job then waits in `poll` beside
//! [`Recovery::fd`]. A thread of the session posts a request ([`Recovery::request`]), and the job
//! takes it ([`Recovery::take`]).
//!
//! At most one request can wait. While the job is not paused, a request is refused, so a later
//! pause never finds an old request. Only [`RecoveryRequest::Abandon`] is always accepted, and
//! holds for every later pause.

use crate::event::Event;
use crate::lock::lock;
use crate::transport::{Address, Listener};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard};

/// A request to a paused job.
#[derive(Debug)]
pub enum RecoveryRequest {
    /// To a source: connect again, to the old address or to this one.
    Connect(Option<Address>),
    /// To a destination: from now on listen also on this socket.
    Listen(Listener),
    /// Give up: the job will not be recovered by this agent. The agent ends, or the guest is
    /// resumed by force.
    Abandon,
}

/// Passes requests from the session to a paused job.
#[derive(Debug)]
pub struct Recovery {
    /// Wakes the job.
    event: Event,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    /// True once the job was told to give up.
    abandoned: bool,
    /// The request that the job has not taken yet.
    request: Option<RecoveryRequest>,
}

impl Recovery {
    /// For a job that is not paused.
    ///
    /// # Errors
    /// If the kernel refuses an event descriptor.
    pub fn new() -> std::io::Result<Self> {
        let event = Event::new()?;
        Ok(Self { event, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Posts a request. Returns false if the job is not paused, was told to give up, or another
    /// request waits. [`RecoveryRequest::Abandon`] is always accepted.
    pub fn request(&self, request: RecoveryRequest) -> bool {
        self.request_after(request, || ())
    }

    /// As [`Recovery::request`]. If the request is accepted, calls `before` before the job can take
    /// the request. Not for [`RecoveryRequest::Abandon`].
    pub fn request_after(&self, request: RecoveryRequest, before: impl FnOnce()) -> bool {
        let mut state = self.state();
        if matches!(request, RecoveryRequest::Abandon) {
            state.abandoned = true;
        } else if state.abandoned || !state.paused || state.request.is_some() {
            return false;
        } else {
            before();
            state.request = Some(request);
        }
        self.event.signal();
        true
    }

    /// Marks the job as paused. From now on it calls [`Recovery::take`] when [`Recovery::fd`] is
    /// readable.
    pub fn pause(&self) {
        self.state().paused = true;
    }

    /// Takes the request that waits, if there is one. [`RecoveryRequest::Connect`] ends the pause;
    /// after [`RecoveryRequest::Listen`] the job stays paused until its source connects.
    pub fn take(&self) -> Option<RecoveryRequest> {
        let mut state = self.state();
        if state.abandoned {
            return Some(RecoveryRequest::Abandon);
        }
        self.event.reset();
        let request = state.request.take();
        state.paused &= !matches!(request, Some(RecoveryRequest::Connect(_)));
        request
    }

    /// Marks the job as not paused any more, and drops a request that waits.
    pub fn resume(&self) {
        let mut state = self.state();
        state.paused = false;
        state.request = None;
    }

    /// A descriptor that becomes readable when a request was posted.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_paused_job_accepts_a_request_and_only_one() {
        let recovery = Recovery::new().unwrap();
        assert!(!recovery.request(RecoveryRequest::Connect(None)));
        recovery.pause();
        assert!(recovery.request(RecoveryRequest::Connect(None)));
        assert!(!recovery.request(RecoveryRequest::Connect(None)), "a request waits");
        assert!(matches!(recovery.take(), Some(RecoveryRequest::Connect(None))));
        assert!(!recovery.request(RecoveryRequest::Connect(None)), "the pause has ended");
        recovery.pause();
        assert!(recovery.take().is_none());
    }

    #[test]
    fn an_abandoned_job_stays_abandoned_in_every_pause() {
        let recovery = Recovery::new().unwrap();
        assert!(recovery.request(RecoveryRequest::Abandon));
        for _ in 0..2 {
            recovery.pause();
            assert!(matches!(recovery.take(), Some(RecoveryRequest::Abandon)));
            let unwanted = || panic!("the job ends and must not be changed");
            assert!(!recovery.request_after(RecoveryRequest::Connect(None), unwanted));
        }
    }
}
