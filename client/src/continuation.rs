// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the next agent is had for a guest whose memory is missing, and when that is given up.
//!
//! The first attempt is made at once, because the guest may be waiting. The pauses between further
//! ones grow. An agent that is lost again within a second counts as an attempt that failed: one
//! that always dies as it continues must not be started for ever while the guest waits.

use crate::wakeup::Wakeup;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An agent that served for this long was a good one.
const SERVED: Duration = Duration::from_secs(1);
/// By how much each pause is longer than the one before.
const STEP: Duration = Duration::from_millis(5);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(1);

/// How a supervisor replaces an agent that was lost while memory is missing.
pub(crate) struct Replacer {
    /// Attaches an agent in place of the one of this connection. Does nothing if the VMM has
    /// decided otherwise.
    pub(crate) replace: Box<dyn Fn(u64) -> Result<(), String> + Send + Sync>,
    /// Wakes the supervisor.
    pub(crate) wakeup: Arc<Wakeup>,
    /// How long the guest waits for the next agent.
    pub(crate) limit: Duration,
}

impl std::fmt::Debug for Replacer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replacer").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// The attempts since an agent has served for a while.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    count: u32,
    lost_at: Option<Instant>,
    attached_at: Option<Instant>,
}

impl Attempts {
    /// An agent was lost.
    pub(crate) fn lost(&mut self, now: Instant) {
        if self.attached_at.is_some_and(|at| now.duration_since(at) >= SERVED) {
            *self = Self::default();
        }
        self.lost_at.get_or_insert(now);
    }

    /// The pause before the next attempt. `None` if there is no other within `limit`.
    pub(crate) fn next(&mut self, now: Instant, limit: Duration) -> Option<Duration> {
        let waited = self.lost_at.map_or(Duration::ZERO, |at| now.duration_since(at));
        if self.count > 0 && waited >= limit {
            return None;
        }
        let pause = (STEP * self.count).min(LONGEST);
        self.count += 1;
        Some(pause)
    }

    /// An agent continues.
    pub(crate) fn attached(&mut self, now: Instant) {
        self.attached_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn agents_that_die_at_once_are_attempts_until_the_time_is_over() {
        let (start, mut attempts) = (Instant::now(), Attempts::default());
        let mut now = start;
        let mut count = 0;
        attempts.lost(now);
        while let Some(pause) = attempts.next(now, LIMIT) {
            assert_eq!(pause, (STEP * count).min(LONGEST));
            count += 1;
            now += pause;
            attempts.attached(now);
            now += Duration::from_millis(100);
            attempts.lost(now);
        }
        assert!(now - start >= LIMIT && now - start < LIMIT + 2 * LONGEST, "{:?}", now - start);
        assert!(count > 60, "{count}");
        // One that has served for a while begins anew.
        attempts.attached(now);
        attempts.lost(now + SERVED);
        assert_eq!(attempts.next(now + SERVED, LIMIT), Some(Duration::ZERO));
    }

    #[test]
    fn without_time_there_is_one_attempt() {
        let (now, mut attempts) = (Instant::now(), Attempts::default());
        attempts.lost(now);
        assert_eq!(attempts.next(now, Duration::ZERO), Some(Duration::ZERO));
        assert_eq!(attempts.next(now, Duration::ZERO), None);
    }
}
