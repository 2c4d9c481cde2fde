// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The output of `mock_vmm`: a progress bar while the job runs, and a report at its end.

use crate::Error;
use crate::vmm::MockVmm;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry_client::{JobStatus, Phase};
use serde::Serialize;
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
    /// Number of passes, including the last one, for which the guest is paused.
    pub passes: u64,
    /// Pages sent with their content.
    pub pages_sent: u64,
    /// Pages that were found to be zero.
    pub zero_pages: u64,
    /// Pages that the destination was told to discard.
    pub discarded_pages: u64,
    /// Discarded pages that were sent because the guest wrote to them after the discard.
    pub stray_pages: u64,
    /// Bytes on all streams.
    pub wire_bytes: u64,
    /// Milliseconds from the start to the end.
    pub total_ms: f64,
    /// Milliseconds that the guest was paused.
    pub downtime_ms: f64,
    /// Restore: milliseconds until the guest ran.
    pub running_ms: f64,
    /// Snapshot: pages saved before their turn because the guest wrote to them.
    pub captured_pages: u64,
    /// Snapshot: pages saved before their turn because the guest discarded them.
    pub rescued_pages: u64,
    /// Restore: pages of the working set that were read ahead.
    pub working_set_pages: u64,
    /// Postcopy: faults that were answered.
    pub faults: u64,
    /// Postcopy: pages that the destination asked for.
    pub requested_pages: u64,
    /// Postcopy: pages that the source pushed without a request.
    pub pushed_pages: u64,
    /// Postcopy: pages that were discarded before they arrived.
    pub dropped_pages: u64,
    /// Postcopy: pages that the source freed because the destination has them.
    pub released_pages: u64,
    /// Postcopy: the time to answer a fault, in microseconds: median, 99th percentile, maximum.
    pub fault_us: [u64; 3],
    /// Postcopy: milliseconds without a connection.
    pub paused_ms: f64,
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
        let counters = &status.counters;
        Self {
            status: status.phase.name().to_owned(),
            // The error of a job that completed is only a warning.
            error: if status.phase == Phase::Completed {
                String::new()
            } else {
                status.error.clone()
            },
            passes: counters.passes,
            pages_sent: counters.pages_sent,
            zero_pages: counters.zero_pages,
            discarded_pages: counters.discarded_pages,
            stray_pages: counters.stray_pages,
            wire_bytes: counters.wire_bytes,
            total_ms: milliseconds(counters.total_us),
            downtime_ms: milliseconds(counters.downtime_us),
            running_ms: milliseconds(counters.running_us),
            captured_pages: counters.captured_pages,
            rescued_pages: counters.rescued_pages,
            working_set_pages: counters.working_set_pages,
            faults: counters.faults,
            requested_pages: counters.requested_pages,
            pushed_pages: counters.pushed_pages,
            dropped_pages: counters.dropped_pages,
            released_pages: counters.released_pages,
            fault_us: [counters.fault_p50_us, counters.fault_p99_us, counters.fault_max_us],
            paused_ms: milliseconds(counters.paused_us),
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

fn milliseconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1000.0
}

impl std::fmt::Display for Report {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        if self.succeeded() {
            write!(formatter, "completed in {:.0} ms", self.total_ms)?;
            if self.passes > 0 {
                write!(formatter, ", {} passes", self.passes)?;
            }
            if self.running_ms > 0.0 {
                write!(formatter, ", the guest was ready after {:.1} ms", self.running_ms)?;
            } else {
                write!(formatter, ", the guest was paused for {:.1} ms", self.downtime_ms)?;
            }
        } else {
            write!(formatter, "{}: {}", self.status, self.error)?;
        }
        write!(
            formatter,
            "\npages: {} sent, {} zero, {} discarded, {} stray; {} on the wire",
            self.pages_sent,
            self.zero_pages,
            self.discarded_pages,
            self.stray_pages,
            mebibytes(self.wire_bytes)
        )?;
        if self.requested_pages + self.pushed_pages + self.dropped_pages > 0 {
            write!(
                formatter,
                "\nwhile it ran: {} pages requested, {} pushed, {} dropped by discard, {} released",
                self.requested_pages, self.pushed_pages, self.dropped_pages, self.released_pages
            )?;
            if self.faults > 0 {
                let [p50, p99, max] = self.fault_us;
                write!(
                    formatter,
                    "; {} faults, p50 {p50} us, p99 {p99} us, most {max} us",
                    self.faults
                )?;
            }
        }
        if self.captured_pages + self.rescued_pages > 0 {
            let (captured, rescued) = (self.captured_pages, self.rescued_pages);
            write!(
                formatter,
                "\nsaved before their turn: {captured} pages for writes, {rescued} for discards"
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
/// If the agent is lost, or if `seen` fails.
pub fn watch(
    vmm: &MockVmm, job: u64, bar: bool, mut seen: impl FnMut(&JobStatus) -> Result<(), Error>,
) -> Result<JobStatus, Error> {
    let bar = if bar { progress_bar() } else { ProgressBar::hidden() };
    loop {
        let status = vmm.client().status()?;
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
    bar.set_message(format!(
        "pass {}, {} MiB sent at {} MiB/s, {} pages/s dirtied",
        counters.passes,
        counters.wire_bytes >> 20,
        counters.bandwidth >> 20,
        counters.dirty_pages_per_s
    ));
}
