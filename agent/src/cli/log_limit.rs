//! Limits how much one place in the code may log.
//!
//! A program that reaches a socket of the agent can make it log: by requests that the agent
//! refuses, by connections that it drops. So each call of a log macro gets `LINES` lines in each
//! [`WINDOW`]. The other lines are counted, and the log says how many were left out.
//!
//! Errors are never left out, and neither are the lines of `JOBS`, which say how a job went and
//! ended. Debug and trace lines are not limited: they are off unless somebody asks for all of them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most lines of one place in a window.
const LINES: u32 = 20;
/// The time that they are counted for.
pub const WINDOW: Duration = Duration::from_secs(1);
/// The module whose lines are never left out.
const JOBS: &str = "pageferry_agent::job";

/// Where a line comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    file: &'static str,
    line: u32,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
    left_out: u64,
}

/// How many lines of one place were left out.
#[derive(Debug, PartialEq, Eq)]
pub struct LeftOut {
    place: Place,
    lines: u64,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place: Place { file, line }, lines } = self;
        write!(
            f,
            "{lines} more lines from {file}:{line} were left out: at most {LINES} a second are written"
        )
    }
}

/// The lines of all places. There are as many places as the code has calls of log macros.
#[derive(Debug, Clone, Default)]
pub struct Limit(Arc<Mutex<BTreeMap<Place, Window>>>);

impl Limit {
    fn places(&self) -> MutexGuard<'_, BTreeMap<Place, Window>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if this line is to be written. Otherwise it is counted.
    fn takes(&self, record: &log::Record<'_>, now: Instant) -> bool {
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
        // One with lines left out ends when the log has said so.
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

    /// What was left out in windows that are over, or that end now. The log is to say so.
    pub fn left_out(&self, now: Instant, end: bool) -> Vec<LeftOut> {
        let mut places = self.places();
        let over = |window: &Window| end || now.saturating_duration_since(window.began) >= WINDOW;
        let over = places.iter_mut().filter(|(_, window)| window.left_out > 0 && over(window));
        over.map(|(place, window)| {
            let lines = window.left_out;
            *window = Window { began: now, lines: 0, left_out: 0 };
            LeftOut { place: *place, lines }
        })
        .collect()
    }
}

/// A logger whose lines are limited.
pub struct Limited<L> {
    logger: L,
    limit: Limit,
}

impl<L> Limited<L> {
    /// `logger` with this limit.
    pub fn new(logger: L, limit: Limit) -> Self {
        Self { logger, limit }
    }
}

impl<L: log::Log> log::Log for Limited<L> {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.logger.enabled(record.metadata()) && self.limit.takes(record, Instant::now()) {
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

    fn takes(limit: &Limit, level: Level, line: u32, module: &'static str, now: Instant) -> bool {
        let record = log::Record::builder()
            .level(level)
            .file_static(Some("src/server.rs"))
            .line(Some(line))
            .module_path_static(Some(module))
            .build();
        limit.takes(&record, now)
    }

    #[test]
    fn one_place_has_twenty_lines_a_second_and_the_log_says_how_many_more_there_were() {
        let (limit, start) = (Limit::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        let warn = |line, millis| takes(&limit, Level::Warn, line, "server", at(millis));
        let taken = (0..1000).filter(|millis| warn(1, *millis)).count();
        assert_eq!(taken, 20);
        assert!(warn(2, 500), "another place has lines of its own");
        assert!(limit.left_out(at(999), false).is_empty(), "the second is not over");
        let said: Vec<String> =
            limit.left_out(at(1000), false).iter().map(LeftOut::to_string).collect();
        let sentence =
            "980 more lines from src/server.rs:1 were left out: at most 20 a second are written";
        assert_eq!(said, [sentence]);
        assert!(warn(1, 1001) && limit.left_out(at(5000), true).is_empty());
        // The end does not wait for the second to be over.
        let taken = (0..30).filter(|_| warn(3, 6000)).count();
        assert_eq!((taken, limit.left_out(at(6000), true)[0].lines), (20, 10));
    }

    #[test]
    fn errors_and_the_lines_of_jobs_are_never_left_out() {
        let (limit, now) = (Limit::default(), Instant::now());
        for _ in 0..100 {
            assert!(takes(&limit, Level::Error, 1, "pageferry_agent::session", now));
            assert!(takes(&limit, Level::Info, 2, "pageferry_agent::job", now));
            assert!(takes(&limit, Level::Debug, 3, "pageferry_agent::hooks", now));
        }
        assert!(limit.left_out(now, true).is_empty());
    }
}
