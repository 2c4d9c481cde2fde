//! The bandwidth limit of all streams together.
//!
//! A virtual clock: each sender moves it on by the time that its bytes take, and waits until real time has caught up. No lock, and no
//! thread of its own.

use crate::job::{Cancel, JobError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far the clock may lag behind: what may be sent at once after a lull.
const BURST: Duration = Duration::from_millis(20);

/// Longest time that who waits does not see a change of the limit.
const LOOK: Duration = Duration::from_millis(100);

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

    /// Changes the limit. What was let through under the old one is forgotten: who waits for it goes on.
    pub fn set_rate(&self, rate: u64) {
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            self.clock.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Nanoseconds from `start`.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Waits until `bytes` may be sent.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait(&self, bytes: usize, cancel: &Cancel) -> Result<(), JobError> {
        self.wait_unless(bytes, cancel, || false)
    }

    /// The same, but not longer than until all is `over`.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait_unless(&self, bytes: usize, cancel: &Cancel, over: impl Fn() -> bool) -> Result<(), JobError> {
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
            if left.is_zero() || self.rate.load(Ordering::Relaxed) != rate || over() {
                return Ok(());
            }
            cancel.sleep(left.min(LOOK))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_under_a_limit_goes_on_when_it_is_lifted() {
        let (limiter, cancel) = (Limiter::new(1), Cancel::new().unwrap());
        // What comes first need not wait; its time is what the second waits for: twelve days.
        limiter.wait(1 << 20, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.wait(1, &cancel));
            while limiter.clock.load(Ordering::Relaxed) < u64::from(u32::MAX) {
                std::thread::yield_now();
            }
            limiter.set_rate(0);
            waiting.join().unwrap().unwrap();
        });
    }
}
