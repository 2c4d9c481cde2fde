// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `mock_vmm` says: a progress bar while the migration runs, and a report at its end.

use crate::Error;
use crate::vmm::MockVmm;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry_client::{Counters, JobStatus, Phase};
use serde::Serialize;
use std::time::Duration;

/// Time between two looks at the job.
pub(super) const LOOK: Duration = Duration::from_millis(2);

/// The end of a migration, seen from one side. What that side cannot know is `None`, and `null` in
/// JSON.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Name of the job's last phase: `completed`, or what became of it instead.
    pub status: String,
    /// Why it failed; empty if it did not.
    pub error: String,
    /// Passes, the last one with the guest stopped among them.
    pub passes: u64,
    /// Pages sent with their content.
    pub pages_sent: u64,
    /// Pages that were found to be zero.
    pub zero_pages: u64,
    /// Pages told to the destination as discarded.
    pub discarded_pages: u64,
    /// Pages sent although discarded, since they were written afterwards.
    pub stray_pages: u64,
    /// Bytes on all streams.
    pub wire_bytes: u64,
    /// Milliseconds from the start to the end.
    pub total_ms: f64,
    /// Milliseconds that the guest was paused.
    pub downtime_ms: f64,
    /// Restore: milliseconds until the guest ran.
    pub running_ms: f64,
    /// Snapshot: pages saved before their turn, since the guest wrote to them.
    pub captured_pages: u64,
    /// Snapshot: pages saved before their turn, since the guest discarded them.
    pub rescued_pages: u64,
    /// Restore: pages of the working set that were read ahead.
    pub working_set_pages: u64,
    /// Postcopy: faults that were answered.
    pub faults: u64,
    /// Postcopy: pages that the destination asked for.
    pub requested_pages: u64,
    /// Postcopy: pages that came without being asked for.
    pub pushed_pages: u64,
    /// Postcopy: pages that were discarded before they came.
    pub dropped_pages: u64,
    /// Postcopy: pages that the source freed since the destination has them.
    pub released_pages: u64,
    /// Postcopy: how long half of the faults took at most, in microseconds; 99 of 100; and the
    /// slowest.
    pub fault_us: [u64; 3],
    /// Postcopy: milliseconds without a connection.
    pub paused_ms: f64,
    /// Bytes allocated at the source before anything, the discards included.
    pub source_allocated_before: Option<u64>,
    /// Bytes allocated at the source at the end.
    pub source_allocated_after: Option<u64>,
    /// Bytes allocated at the destination when all was there and before its guest wrote.
    pub destination_allocated: Option<u64>,
}

impl Report {
    /// From how the job stands.
    pub fn new(status: &JobStatus) -> Self {
        let Counters {
            passes,
            pages_sent,
            zero_pages,
            discarded_pages,
            stray_pages,
            wire_bytes,
            ..
        } = status.counters;
        let Counters {
            faults, requested_pages, pushed_pages, dropped_pages, released_pages, ..
        } = status.counters;
        let Counters { fault_p50_us, fault_p99_us, fault_max_us, .. } = status.counters;
        Self {
            faults,
            requested_pages,
            pushed_pages,
            dropped_pages,
            released_pages,
            fault_us: [fault_p50_us, fault_p99_us, fault_max_us],
            paused_ms: milliseconds(status.counters.paused_us),
            status: status.phase.name().to_owned(),
            // Of a job that completed it is a warning.
            error: if status.phase == Phase::Completed {
                String::new()
            } else {
                status.error.clone()
            },
            passes,
            pages_sent,
            zero_pages,
            discarded_pages,
            stray_pages,
            wire_bytes,
            total_ms: milliseconds(status.counters.total_us),
            downtime_ms: milliseconds(status.counters.downtime_us),
            running_ms: milliseconds(status.counters.running_us),
            captured_pages: status.counters.captured_pages,
            rescued_pages: status.counters.rescued_pages,
            working_set_pages: status.counters.working_set_pages,
            ..Self::default()
        }
    }

    /// Of a migration that did not get as far as a job, or whose job cannot be asked any more.
    pub fn failed(error: &Error) -> Self {
        Self { status: Phase::Failed.name().to_owned(), error: error.sentence(), ..Self::default() }
    }

    /// True if the migration was verified and committed.
    pub fn succeeded(&self) -> bool {
        self.status == Phase::Completed.name() && self.error.is_empty()
    }

    /// As one JSON object.
    pub fn json(&self) -> String {
        // Numbers, strings and nulls: there is nothing in it that JSON cannot say.
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

/// Watches a job until it ended, with a progress bar if standard error is a terminal. `seen` is
/// called with every look at it.
///
/// # Errors
/// If the agent is lost, or what `seen` says.
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

/// A bar on standard error; none if that is no terminal.
pub fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix:<12} [{bar:40}] {percent:>3}%  {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Brings a bar up to date.
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
