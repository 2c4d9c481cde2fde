// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What metrics and the service manager are told about the session: read in one step, as the answer
//! to a status query is.

use super::session_job::SessionJob;
use super::shared::SharedSession;
use super::{PreviousJob, Session};
use crate::job::Job;
use crate::memory::GuestMemory;
use crate::stats::totals::{JobPart, JobTotals};
use pageferry_protocol::control::job::{JobStatus, Phase};
use std::sync::Arc;

/// The session at one moment.
#[derive(Debug, Clone)]
pub struct SessionSample {
    /// The name of the VM, if the operator has given it.
    pub vm_name: Option<String>,
    /// True if a VMM is connected.
    pub vmm_connected: bool,
    /// The status of the job that runs or ran last.
    pub status: JobStatus,
    /// The sums over all jobs, with the jobs that run.
    pub totals: JobTotals,
    /// The memory of the guest.
    pub memory: Arc<GuestMemory>,
}

impl SharedSession {
    /// The session now. Holds the lock for about as long as a status query.
    pub fn sample(&self) -> SessionSample {
        let vmm_connected = self.has_owner();
        let session = self.lock();
        let mut totals = session.totals;
        let current = session.job.as_ref().map(|(job, _)| job);
        for job in current.into_iter().chain(session.previous.job()) {
            totals.add(&part(job, job.ended_as()));
        }
        let (status, memory) = (session.reported_status(), session.memory.clone());
        let vm_name = session.vm_name.by_operator();
        SessionSample { vm_name, vmm_connected, status, totals, memory }
    }
}

impl Session {
    /// The job that runs or ran last, in one line.
    pub fn describe_job(&self) -> String {
        let JobStatus { job, kind, phase, .. } = self.reported_status();
        match job {
            0 => "no job was started yet".to_owned(),
            _ => format!("job {job}, {}: {}", kind.name(), phase.name()),
        }
    }

    /// Adds a job to the totals. To be called once, when the job leaves the session.
    pub(super) fn count_job(&mut self, job: &SessionJob) {
        // A job that leaves before it has ended was cancelled: its VMM is gone, and so is the next
        // one.
        let outcome = job.ended_as().unwrap_or(Phase::Cancelled);
        self.totals.add(&part(job, Some(outcome)));
    }

    /// Adds the last job of the previous VMM to the totals, if it is still in the session. It is
    /// about to leave.
    pub(super) fn count_previous(&mut self) {
        if let PreviousJob::Ending(job, _) = &self.previous {
            let job = job.clone();
            self.count_job(&job);
        }
    }
}

fn part(job: &Job, outcome: Option<Phase>) -> JobPart {
    let counters = job.status().counters;
    JobPart { kind: job.kind, outcome, counters, fault_waits: job.live.latency.waits() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::add;
    use crate::vm_name::VmName;
    use pageferry_protocol::control::job::{JobKind, SnapshotOptions};
    use std::sync::mpsc::{Sender, channel};

    /// Starts a job with a counter of 1. It ends when the sender is dropped.
    fn start(session: &SharedSession) -> (Arc<Job>, Sender<()>) {
        let (end, ends) = channel::<()>();
        let mut locked = session.lock();
        let options = (&SnapshotOptions::default()).into();
        let job = locked.new_job(JobKind::Snapshot, options).unwrap();
        add(&job.live.image_bytes, 1);
        let running = job.clone();
        let run = move || {
            let _ = ends.recv();
            running.finish(Ok(()));
        };
        locked.run_job(SessionJob::Snapshot(job.clone()), run).unwrap();
        (job, end)
    }

    /// Jobs that started, that completed or were cancelled, and the sum of their counters.
    fn sums(session: &SharedSession) -> (u64, u64, u64) {
        let totals = session.sample().totals.of(JobKind::Snapshot);
        let ended = totals.ended().map(|(_, count)| count).sum();
        (totals.started, ended, totals.counters.image_bytes)
    }

    #[test]
    fn each_job_is_in_the_sums_once_wherever_it_is() {
        let session =
            SharedSession::new(crate::job::notifier().unwrap(), VmName::default()).unwrap();
        assert_eq!(sums(&session), (0, 0, 0));
        let (first, end_first) = start(&session);
        assert_eq!(sums(&session), (1, 0, 1), "it runs");
        drop(end_first);
        assert!(first.wait_until_final(std::time::Duration::from_secs(60)));
        assert_eq!(sums(&session), (1, 1, 1), "it has ended");
        let (_second, end_second) = start(&session);
        assert_eq!(sums(&session), (2, 1, 2), "the second has taken its place");

        // The VMM goes, and comes back, while the second job is being cancelled.
        let next = |session: &SharedSession| {
            let mut locked = session.lock();
            locked.end();
            let next = locked.next_session();
            *locked = next;
        };
        next(&session);
        assert_eq!(sums(&session), (2, 1, 2), "it is the job of the previous VMM");
        let (third, end_third) = start(&session);
        assert_eq!(sums(&session), (3, 1, 3));
        next(&session);
        assert_eq!(sums(&session), (3, 2, 3), "the second has left as cancelled");
        drop((end_second, end_third));
        assert!(third.wait_until_final(std::time::Duration::from_secs(60)));
        session.lock().job_changed();
        assert_eq!(sums(&session), (3, 3, 3));
        next(&session);
        assert_eq!(sums(&session), (3, 3, 3));
    }
}
