// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The output of `mock_vmm`: a progress bar while the job runs, and a report at its end.

use crate::Error;
use crate::vmm::MockVmm;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry_client::{Counters, JobStatus, Phase};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Interval at which the job is polled.
pub(super) const LOOK: Duration = Duration::from_millis(2);

/// The end of a job, as one side sees it. A value that this side does not know is `None`, and
/// `null` in JSON.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Name of the job's last phase: `completed`, `failed` or `cancelled`.
    pub status: String,
    /// Why it failed; empty if it did not.
    pub error: String,
    /// The counters of the job.
    #[serde(skip)]
    pub counters: Counters,
    /// The counters of the job's kind, by name.
    #[serde(flatten)]
    pub named: BTreeMap<&'static str, u64>,
    /// Bytes allocated at the source at the start, before any discard.
    pub source_allocated_before: Option<u64>,
    /// Bytes allocated at the source at the end.
    pub source_allocated_after: Option<u64>,
    /// Bytes allocated at the destination when all memory had arrived, before its guest wrote.
    pub destination_allocated: Option<u64>,
}

impl Report {
    /// Reports the present state of a job.
    pub fn new(status: &JobStatus) -> Self {
        Self {
            status: status.phase.name().to_owned(),
            // The error of a job that completed is only a warning.
            error: if status.phase == Phase::Completed {
                String::new()
            } else {
                status.error_text().to_owned()
            },
            counters: status.counters,
            named: status.counters.of_kind(status.kind).collect(),
            ..Self::default()
        }
    }

    /// Reports a migration for which no job started, or whose job cannot be queried any more.
    pub fn failed(error: &Error) -> Self {
        Self { status: Phase::Failed.name().to_owned(), error: error.sentence(), ..Self::default() }
    }

    /// True if the migration was verified and committed.
    pub fn succeeded(&self) -> bool {
        self.status == Phase::Completed.name() && self.error.is_empty()
    }

    /// The report as one JSON object.
    pub fn json(&self) -> String {
        // This cannot fail: the report has only numbers, strings and nulls.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let milliseconds = |microseconds: u64| microseconds as f64 / 1000.0;
        let counters = &self.counters;
        if self.succeeded() {
            write!(formatter, "completed in {:.0} ms", milliseconds(counters.total_us))?;
            if counters.passes > 0 {
                write!(formatter, ", {} passes", counters.passes)?;
            }
            if counters.time_to_run_us > 0 {
                let ready = milliseconds(counters.time_to_run_us);
                write!(formatter, ", the guest was ready after {ready:.1} ms")?;
            } else if self.named.contains_key("downtime_us") {
                let paused = milliseconds(counters.downtime_us);
                write!(formatter, ", the guest was paused for {paused:.1} ms")?;
            }
        } else {
            write!(formatter, "{}: {}", self.status, self.error)?;
        }
        formatter.write_str("\npages:")?;
        for (moved, what) in [
            (counters.pages_sent, "sent"),
            (counters.pages_received, "received"),
            (counters.pages_saved, "saved"),
            (counters.pages_restored, "restored"),
        ] {
            if moved > 0 {
                write!(formatter, " {moved} {what},")?;
            }
        }
        write!(
            formatter,
            " {} zero, {} discarded, {} stray; {}",
            counters.zero_pages,
            counters.discarded_pages,
            counters.stray_pages,
            mebibytes(counters.wire_bytes + counters.image_bytes)
        )?;
        formatter.write_str(if counters.image_bytes > 0 {
            " of the image"
        } else {
            " on the wire"
        })?;
        if counters.requested_pages + counters.pushed_pages + counters.dropped_pages > 0 {
            write!(
                formatter,
                "\nwhile it ran: {} pages requested, {} pushed, {} dropped by discard, {} released",
                counters.requested_pages,
                counters.pushed_pages,
                counters.dropped_pages,
                counters.released_pages
            )?;
            if counters.faults > 0 {
                write!(
                    formatter,
                    "; {} faults, p50 {} us, p99 {} us, most {} us",
                    counters.faults,
                    counters.fault_p50_us,
                    counters.fault_p99_us,
                    counters.fault_max_us
                )?;
            }
        }
        let (for_writes, for_discards) =
            (counters.copied_before_write_pages, counters.copied_before_discard_pages);
        if for_writes + for_discards > 0 {
            write!(
                formatter,
                "\nsaved before their turn: {for_writes} pages for writes, {for_discards} for discards"
            )?;
        }
        if let (Some(before), Some(after)) =
            (self.source_allocated_before, self.source_allocated_after)
        {
            write!(
                formatter,
                "\nallocated at the source: {} before, {} after",
                mebibytes(before),
                mebibytes(after)
            )?;
        }
        if let Some(allocated) = self.destination_allocated {
            write!(formatter, "\nallocated at the destination: {}", mebibytes(allocated))?;
        }
        Ok(())
    }
}

/// Polls a job until it ends, with a progress bar if standard error is a terminal. Calls `seen`
/// with each status.
///
/// # Errors
/// If the agent is lost and no other continues the job, or if `seen` fails.
pub fn watch(
    vmm: &MockVmm, mut job: u64, bar: bool, mut seen: impl FnMut(&JobStatus) -> Result<(), Error>,
) -> Result<JobStatus, Error> {
    let bar = if bar { progress_bar() } else { ProgressBar::hidden() };
    loop {
        let status = match vmm.client().status() {
            // The next agent counts its jobs anew.
            Ok(status) if vmm.awaits_memory_of_next_agent() && status.job != 0 => {
                job = status.job;
                status
            }
            Ok(status) => status,
            Err(_) if vmm.awaits_memory_of_next_agent() => {
                std::thread::sleep(LOOK);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if status.job != job {
            return Err(Error::Mismatch(format!("job {job} was followed by job {}", status.job)));
        }
        show(&bar, &status);
        seen(&status)?;
        if status.phase.is_final() {
            bar.finish_and_clear();
            return Ok(status);
        }
        std::thread::sleep(LOOK);
    }
}

/// A progress bar on standard error. It is hidden if that is not a terminal.
pub fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix:<12} [{bar:40}] {percent:>3}%  {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Updates a bar.
pub fn show(bar: &ProgressBar, status: &JobStatus) {
    let counters = &status.counters;
    bar.set_length(counters.pass_pages.max(1));
    bar.set_position(counters.pass_pages_done.min(counters.pass_pages.max(1)));
    bar.set_prefix(status.phase.name());
    if status.phase.is_postcopy() {
        let came = counters.requested_pages + counters.pushed_pages + counters.dropped_pages;
        bar.set_length((came + counters.remaining_pages).max(1));
        bar.set_position(came);
        bar.set_message(format!(
            "{} pages remain, {} requested, {} pushed",
            counters.remaining_pages, counters.requested_pages, counters.pushed_pages
        ));
        return;
    }
    if counters.image_bytes > 0 {
        let moved = counters.pages_saved + counters.pages_restored;
        bar.set_length((moved + counters.remaining_pages).max(1));
        bar.set_position(moved);
        bar.set_message(format!("{} MiB of the image", counters.image_bytes >> 20));
        return;
    }
    bar.set_message(format!(
        "pass {}, {} MiB sent at {} MiB/s, {} pages/s dirtied",
        counters.passes,
        counters.wire_bytes >> 20,
        counters.bandwidth >> 20,
        counters.dirty_pages_per_s
    ));
}
