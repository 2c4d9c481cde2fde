//! Stopping a job wherever it waits.
//!
//! A job waits on its sockets, in `poll` beside [`Cancel::fd`], or in [`Cancel::sleep`]; cancelling
//! shuts the sockets down and wakes the others. The line of `one-owner` is here:
//! [`Cancel::commit_point`] and [`Cancel::cancel`] exclude each other, so a job is either
//! cancelled before it gives up ownership, or not at all. So do [`Cancel::end`] and
//! [`Cancel::cancel`]: a job whose cancel was accepted ends as cancelled.

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Cancels a job.
#[derive(Debug)]
pub struct Cancel {
    cancelled: AtomicBool,
    event: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Why the job cannot be cancelled any more.
    too_late: Option<TooLate>,
    sockets: Vec<OwnedFd>,
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

/// The job cannot be cancelled any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLate {
    /// Ownership is being given up or was taken: there is no way back.
    #[error(
        "too late to cancel: ownership of the guest has been handed over, so the migration can only be completed, or recovered if it is paused"
    )]
    HandedOver,
    /// It is known how the job ended.
    #[error("no job is running: it has just ended")]
    Ended,
}

impl Cancel {
    /// Not cancelled yet.
    ///
    /// # Errors
    /// If the kernel has no event descriptor.
    pub fn new() -> std::io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { cancelled: AtomicBool::new(false), event, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels the job.
    ///
    /// # Errors
    /// If it crossed the line, or has ended.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let state = self.state();
        if let Some(too_late) = state.too_late {
            return Err(too_late);
        }
        self.stop(&state);
        Ok(())
    }

    /// Ends the job wherever it is, even past the line: its VMM is gone, and nothing that it does
    /// is of use to anyone.
    pub fn force(&self) {
        self.stop(&self.state());
    }

    fn stop(&self, state: &State) {
        self.cancelled.store(true, Ordering::Release);
        // A full eventfd is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        for socket in &state.sockets {
            // Fails only if it is not connected any more.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }

    /// True if the job was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Goes on, unless the job was cancelled.
    ///
    /// # Errors
    /// If it was.
    pub fn check(&self) -> Result<(), CancelError> {
        if self.is_cancelled() { Err(CancelError::Cancelled) } else { Ok(()) }
    }

    /// Readable once the job is cancelled.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Has `socket` shut down when the job is cancelled.
    ///
    /// # Errors
    /// If it is cancelled already, or the descriptor cannot be duplicated.
    pub fn watch(&self, socket: BorrowedFd<'_>) -> Result<(), CancelError> {
        let duplicate =
            socket.try_clone_to_owned().map_err(CancelError::kernel("duplicate a socket"))?;
        let mut state = self.state();
        self.check()?;
        state.sockets.push(duplicate);
        Ok(())
    }

    /// Lets go of the sockets: the peer must see them closed.
    pub fn release(&self) {
        self.state().sockets.clear();
    }

    /// The job has ended: no cancel is accepted any more, and the sockets are let go. Returns
    /// whether the job was cancelled before.
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

    /// Waits until one of `fds` is ready, and tells which; false for all if the deadline came
    /// first.
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

    /// The line of `one-owner`: from here on the job cannot be cancelled.
    ///
    /// # Errors
    /// If it was cancelled before.
    pub fn commit_point(&self) -> Result<(), CancelError> {
        let mut state = self.state();
        self.check()?;
        state.too_late = Some(TooLate::HandedOver);
        Ok(())
    }

    /// The job did not give up ownership after all: it can be cancelled again.
    pub fn step_back(&self) {
        self.state().too_late = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancelling_wakes_who_waits_and_shuts_what_comes_later() {
        let cancel = Cancel::new().unwrap();
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| cancel.sleep(Duration::from_secs(3600)));
            cancel.cancel().unwrap();
            assert!(matches!(sleeper.join().unwrap(), Err(CancelError::Cancelled)));
        });
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(cancel.watch(a.as_fd()), Err(CancelError::Cancelled)));
        assert!(cancel.commit_point().is_err());
    }

    #[test]
    fn after_the_line_it_is_too_late() {
        let cancel = Cancel::new().unwrap();
        cancel.commit_point().unwrap();
        assert_eq!(cancel.cancel(), Err(TooLate::HandedOver));
        assert!(!cancel.is_cancelled());
        cancel.step_back();
        cancel.cancel().unwrap();
    }
}
