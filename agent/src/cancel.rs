// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cancelling a job wherever it waits, and its commit point
//! ([`one-owner`](crate::invariants#one-owner)).
//!
//! A job waits on its sockets, in `poll` beside [`Cancel::fd`], or in [`Cancel::sleep`].
//! [`Cancel::cancel`] shuts the sockets down and makes the descriptor readable, so every wait ends
//! at once. A thread that waits where no job is known, such as in the read of an image, waits for
//! [`Cancel::of_this_thread`], too.
//!
//! [`Cancel::commit_point`] and [`Cancel::cancel`] exclude each other: a job is cancelled before
//! its commit point, or not at all. [`Cancel::end`] and [`Cancel::cancel`] exclude each other, too:
//! a job whose cancel was accepted ends as cancelled.

use crate::event::Event;
use crate::lock::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

thread_local! {
    /// Cancels the job for which this thread works.
    static OF_THIS_THREAD: RefCell<Option<Arc<Cancel>>> = const { RefCell::new(None) };
}

/// Cancels a job.
#[derive(Debug)]
pub struct Cancel {
    cancelled: AtomicBool,
    /// Who cancelled first.
    by: OnceLock<CancelledBy>,
    /// Signalled once the job is cancelled.
    event: Event,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Why the job cannot be cancelled any more; `None` if it can.
    too_late: Option<TooLate>,
    /// Duplicates of the sockets that a cancel shuts down.
    sockets: Vec<OwnedFd>,
}

/// Who cancels a job, in words for its operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CancelledBy {
    /// A connection that is not the VMM's.
    #[error("cancelled by an operator")]
    Operator,
    /// The VMM asked for it.
    #[error("cancelled by the VMM")]
    Vmm,
    /// The VMM's connection has ended.
    #[error("the VMM is gone, so the job was cancelled")]
    VmmGone,
    /// The agent was asked to end.
    #[error("cancelled because the agent was ended")]
    AgentEnds,
    /// A thread that the job cannot do without has failed.
    #[error("cancelled because page faults cannot be answered any more: the agent's log says why")]
    FaultsLost,
}

/// Why a wait ended early.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// The job was cancelled.
    #[error("the job was cancelled")]
    Cancelled,
    /// The kernel refused to wait, or to watch a socket.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

impl CancelError {
    fn kernel(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Kernel { what, source }
    }
}

/// The reason why a job cannot be cancelled any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLate {
    /// The job has passed its commit point.
    #[error(
        "too late to cancel: ownership of the guest has been handed over, \
         so the migration can only be completed, or recovered if it is paused"
    )]
    HandedOver,
    /// The job has ended.
    #[error("no job is running: it has just ended")]
    Ended,
}

