// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A rate limit for log lines, for each place in the code.
//!
//! A program that can connect to a socket of the agent can make it write log lines, for example by
//! requests that the agent refuses. So each call of a log macro may write `LINES` lines in each
//! [`WINDOW`]. Further lines are left out and counted, and after the window the log says how many.
//!
//! Errors are never left out. Neither are the lines of the module `JOBS`, which say how a job went
//! and ended. Debug and trace lines are not limited: they are off unless the operator asks for all
//! of them.

use crate::lock::lock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most lines of one place in a window.
const LINES: u32 = 20;
/// Length of a window, in which the lines of a place are counted.
pub const WINDOW: Duration = Duration::from_secs(1);
/// The module whose lines are never left out.
const JOBS: &str = "pageferry_agent::job";

/// The call of a log macro that a line comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    file: &'static str,
    line: u32,
}

/// The current window of a place.
#[derive(Debug)]
struct Window {
    began: Instant,
    /// Lines that were written.
    lines: u32,
    left_out: u64,
}

/// The number of lines of one place that were left out in a window.
#[derive(Debug, PartialEq, Eq)]
pub struct SuppressedLines {
    place: Place,
    lines: u64,
}

impl fmt::Display for SuppressedLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place: Place { file, line }, lines } = self;
        write!(
            f,
            "{lines} more lines from {file}:{line} were left out: at most {LINES} a second are written"
        )
    }
}

/// The windows of all places. Their number is bounded by the number of log calls in the code.
#[derive(Debug, Clone, Default)]
pub struct Limit(Arc<Mutex<BTreeMap<Place, Window>>>);

impl Limit {
    fn places(&self) -> MutexGuard<'_, BTreeMap<Place, Window>> {
        lock(&self.0)
    }

    /// Returns true if this line may be written. Otherwise counts it as left out.
    fn allows(&self, record: &log::Record<'_>, now: Instant) -> bool {
        let limited = matches!(record.level(), log::Level::Warn | log::Level::Info);
        let of_a_job = record.module_path().is_some_and(|path| path.starts_with(JOBS));
        let (true, false, Some(file), Some(line)) =
            (limited, of_a_job, record.file_static(), record.line())
        else {
            return true;
        };
        let mut places = self.places();
        let window = places.entry(Place { file, line }).or_insert(Window {
            began: now,
            lines: 0,
            left_out: 0,
        });
        // A window in which lines were left out ends only when the log has reported them.
        if window.left_out == 0 && now.saturating_duration_since(window.began) >= WINDOW {
            *window = Window { began: now, lines: 0, left_out: 0 };
        }
        if window.lines < LINES {
            window.lines += 1;
            return true;
        }
        window.left_out += 1;
        false
    }

    /// The lines that were left out in windows that are over; with `end`, in all windows. The
    /// caller writes them to the log.
    pub fn left_out(&self, now: Instant, end: bool) -> Vec<SuppressedLines> {
        let mut places = self.places();
        let over = |window: &Window| end || now.saturating_duration_since(window.began) >= WINDOW;
        let over = places.iter_mut().filter(|(_, window)| window.left_out > 0 && over(window));
        over.map(|(place, window)| {
            let lines = window.left_out;
            *window = Window { began: now, lines: 0, left_out: 0 };
            SuppressedLines { place: *place, lines }
        })
        .collect()
    }
}

/// A logger with a rate limit.
pub struct RateLimitedLog<L> {
    logger: L,
    limit: Limit,
}

impl<L> RateLimitedLog<L> {
    /// Limits the lines of `logger`.
    pub fn new(logger: L, limit: Limit) -> Self {
        Self { logger, limit }
    }
}

impl<L: log::Log> log::Log for RateLimitedLog<L> {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.logger.enabled(record.metadata()) && self.limit.allows(record, Instant::now()) {
            self.logger.log(record);
        }
    }

    fn flush(&self) {
        self.logger.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;

    fn allows(limit: &Limit, level: Level, line: u32, module: &'static str, now: Instant) -> bool {
        let record = log::Record::builder()
            .level(level)
            .file_static(Some("src/server.rs"))
            .line(Some(line))
            .module_path_static(Some(module))
            .build();
        limit.allows(&record, now)
    }

    #[test]
    fn a_place_writes_twenty_lines_a_second_and_the_rest_is_counted() {
        let (limit, start) = (Limit::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        let warn = |line, millis| allows(&limit, Level::Warn, line, "server", at(millis));
        let written = (0..1000).filter(|millis| warn(1, *millis)).count();
        assert_eq!(written, 20);
        assert!(warn(2, 500), "another place has its own limit");
        assert!(limit.left_out(at(999), false).is_empty(), "the second is not over");
        let reported: Vec<String> =
            limit.left_out(at(1000), false).iter().map(SuppressedLines::to_string).collect();
        let sentence =
            "980 more lines from src/server.rs:1 were left out: at most 20 a second are written";
        assert_eq!(reported, [sentence]);
        assert!(warn(1, 1001) && limit.left_out(at(5000), true).is_empty());
        // At the end of the process, a window that is not over is reported, too.
        let written = (0..30).filter(|_| warn(3, 6000)).count();
        assert_eq!((written, limit.left_out(at(6000), true)[0].lines), (20, 10));
    }

    #[test]
    fn errors_and_the_lines_of_jobs_are_never_left_out() {
        let (limit, now) = (Limit::default(), Instant::now());
        for _ in 0..100 {
            assert!(allows(&limit, Level::Error, 1, "pageferry_agent::session", now));
            assert!(allows(&limit, Level::Info, 2, "pageferry_agent::job", now));
            assert!(allows(&limit, Level::Debug, 3, "pageferry_agent::hooks", now));
        }
        assert!(limit.left_out(now, true).is_empty());
    }
}
