// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Backoff of a listener that cannot accept a connection.
//!
//! An accept usually fails because the process, or the system, has no free descriptor or memory.
//! The connection stays in the listener's queue and keeps the listener readable, so a caller that
//! tries again at once would spin. So the next attempt comes after [`PAUSE`], and the log gets at
//! most one line a second.

use std::time::{Duration, Instant};

/// Time until the next attempt.
pub const PAUSE: Duration = Duration::from_millis(100);
/// Least time between two lines in the log.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Limits the log lines of one kind, and counts the failures between them.
#[derive(Debug, Default)]
pub struct LineLimit {
    logged: Option<Instant>,
    unlogged: u64,
}

impl LineLimit {
    /// Writes that `what` happened at `now` because of `error`, unless there was such a line within
    /// the last second.
    pub fn warn(&mut self, what: &str, error: &dyn std::error::Error, now: Instant) {
        if let Some(unlogged) = self.line_is_due(now) {
            let error = crate::error::chain(error);
            log::warn!("{what}: {error} ({unlogged} more since the last such line)");
        }
    }

    /// The number of failures that got no line, if a line is due at `now`; otherwise counts this
    /// one.
    fn line_is_due(&mut self, now: Instant) -> Option<u64> {
        if self.logged.is_some_and(|logged| now.saturating_duration_since(logged) < LOG_EVERY) {
            self.unlogged += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

/// Limits the log lines of one listener.
#[derive(Debug, Default)]
pub struct Backoff(LineLimit);

impl Backoff {
    /// Reports that an attempt failed at `now`. Writes a log line unless there was one within the
    /// last second.
    pub fn failed(&mut self, error: &dyn std::error::Error, now: Instant) {
        self.0.warn("cannot accept a connection", error, now);
    }
}

/// True if the connection was closed before it was accepted, or there was none.
pub fn is_momentary(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_one_second_get_one_line_and_are_counted() {
        let (mut backoff, start) = (LineLimit::default(), Instant::now());
        assert_eq!(backoff.line_is_due(start), Some(0));
        for millis in 1..1000 {
            assert_eq!(backoff.line_is_due(start + Duration::from_millis(millis)), None);
        }
        assert_eq!(backoff.line_is_due(start + LOG_EVERY), Some(999));
        assert_eq!(backoff.line_is_due(start + 2 * LOG_EVERY), Some(0));
    }
}
