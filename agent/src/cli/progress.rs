// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The progress of a job: a bar on a terminal, lines in a pipe or file, or JSON objects.
//!
//! A bar or line has the phase, what is done of how much, the rate, the elapsed time and the time
//! that is left. It fits 80 columns. The rate and the time left come from the last three seconds.

use super::show::{self, bytes, to_json};
use crate::snapshot::upload_progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// The time over which the rate is measured.
const WINDOW: Duration = Duration::from_secs(3);
/// Time between two lines of the same phase.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Where the progress goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// One JSON object a line, on standard output.
    Json,
    /// On standard error: the result goes to standard output.
    StandardError,
    /// On standard output, if that is no terminal: the progress is what the command is for.
    StandardOutput,
}

/// Shows the progress of one job.
pub struct Progress {
    sink: Sink,
    meter: Meter,
}

enum Sink {
    Bar(ProgressBar),
    Lines { out: Box<dyn Write>, last: Option<(Phase, Instant)> },
    Json,
}

impl Progress {
    /// Progress that shows nothing yet.
    pub fn new(output: Output) -> Self {
        let terminal = |fd: &dyn io::IsTerminal| fd.is_terminal();
        let lines = |out| Sink::Lines { out, last: None };
        let sink = match output {
            Output::Json => Sink::Json,
            Output::StandardOutput if !terminal(&io::stdout()) => lines(Box::new(io::stdout())),
            _ if terminal(&io::stderr()) => Sink::Bar(bar()),
            _ => lines(Box::new(io::stderr())),
        };
        Self { sink, meter: Meter::default() }
    }

