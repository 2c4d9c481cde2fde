// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bandwidth limit, shared by all streams of a job.
//!
//! The limiter is a virtual clock. Each sender advances the clock by the time that its bytes take
//! at the limit, and waits until real time has caught up. This needs no lock and no thread.
//!
//! After a pause in the traffic, the bytes of 20 ms (`BURST`) may be sent at once. A sender under a
//! low limit sends few pages at a time ([`Limiter::max_pages_per_send`]). So each wait is short,
//! and the peer hears from the sender often.
//!
//! A wait ends early when the job is cancelled or the limit changes. A sender's wait also ends when
//! the peer closes the connection, or when the deadline of the guest's stop has passed.

use super::error::TransportError;
use super::stream::StreamSocket;
use crate::cancel::Cancel;
use pageferry_protocol::memory::PAGE_SIZE;
use rustix::event::PollFlags;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest time by which the clock may lag behind real time. It bounds what may be sent at once
/// after a pause in the traffic.
const BURST: Duration = Duration::from_millis(20);

/// Longest time that the pages of one send may take at the limit.
const SEND_TIME: Duration = Duration::from_millis(100);

/// Longest delay before a waiter sees a change of the limit.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// Delays senders so that together they stay within the limit.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    /// Bytes per second; 0 means no limit.
    rate: AtomicU64,
    /// The time at which all bytes so far are sent at the limit, in nanoseconds from `start`.
    clock: AtomicU64,
}

impl Limiter {
    /// A limit of `rate` bytes per second; 0 means no limit.
    pub fn new(rate: u64) -> Self {
        Self { start: Instant::now(), rate: AtomicU64::new(rate), clock: AtomicU64::new(0) }
    }

    /// Changes the limit. The clock starts anew, and senders that wait under the old limit
    /// continue.
    pub fn set_rate(&self, rate: u64) {
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            self.clock.store(self.now(), Ordering::Relaxed);
        }
    }

    /// The current time, in nanoseconds from `start`.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// True if there is a limit.
    pub fn is_limited(&self) -> bool {
        self.rate.load(Ordering::Relaxed) != 0
    }

    /// Most pages to send at once, as one record or several; at least 1.
    pub fn max_pages_per_send(&self) -> u64 {
        match self.rate.load(Ordering::Relaxed) {
            0 => u64::MAX,
            rate => ((u128::from(rate) * SEND_TIME.as_millis() / 1000) as u64 / PAGE_SIZE).max(1),
        }
    }

    /// Waits until `bytes` may be read or written.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait(&self, bytes: usize, cancel: &Cancel) -> Result<(), TransportError> {
        self.wait_unless(bytes, cancel, || false)
    }

    /// Waits until `bytes` may be sent on `socket`.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile, the peer closes the connection, or the deadline of the
    /// guest's stop passes.
    pub fn wait_to_send(
        &self, bytes: usize, cancel: &Cancel, socket: &StreamSocket,
    ) -> Result<(), TransportError> {
        self.wait_with(bytes, |left| {
            let until = socket.stop_deadline().cap(Instant::now() + left);
            if cancel.wait(&[(socket.as_fd(), PollFlags::RDHUP)], until)?[0] {
                return Err(TransportError::Closed);
            }
            if socket.stop_deadline().has_passed() {
                return Err(TransportError::StopDeadlinePassed);
            }
            Ok(false)
        })
    }

    /// As [`Limiter::wait`], but ends early once `over` returns true.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait_unless(
        &self, bytes: usize, cancel: &Cancel, over: impl Fn() -> bool,
    ) -> Result<(), TransportError> {
        self.wait_with(bytes, |left| {
            if over() {
                return Ok(true);
            }
            cancel.sleep(left)?;
            Ok(false)
        })
    }

    /// Adds `bytes` to the clock and waits until they may be sent. `wait` waits for one piece of
    /// that time, at most [`MAX_WAIT`], and returns true to end the wait.
    fn wait_with(
        &self, bytes: usize, mut wait: impl FnMut(Duration) -> Result<bool, TransportError>,
    ) -> Result<(), TransportError> {
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
    fn a_low_limit_makes_small_sends() {
        assert_eq!(Limiter::new(0).max_pages_per_send(), u64::MAX);
        assert_eq!(Limiter::new(1).max_pages_per_send(), 1);
        assert_eq!(Limiter::new(400 << 20).max_pages_per_send(), 10 << 10);
    }

    /// Returns once the second of two senders waits. If it never waits, the test fails when it
    /// checks the outcome.
    fn until_waiting(limiter: &Limiter) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while limiter.clock.load(Ordering::Relaxed) < u64::from(u32::MAX)
            && Instant::now() < deadline
        {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_closed_connection_ends_the_wait_of_a_sender() {
        let (limiter, cancel) = (Limiter::new(1), Cancel::new().unwrap());
        let (theirs, ours) = UnixStream::pair().unwrap();
        let socket = StreamSocket::new(ours.into(), Duration::from_secs(3600)).unwrap();
        // The first call does not wait. The second waits for the time of the first: twelve days.
        limiter.wait(1 << 20, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.wait_to_send(1, &cancel, &socket));
            until_waiting(&limiter);
            drop(theirs);
            assert!(matches!(waiting.join().unwrap(), Err(TransportError::Closed)));
        });
    }

    #[test]
    fn a_removed_limit_ends_the_wait_of_a_sender() {
        let (limiter, cancel) = (Limiter::new(1), Cancel::new().unwrap());
        // The first call does not wait. The second waits for the time of the first: twelve days.
        limiter.wait(1 << 20, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.wait(1, &cancel));
            until_waiting(&limiter);
            limiter.set_rate(0);
            waiting.join().unwrap().unwrap();
        });
    }
}