impl Cancel {
    /// For a job that is not cancelled yet.
    ///
    /// # Errors
    /// If the kernel refuses an event descriptor.
    pub fn new() -> std::io::Result<Self> {
        let event = Event::new()?;
        let (cancelled, by, state) = (AtomicBool::new(false), OnceLock::new(), Mutex::default());
        Ok(Self { cancelled, by, event, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Notes that the calling thread works for this job until it ends.
    pub fn cover_this_thread(self: &Arc<Self>) {
        OF_THIS_THREAD.set(Some(self.clone()));
    }

    /// Cancels the job for which the calling thread works; `None` if it works for none.
    pub fn of_this_thread() -> Option<Arc<Self>> {
        OF_THIS_THREAD.with_borrow(Clone::clone)
    }

    /// Cancels the job.
    ///
    /// # Errors
    /// If the job has passed its commit point, or has ended.
    pub fn cancel(&self, by: CancelledBy) -> Result<(), TooLate> {
        let state = self.state();
        if let Some(too_late) = state.too_late {
            return Err(too_late);
        }
        self.stop(&state, by);
        Ok(())
    }

    /// Ends the job wherever it waits, also after its commit point. For a job whose VMM is gone:
    /// nothing that it could still do is of use.
    pub fn force_cancel(&self, by: CancelledBy) {
        self.stop(&self.state(), by);
    }

    fn stop(&self, state: &State, by: CancelledBy) {
        // If another was first, that one is the reason.
        let _ = self.by.set(by);
        self.cancelled.store(true, Ordering::Release);
        self.event.signal();
        for socket in &state.sockets {
            // Fails only if the socket is not connected any more.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }

    /// True if the job was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Who cancelled the job; `None` if nobody has.
    pub fn cancelled_by(&self) -> Option<CancelledBy> {
        self.by.get().copied()
    }

    /// Returns an error if the job was cancelled.
    ///
    /// # Errors
    /// If the job was cancelled.
    pub fn check(&self) -> Result<(), CancelError> {
        if self.is_cancelled() { Err(CancelError::Cancelled) } else { Ok(()) }
    }

    /// A descriptor that becomes readable when the job is cancelled.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes a cancel shut `socket` down.
    ///
    /// # Errors
    /// If the job is cancelled already, or the descriptor cannot be duplicated.
    pub fn add_socket(&self, socket: BorrowedFd<'_>) -> Result<(), CancelError> {
        let duplicate =
            socket.try_clone_to_owned().map_err(CancelError::kernel("duplicate a socket"))?;
        let mut state = self.state();
        self.check()?;
        state.sockets.push(duplicate);
        Ok(())
    }

    /// Closes the duplicates of the sockets. Otherwise the peer would not see that the job has
    /// closed them.
    pub fn clear_sockets(&self) {
        self.state().sockets.clear();
    }

    /// Marks the job as ended: from now on a cancel is refused. Closes the duplicates of the
    /// sockets. Returns whether the job was cancelled before.
    pub fn end(&self) -> bool {
        let mut state = self.state();
        state.too_late = Some(TooLate::Ended);
        state.sockets.clear();
        self.is_cancelled()
    }

    /// Sleeps for `duration`.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn sleep(&self, duration: Duration) -> Result<(), CancelError> {
        let deadline = Instant::now() + duration;
        self.wait(&[], deadline).map(|_| ())
    }

    /// Waits until one of `fds` is ready. Returns for each whether it is ready; all are false if
    /// the deadline came first.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait(
        &self, fds: &[(BorrowedFd<'_>, PollFlags)], deadline: Instant,
    ) -> Result<Vec<bool>, CancelError> {
        loop {
            let mut polled = vec![PollFd::from_borrowed_fd(self.event.as_fd(), PollFlags::IN)];
            polled.extend(fds.iter().map(|(fd, events)| PollFd::from_borrowed_fd(*fd, *events)));
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut polled, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(CancelError::kernel("poll")(errno.into())),
                Ok(_) => {}
            }
            self.check()?;
            let ready: Vec<bool> = polled[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
            if left.is_zero() || ready.contains(&true) {
                return Ok(ready);
            }
        }
    }

    /// The commit point ([`one-owner`](crate::invariants#one-owner)): from here on the job cannot
    /// be cancelled.
    ///
    /// # Errors
    /// If the job was cancelled before.
    pub fn commit_point(&self) -> Result<(), CancelError> {
        let mut state = self.state();
        self.check()?;
        state.too_late = Some(TooLate::HandedOver);
        Ok(())
    }

    /// Makes the job cancellable again, because it did not give up ownership after all.
    pub fn revert_commit_point(&self) {
        self.state().too_late = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_ends_a_wait_and_refuses_later_sockets() {
        let cancel = Cancel::new().unwrap();
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| cancel.sleep(Duration::from_secs(3600)));
            cancel.cancel(CancelledBy::Operator).unwrap();
            assert!(matches!(sleeper.join().unwrap(), Err(CancelError::Cancelled)));
        });
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(cancel.add_socket(a.as_fd()), Err(CancelError::Cancelled)));
        assert!(cancel.commit_point().is_err());
    }

    #[test]
    fn a_cancel_after_the_commit_point_is_too_late() {
        let cancel = Cancel::new().unwrap();
        cancel.commit_point().unwrap();
        assert_eq!(cancel.cancel(CancelledBy::Operator), Err(TooLate::HandedOver));
        assert!(!cancel.is_cancelled());
        cancel.revert_commit_point();
        cancel.cancel(CancelledBy::Operator).unwrap();
    }
}
