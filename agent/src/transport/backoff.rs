//! What to do when a connection cannot be accepted.
//!
//! It usually means that the process, or the system, is out of descriptors or memory. The
//! connection stays in the listener's queue and keeps the listener readable, so whoever just tries
//! again spins. Here the next attempt comes after a pause, and the log gets one line a second.

use std::time::{Duration, Instant};

/// Time until the next attempt.
pub const PAUSE: Duration = Duration::from_millis(100);
/// Time between two lines in the log.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Paces the log of one listener.
#[derive(Debug, Default)]
pub struct Backoff {
    logged: Option<Instant>,
    unlogged: u64,
}

impl Backoff {
    /// An attempt failed at `now`: says so in the log, unless it did within the last second.
    pub fn failed(&mut self, error: &dyn std::error::Error, now: Instant) {
        if let Some(unlogged) = self.line_is_due(now) {
            let error = crate::error::chain(error);
            log::warn!(
                "cannot accept a connection: {error} ({unlogged} more failures since the last such line)"
            );
        }
    }

    /// The number of failures without a line, if it is time for one.
    fn line_is_due(&mut self, now: Instant) -> Option<u64> {
        if self.logged.is_some_and(|logged| now.saturating_duration_since(logged) < LOG_EVERY) {
            self.unlogged += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_failures_in_a_second_are_one_line_and_the_next_line_counts_them() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        assert_eq!(backoff.line_is_due(start), Some(0));
        for millis in 1..1000 {
            assert_eq!(backoff.line_is_due(start + Duration::from_millis(millis)), None);
        }
        assert_eq!(backoff.line_is_due(start + LOG_EVERY), Some(999));
        assert_eq!(backoff.line_is_due(start + 2 * LOG_EVERY), Some(0));
    }
}
