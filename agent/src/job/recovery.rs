//! How a paused postcopy hears that it is to go on.
//!
//! The session asks, on its own thread; the job waits in `poll` beside [`Recovery::fd`]. What is
//! asked while the job is not paused is refused, so nothing is left behind that would surprise a
//! later pause.

use crate::transport::{Address, Listener};
use rustix::event::EventfdFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is asked of a paused job.
#[derive(Debug)]
pub enum RecoveryRequest {
    /// Outgoing: connect again, to where it was or to this address.
    Connect(Option<Address>),
    /// Incoming: listen here from now on.
    Listen(Listener),
    /// It is not to be recovered here: the agent ends, or the guest is resumed by force.
    Abandon,
}

/// The way to a paused job.
#[derive(Debug)]
pub struct Recovery {
    event: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    /// It will not wait any more.
    abandoned: bool,
    request: Option<RecoveryRequest>,
}

impl Recovery {
    /// Not paused.
    ///
    /// # Errors
    /// If the kernel has no event descriptor.
    pub fn new() -> std::io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks. False if the job is not paused, or was asked already; [`RecoveryRequest::Abandon`]
    /// holds for the next pause, too.
    pub fn request(&self, request: RecoveryRequest) -> bool {
        self.request_after(request, || ())
    }

    /// The same, and does something before the job can hear of it, if it will.
    pub fn request_after(&self, request: RecoveryRequest, before: impl FnOnce()) -> bool {
        let mut state = self.state();
        if matches!(request, RecoveryRequest::Abandon) {
            state.abandoned = true;
        } else if !state.paused || state.request.is_some() {
            return false;
        } else {
            before();
            state.request = Some(request);
        }
        // A full eventfd is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        true
    }

    /// The job is paused from now on, and asks [`Recovery::take`] when [`Recovery::fd`] is
    /// readable.
    pub fn pause(&self) {
        self.state().paused = true;
    }

    /// What was asked; ends the pause, unless it is to listen.
    pub fn take(&self) -> Option<RecoveryRequest> {
        let mut state = self.state();
        if state.abandoned {
            return Some(RecoveryRequest::Abandon);
        }
        let mut count = [0; 8];
        // Only resets the descriptor.
        let _ = rustix::io::read(&self.event, &mut count);
        let request = state.request.take();
        state.paused &= !matches!(request, Some(RecoveryRequest::Connect(_)));
        request
    }

    /// The pause is over.
    pub fn resume(&self) {
        let mut state = self.state();
        state.paused = false;
        state.request = None;
    }

    /// Readable when something was asked.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_paused_job_is_asked_and_only_once() {
        let recovery = Recovery::new().unwrap();
        assert!(!recovery.request(RecoveryRequest::Connect(None)));
        recovery.pause();
        assert!(recovery.request(RecoveryRequest::Connect(None)));
        assert!(!recovery.request(RecoveryRequest::Connect(None)), "it was asked already");
        assert!(matches!(recovery.take(), Some(RecoveryRequest::Connect(None))));
        assert!(!recovery.request(RecoveryRequest::Connect(None)), "it is on its way");
        recovery.pause();
        assert!(recovery.take().is_none());
    }

    #[test]
    fn what_is_abandoned_stays_so_in_every_pause() {
        let recovery = Recovery::new().unwrap();
        assert!(recovery.request(RecoveryRequest::Abandon));
        for _ in 0..2 {
            recovery.pause();
            assert!(matches!(recovery.take(), Some(RecoveryRequest::Abandon)));
        }
    }
}
