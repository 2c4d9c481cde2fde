//! The bandwidth limit of all streams together.
//!
//! A virtual clock: each sender moves it on by the time that its bytes take, and waits until real time has caught up. No lock, and no
//! thread of its own.

use crate::job::{Cancel, JobError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far the clock may lag behind: what may be sent at once after a lull.
const BURST: Duration = Duration::from_millis(20);

/// Longest time that a sender sleeps before it looks whether the limit was changed.
const LOOK: Duration = Duration::from_millis(20);

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

    /// Changes the limit, also for those who wait already.
    pub fn set_rate(&self, rate: u64) {
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            // What was let through at the old rate is no debt at the new one.
            self.clock.store(0, Ordering::Relaxed);
        }
    }

    /// Waits until `bytes` may be sent.
    ///
    /// # Errors
    /// If the job is cancelled meanwhile.
    pub fn wait(&self, bytes: usize, cancel: &Cancel) -> Result<(), JobError> {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(());
        }
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let floor = now.saturating_sub(BURST.as_nanos() as u64);
        let cost = (bytes as u128 * 1_000_000_000 / u128::from(rate)) as u64;
        self.clock.fetch_max(floor, Ordering::Relaxed);
        let due = self.clock.fetch_add(cost, Ordering::Relaxed);
        let deadline = self.start + Duration::from_nanos(due);
        while self.rate.load(Ordering::Relaxed) == rate {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            cancel.sleep(left.min(LOOK))?;
        }
        // Sent at once: at the new rate it would have been a moment longer or shorter.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_raised_holds_for_those_who_wait_already() {
        let (limiter, cancel) = (Limiter::new(1), Cancel::new().unwrap());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                // At this rate the second waits for twelve days.
                limiter.wait(1 << 20, &cancel)?;
                limiter.wait(1, &cancel)
            });
            while limiter.clock.load(Ordering::Relaxed) < 1 << 40 {
                std::thread::yield_now();
            }
            limiter.set_rate(1 << 40);
            waiting.join().unwrap().unwrap();
        });
        limiter.wait(1, &cancel).unwrap();
    }
}