    /// Shows the status of a job that goes on.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn show(&mut self, status: &JobStatus) -> io::Result<()> {
        let now = Instant::now();
        self.meter.add(now, status);
        match &mut self.sink {
            Sink::Json => writeln!(io::stdout().lock(), "{}", Value::Object(to_json(status))),
            Sink::Bar(bar) => {
                let (done, total) = amount(status);
                // The bar may be drawn after each of these: a phase always has its numbers.
                bar.set_message(self.meter.sentence(status));
                bar.set_length(total.max(1));
                bar.set_position(done.min(total));
                bar.set_prefix(phase_name(status));
                Ok(())
            }
            Sink::Lines { out, last } => {
                let due = last.is_none_or(|(phase, at)| {
                    phase != status.phase || now.duration_since(at) >= LINE_INTERVAL
                });
                if due {
                    *last = Some((status.phase, now));
                    let percent = percent(status).map_or(String::new(), |done| format!(" {done}%"));
                    let (name, sentence) = (phase_name(status), self.meter.sentence(status));
                    writeln!(out, "{name}{percent}, {sentence}")?;
                    out.flush()?;
                }
                Ok(())
            }
        }
    }

    /// Prints lines for the operator on standard error, above the bar.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn tell(&self, text: &str) -> io::Result<()> {
        let write = || writeln!(io::stderr().lock(), "{text}");
        match &self.sink {
            Sink::Bar(bar) => bar.suspend(write),
            _ => write(),
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        if let Sink::Bar(bar) = &self.sink {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // The template is a constant. If it were wrong, the bar would have the default style.
    if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {percent:>3}% {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// The phase, and the number of the pass.
fn phase_name(status: &JobStatus) -> String {
    match status.phase {
        Phase::Passes => format!("pass {}", status.counters.passes),
        _ => show::phase(status).to_owned(),
    }
}

fn percent(status: &JobStatus) -> Option<u64> {
    let (done, total) = amount(status);
    (total > 0).then(|| (u128::from(done.min(total)) * 100 / u128::from(total)) as u64)
}

/// Pages that are done, and all pages; 0 if it is not known how many there are. A migration counts
/// the pages of its current pass. A restore does not count the zero pages of an image, which are
/// holes from the start. A snapshot counts its pages once more while it uploads them to a store.
fn amount(status: &JobStatus) -> (u64, u64) {
    if let Some((done, all)) = upload_progress::of_status(status) {
        return (done / PAGE_SIZE, all / PAGE_SIZE);
    }
    let counters = &status.counters;
    let moved_to_guest = counters.requested_pages + counters.pushed_pages + counters.dropped_pages;
    match status.kind {
        _ if status.phase.is_postcopy() => {
            (moved_to_guest, moved_to_guest + counters.remaining_pages)
        }
        JobKind::Outgoing => (counters.pass_pages_done, counters.pass_pages),
        JobKind::Snapshot => {
            let done = counters.pages_saved + counters.zero_pages;
            (done, done + counters.remaining_pages)
        }
        JobKind::Restore => {
            let done = counters.pages_restored + counters.dropped_pages;
            (done, done + counters.remaining_pages)
        }
        JobKind::Incoming => (counters.pages_received + counters.zero_pages, 0),
        JobKind::None => (0, 0),
    }
}

/// Measures how fast a job is.
#[derive(Debug, Default)]
struct Meter {
    samples: VecDeque<Sample>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    /// Bytes on the wire, or of the image.
    bytes: u64,
    /// Pages that are done.
    done: u64,
}

impl Meter {
    fn add(&mut self, at: Instant, status: &JobStatus) {
        let uploaded = upload_progress::of_status(status).map_or(0, |(done, _)| done);
        let bytes = status.counters.wire_bytes + status.counters.image_bytes + uploaded;
        let (done, _) = amount(status);
        // A new pass counts from 0, and so does an upload.
        if self.samples.back().is_some_and(|last| last.done > done) {
            self.samples.clear();
        }
        self.samples.push_back(Sample { at, bytes, done });
        while self.samples.len() > 2 && at.duration_since(self.samples[1].at) > WINDOW {
            self.samples.pop_front();
        }
    }

    /// Bytes and pages per second. Before there are two samples: since the start of the job.
    fn rates(&self, status: &JobStatus) -> (f64, f64) {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return (0.0, 0.0);
        };
        let seconds = last.at.duration_since(first.at).as_secs_f64();
        if self.samples.len() < 2 || seconds <= 0.0 {
            let seconds = (status.counters.total_us as f64 / 1e6).max(1e-6);
            return (last.bytes as f64 / seconds, last.done as f64 / seconds);
        }
        let bytes = last.bytes.saturating_sub(first.bytes) as f64 / seconds;
        (bytes, last.done.saturating_sub(first.done) as f64 / seconds)
    }

    /// What is done of how much, the rate, the elapsed time, and the time left if it is known.
    fn sentence(&self, status: &JobStatus) -> String {
        let (done, total) = amount(status);
        let (bytes_per_s, pages_per_s) = self.rates(status);
        let size = |pages: u64| bytes(pages.saturating_mul(PAGE_SIZE));
        let elapsed = clock(Duration::from_micros(status.counters.total_us));
        let rate = format!("{}/s", bytes(bytes_per_s as u64));
        match total {
            0 => format!("{}, {rate}, {elapsed}", size(done)),
            _ => {
                let done_of =
                    size_of(done.saturating_mul(PAGE_SIZE), total.saturating_mul(PAGE_SIZE));
                let left = total.saturating_sub(done) as f64 / pages_per_s;
                match Duration::try_from_secs_f64(left) {
                    Ok(left) if done < total => {
                        format!("{done_of}, {rate}, {elapsed}, {} left", clock(left))
                    }
                    _ => format!("{done_of}, {rate}, {elapsed}"),
                }
            }
        }
    }
}

/// Two sizes in the unit of the larger one, such as "0.3 of 1.0 GiB".
fn size_of(done: u64, total: u64) -> String {
    let all = bytes(total);
    let (number, unit) = all.split_once(' ').unwrap_or((&all, "B"));
    let Ok(shown) = number.parse::<f64>() else { return all };
    let share = if total == 0 { 0.0 } else { done as f64 / total as f64 };
    format!("{:.1} of {number} {unit}", shown * share)
}

/// A time in whole seconds, such as "7 s", "2:05" or "1:02:05".
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes}:{seconds:02}"),
        (hours, minutes, seconds) => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::Counters;

    fn status(kind: JobKind, phase: Phase, counters: Counters) -> JobStatus {
        JobStatus { kind, phase, counters, ..JobStatus::default() }
    }

    #[test]
    fn zero_pages_count_in_a_snapshot_and_not_in_a_restore() {
        let counters = Counters { zero_pages: 500, remaining_pages: 10, ..Counters::default() };
        let saved = Counters { pages_saved: 3, ..counters };
        let restored = Counters { pages_restored: 3, dropped_pages: 2, ..counters };
        assert_eq!(amount(&status(JobKind::Snapshot, Phase::Saving, saved)), (503, 513));
        assert_eq!(amount(&status(JobKind::Restore, Phase::Restoring, restored)), (5, 15));
    }

    #[test]
    fn times_are_shown_as_on_a_clock() {
        let shown = |seconds| clock(Duration::from_secs(seconds));
        assert_eq!(
            (shown(7), shown(125), shown(3725)),
            ("7 s".into(), "2:05".into(), "1:02:05".into())
        );
    }

    #[test]
    fn rate_and_time_left_are_there_from_the_first_status() {
        let mut meter = Meter::default();
        let gib = (1 << 30) / PAGE_SIZE;
        let first = Counters {
            pass_pages: gib,
            pass_pages_done: gib / 4,
            wire_bytes: 256 << 20,
            total_us: 1_000_000,
            ..Counters::default()
        };
        let start = Instant::now();
        let first = status(JobKind::Outgoing, Phase::Passes, first);
        meter.add(start, &first);
        assert_eq!(meter.sentence(&first), "0.2 of 1.0 GiB, 256.0 MiB/s, 1 s, 3 s left");
        // Twice as fast in the second second.
        let mut second = first.clone();
        second.counters.pass_pages_done = gib * 3 / 4;
        second.counters.wire_bytes = 768 << 20;
        second.counters.total_us = 2_000_000;
        meter.add(start + Duration::from_secs(1), &second);
        assert_eq!(meter.sentence(&second), "0.8 of 1.0 GiB, 512.0 MiB/s, 2 s, 0 s left");
        // The next pass counts from 0.
        second.counters.pass_pages_done = 0;
        meter.add(start + Duration::from_secs(2), &second);
        assert_eq!(meter.samples.len(), 1);
    }

    #[test]
    fn an_upload_has_its_own_progress_after_that_of_the_memory() {
        let mut meter = Meter::default();
        let start = Instant::now();
        let (mib, pages) = (1 << 20, (1 << 30) / PAGE_SIZE);
        let saved = Counters { pages_saved: pages, image_bytes: 1 << 30, ..Counters::default() };
        let mut status = status(JobKind::Snapshot, Phase::Saving, saved);
        meter.add(start, &status);
        assert_eq!((phase_name(&status), percent(&status)), ("saving".into(), Some(100)));
        for (second, done) in [(1, 0), (2, 64), (3, 128)] {
            status.error = Some(upload_progress::sentence(done * mib, 256 * mib));
            status.counters.total_us = second * 1_000_000;
            meter.add(start + Duration::from_secs(second), &status);
        }
        assert_eq!((phase_name(&status), percent(&status)), ("uploading".into(), Some(50)));
        assert_eq!(meter.sentence(&status), "128.0 of 256.0 MiB, 64.0 MiB/s, 3 s, 2 s left");
    }

    #[test]
    fn longest_line_fits_80_columns() {
        let mut meter = Meter::default();
        let counters = Counters {
            requested_pages: 1 << 31,
            remaining_pages: 1 << 31,
            // 8 TiB in ten hours.
            wire_bytes: 8 << 40,
            total_us: 36_000_000_000,
            ..Counters::default()
        };
        let longest = status(JobKind::Outgoing, Phase::PostcopyPaused, counters);
        meter.add(Instant::now(), &longest);
        // The bar takes what is left.
        let line = format!("{}  100% {}", phase_name(&longest), meter.sentence(&longest));
        assert!(line.len() <= 80, "{} columns: {line}", line.len());
    }
}
