//! The bandwidth limit of all streams together.
//!
//! A virtual clock: each sender moves it on by the time that its bytes take, and waits until real time has caught up. No lock, and no
//! thread of its own.

use crate::job::{Cancel, JobError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far the clock may lag behind: what may be sent at once after a lull.
const BURST: Duration = Duration::from_millis(20);

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

    /// Changes the limit.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
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
        if due > now { cancel.sleep(Duration::from_nanos(due - now)) } else { Ok(()) }
    }
}
