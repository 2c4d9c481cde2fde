// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sums over all jobs of the agent, for its metrics.
//!
//! A job is added once, when it leaves the session. A scrape also adds the jobs that are still
//! there to a copy. So every sum only grows.

use super::latency::FaultWaits;
use pageferry_protocol::control::job::{Counters, JobKind, Phase};

/// The kinds of jobs, in the order in which metrics list them.
pub const KINDS: [JobKind; 4] =
    [JobKind::Outgoing, JobKind::Incoming, JobKind::Snapshot, JobKind::Restore];

/// The ways in which a job ends.
pub const OUTCOMES: [Phase; 4] =
    [Phase::Completed, Phase::Failed, Phase::Cancelled, Phase::Unconfirmed];

/// The sums over all jobs of one kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct KindTotals {
    /// Jobs that were started.
    pub started: u64,
    ended: [u64; OUTCOMES.len()],
    /// The sums of the counters that only grow while a job runs. All other fields are zero.
    pub counters: Counters,
    /// The times that faults waited.
    pub fault_waits: FaultWaits,
}

impl KindTotals {
    /// The number of jobs that ended in each way.
    pub fn ended(&self) -> impl Iterator<Item = (Phase, u64)> {
        OUTCOMES.into_iter().zip(self.ended)
    }
}

/// What one job adds to the sums.
#[derive(Debug, Clone, Copy)]
pub struct JobPart {
    /// The kind of the job.
    pub kind: JobKind,
    /// How it ended; `None` if it has not.
    pub outcome: Option<Phase>,
    /// Its counters.
    pub counters: Counters,
    /// The times that faults waited in it.
    pub fault_waits: FaultWaits,
}

/// The sums over all jobs.
#[derive(Debug, Clone, Copy, Default)]
pub struct JobTotals([KindTotals; KINDS.len()]);

impl JobTotals {
    /// The sums of one kind.
    pub fn of(&self, kind: JobKind) -> KindTotals {
        position(kind).map_or_else(KindTotals::default, |at| self.0[at])
    }

    /// Adds a job.
    pub fn add(&mut self, job: &JobPart) {
        let Some(at) = position(job.kind) else { return };
        let totals = &mut self.0[at];
        totals.started += 1;
        for (outcome, count) in OUTCOMES.iter().zip(&mut totals.ended) {
            *count += u64::from(job.outcome == Some(*outcome));
        }
        add_counters(&mut totals.counters, &job.counters);
        totals.fault_waits.add(&job.fault_waits);
    }
}

fn position(kind: JobKind) -> Option<usize> {
    KINDS.iter().position(|of| *of == kind)
}

/// Adds the counters that only grow while a job runs.
fn add_counters(sum: &mut Counters, job: &Counters) {
    macro_rules! add {
        ($($name:ident),+ $(,)?) => { $(sum.$name += job.$name;)+ };
    }
    add!(
        passes,
        pages_sent,
        pages_received,
        pages_saved,
        pages_restored,
        zero_pages,
        discarded_pages,
        freed_pages,
        stray_pages,
        wire_bytes,
        image_bytes,
        faults,
        write_faults,
        requested_pages,
        pushed_pages,
        dropped_pages,
        released_pages,
        disconnected_us,
        copied_before_write_pages,
        copied_before_discard_pages,
        unchanged_pages,
        working_set_pages,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_have_each_job_under_its_kind_and_outcome() {
        let mut totals = JobTotals::default();
        let counters =
            Counters { wire_bytes: 10, remaining_pages: 5, total_us: 9, ..Counters::default() };
        let job =
            |kind, outcome| JobPart { kind, outcome, counters, fault_waits: FaultWaits::default() };
        totals.add(&job(JobKind::Outgoing, Some(Phase::Failed)));
        totals.add(&job(JobKind::Outgoing, Some(Phase::Completed)));
        totals.add(&job(JobKind::Outgoing, None));
        totals.add(&job(JobKind::None, None));
        let outgoing = totals.of(JobKind::Outgoing);
        assert_eq!(outgoing.started, 3);
        assert_eq!(outgoing.counters, Counters { wire_bytes: 30, ..Counters::default() });
        let ended: Vec<_> = outgoing.ended().map(|(_, count)| count).collect();
        assert_eq!(ended, [1, 1, 0, 0]);
        assert_eq!(totals.of(JobKind::Incoming).started, 0);
    }
}
