//! The bandwidth limit of all streams together.
//!
//! A virtual clock: each sender moves it on by the time that its bytes take, and waits until real
//! time has caught up. No lock, and no thread of its own.
//!
//! A sender that waits here still sees that its peer closes the connection, and that the stop of
//! the guest is over. Under a low limit it sends little at a time ([`Limiter::portion`]), so that
//! it waits for a moment and not for hours, and the peer hears from it often.

use super::{StreamSocket, TransportError};
use crate::job::{Cancel, JobError};
use pageferry_protocol::memory::PAGE_SIZE;
use rustix::event::PollFlags;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far the clock may lag behind: what may be sent at once after a lull.
const BURST: Duration = Duration::from_millis(20);

/// How long what is sent at once may take under the limit.
const PORTION: Duration = Duration::from_millis(100);

/// Longest delay before a waiter sees a change of the limit.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// Holds senders back.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    /// Bytes per second; 0 is no limit.
    rate: AtomicU64,
    /// When all that was let through is sent, in nanoseconds from `start`.
    clock: AtomicU64,
}

impl Limiter {
    /// A limit of `rate` bytes per second; 0 is none.
    pub fn new(rate: u64) -> Self {
        Self { start: Instant::now(), rate: AtomicU64::new(rate), clock: AtomicU64::new(0) }
    }

    /// Changes the limit. What was let through under the old one is forgotten: who waits for it
    /// goes on.
    pub fn set_rate(&self, rate: u64) {
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            self.clock.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Nanoseconds from `start`.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Most pages that are to be sent at once, as one record or several; at least 1.
    pub fn portion(&self) -> u64 {
        match self.rate.load(Ordering::Relaxed) {
            0 => u64::MAX,
            rate => ((u128::from(rate) * PORTION.as_millis() / 1000) as u64 / PAGE_SIZE).max(1),
        }
    }

    /// Waits until `bytes` may be read or written.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait(&self, bytes: usize, cancel: &Cancel) -> Result<(), JobError> {
        self.wait_unless(bytes, cancel, || false)
    }

    /// Waits until `bytes` may be sent on `socket`.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile, the peer closes the connection, or the stop of the guest
    /// is over.
    pub fn wait_to_send(
        &self, bytes: usize, cancel: &Cancel, socket: &StreamSocket,
    ) -> Result<(), JobError> {
        self.wait_with(bytes, |left| {
            let until = socket.stop().cap(Instant::now() + left);
            if cancel.wait(&[(socket.as_fd(), PollFlags::RDHUP)], until)?[0] {
                return Err(TransportError::Closed.into());
            }
            if socket.stop().has_passed() {
                return Err(TransportError::StopOver.into());
            }
            Ok(false)
        })
    }

    /// The same, but not longer than until all is `over`.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait_unless(
        &self, bytes: usize, cancel: &Cancel, over: impl Fn() -> bool,
    ) -> Result<(), JobError> {
        self.wait_with(bytes, |left| {
            if over() {
                return Ok(true);
            }
            cancel.sleep(left)?;
            Ok(false)
        })
    }

    /// Waits in short pieces, each by `wait`, which returns true if the rest need not be waited
    /// for.
    fn wait_with(
        &self, bytes: usize, mut wait: impl FnMut(Duration) -> Result<bool, JobError>,
    ) -> Result<(), JobError> {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(());
        }
        let now = self.now();
        let floor = now.saturating_sub(BURST.as_nanos() as u64);
        let cost = (bytes as u128 * 1_000_000_000 / u128::from(rate)) as u64;
        self.clock.fetch_max(floor, Ordering::Relaxed);
        let due = self.clock.fetch_add(cost, Ordering::Relaxed);
        loop {
            let left = Duration::from_nanos(due.saturating_sub(self.now()));
            if left.is_zero()
                || self.rate.load(Ordering::Relaxed) != rate
                || wait(left.min(MAX_WAIT))?
            {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn little_is_sent_at_once_under_a_low_limit() {
        assert_eq!(Limiter::new(0).portion(), u64::MAX);
        assert_eq!(Limiter::new(1).portion(), 1);
        assert_eq!(Limiter::new(400 << 20).portion(), 10 << 10);
    }

    /// Waits until the second of two waits. If it never does, the test fails as it looks at the
    /// outcome.
    fn until_waiting(limiter: &Limiter) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while limiter.clock.load(Ordering::Relaxed) < u64::from(u32::MAX)
            && Instant::now() < deadline
        {
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_waits_to_send_hears_that_the_peer_is_gone() {
        let (limiter, cancel) = (Limiter::new(1), Cancel::new().unwrap());
        let (theirs, ours) = UnixStream::pair().unwrap();
        let socket = StreamSocket::new(ours.into(), Duration::from_secs(3600)).unwrap();
        // Its time is what the next one waits for: twelve days.
        limiter.wait(1 << 20, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.wait_to_send(1, &cancel, &socket));
            until_waiting(&limiter);
            drop(theirs);
            assert!(matches!(
                waiting.join().unwrap(),
                Err(JobError::Transport(TransportError::Closed))
            ));
        });
    }

    #[test]
    fn who_waits_under_a_limit_goes_on_when_it_is_lifted() {
        let (limiter, cancel) = (Limiter::new(1), Cancel::new().unwrap());
        // What comes first need not wait; its time is what the second waits for: twelve days.
        limiter.wait(1 << 20, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.wait(1, &cancel));
            until_waiting(&limiter);
            limiter.set_rate(0);
            waiting.join().unwrap().unwrap();
        });
    }
}
