// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stopwatch: the time that something lasts, and may still last.

use crate::lock::lock;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The sum of the times between starts and stops.
#[derive(Debug, Default)]
pub struct Stopwatch(Mutex<Times>);

#[derive(Debug, Default)]
struct Times {
    /// The sum until the last stop.
    stopped: Duration,
    /// When it was started, if it runs.
    running: Option<Instant>,
}

impl Stopwatch {
    /// Starts it, if it does not run.
    pub fn start(&self) {
        lock(&self.0).running.get_or_insert_with(Instant::now);
    }

    /// Stops it, if it runs.
    pub fn stop(&self) {
        let mut times = lock(&self.0);
        if let Some(since) = times.running.take() {
            times.stopped += since.elapsed();
        }
    }

    /// The time so far in whole microseconds.
    pub fn micros(&self) -> u64 {
        let times = lock(&self.0);
        let sum = times.stopped + times.running.map_or(Duration::ZERO, |since| since.elapsed());
        u64::try_from(sum.as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_counts_only_between_start_and_stop() {
        let watch = Stopwatch::default();
        assert_eq!(watch.micros(), 0);
        watch.stop();
        assert_eq!(watch.micros(), 0, "it did not run");
        watch.start();
        let until = Instant::now() + Duration::from_millis(2);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        watch.start();
        assert!(watch.micros() >= 2_000, "the second start did not begin anew");
        watch.stop();
        let stopped = watch.micros();
        assert!(stopped >= 2_000);
        assert_eq!(watch.micros(), stopped, "it is stopped");
    }
}
