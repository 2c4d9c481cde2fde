// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The job of an outgoing migration, as the session and the job's threads see it.
//!
//! An operator changes its options, asks for postcopy, and has it recovered while it runs. The
//! threads read the options again at each step.

use crate::job::{Job, Recovery, get};
use crate::lock::lock;
use pageferry_protocol::control::job::{Mode, OutgoingOptions, Parameters, Phase};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// The job of an outgoing migration. Dereferences to what all jobs have.
#[derive(Debug)]
pub struct OutgoingJob {
    job: Arc<Job>,
    options: Mutex<OutgoingOptions>,
    /// See [`Parameters::throttle`].
    least_throttle: AtomicU32,
    /// True if an operator asked for the switch to postcopy.
    postcopy_requested: AtomicBool,
    /// True if another agent began the migration.
    adopted: bool,
    /// Passes requests to recover a paused postcopy.
    pub recovery: Recovery,
}

impl Deref for OutgoingJob {
    type Target = Job;

    fn deref(&self) -> &Job {
        &self.job
    }
}

impl OutgoingJob {
    /// The job of a migration that begins here.
    ///
    /// # Errors
    /// If the kernel refuses an event descriptor.
    pub fn new(job: Arc<Job>, options: OutgoingOptions) -> std::io::Result<Self> {
        Ok(Self {
            job,
            options: Mutex::new(options),
            least_throttle: AtomicU32::new(0),
            postcopy_requested: AtomicBool::new(false),
            adopted: false,
            recovery: Recovery::new()?,
        })
    }

    /// The job of a migration that another agent began, and left in postcopy when it died.
    ///
    /// # Errors
    /// As [`OutgoingJob::new`].
    pub fn adopted(job: Arc<Job>, options: OutgoingOptions) -> std::io::Result<Self> {
        Ok(Self { adopted: true, ..Self::new(job, options)? })
    }

    /// The part that all jobs have.
    pub fn common(&self) -> &Arc<Job> {
        &self.job
    }

    /// The current options.
    pub fn options(&self) -> OutgoingOptions {
        lock(&self.options).clone()
    }

    /// Changes options while the migration runs.
    pub fn set_parameters(&self, new: &Parameters) {
        let mut options = lock(&self.options);
        let change = |field: &mut u32, new: Option<u32>| *field = new.unwrap_or(*field);
        change(&mut options.max_passes, new.max_passes);
        change(&mut options.switch_after, new.switch_after);
        options.downtime_limit = new.downtime_limit.unwrap_or(options.downtime_limit);
        options.policy = new.policy.unwrap_or(options.policy);
        if let Some(bandwidth) = new.bandwidth {
            options.bandwidth = bandwidth;
            self.limiter.set_rate(bandwidth);
        }
        if let Some(throttle) = new.throttle {
            self.least_throttle.store(throttle, Ordering::Relaxed);
        }
    }

    /// The least throttle of the guest that an operator has asked for, in percent.
    pub fn least_throttle(&self) -> u32 {
        self.least_throttle.load(Ordering::Relaxed)
    }

    /// Asks for the switch to postcopy after the current pass. Returns false if the mode is not
    /// hybrid, or the passes are over.
    pub fn request_postcopy(&self) -> bool {
        let possible = lock(&self.options).mode == Mode::Hybrid && self.phase() <= Phase::Passes;
        let asked = self.postcopy_requested.fetch_or(possible, Ordering::Relaxed);
        if possible && !asked {
            // A pass over a large guest takes minutes.
            self.note("postcopy begins when this pass ends");
        }
        possible
    }

    /// True if the switch to postcopy was asked for.
    pub fn is_postcopy_requested(&self) -> bool {
        self.postcopy_requested.load(Ordering::Relaxed)
    }

    /// Checks that the guest can run from its memory here.
    ///
    /// # Errors
    /// If pages were released, or an agent that began the migration may have released some.
    pub fn check_complete(&self) -> Result<(), IncompleteMemory> {
        match get(&self.live.released_pages) {
            0 if self.adopted && lock(&self.options).release => {
                Err(IncompleteMemory::MaybeReleased)
            }
            0 => Ok(()),
            pages => Err(IncompleteMemory::Released(pages)),
        }
    }
}

/// The guest's memory is not complete here any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IncompleteMemory {
    /// This many pages were freed because the destination has them.
    #[error("{0} pages of the guest were released here: its memory is not whole any more")]
    Released(u64),
    /// The agent that began the migration is gone, and may have freed pages.
    #[error(
        "the agent that began this migration may have released pages of the guest here: its memory may not be whole any more"
    )]
    MaybeReleased,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::add;
    use crate::memory::GuestMemory;
    use crate::memory::test_support::job_of;
    use pageferry_protocol::control::job::{JobKind, NonConvergence};
    use std::time::Duration;

    fn common() -> Arc<Job> {
        job_of(JobKind::Outgoing, Arc::new(GuestMemory::default()))
    }

    #[test]
    fn only_what_is_set_is_changed() {
        let started = OutgoingOptions { streams: 3, max_passes: 7, ..OutgoingOptions::default() };
        let job = OutgoingJob::new(common(), started.clone()).unwrap();
        job.set_parameters(&Parameters::default());
        assert_eq!(job.options(), started);
        job.set_parameters(&Parameters { throttle: Some(40), ..Parameters::bandwidth(1 << 20) });
        let limited = OutgoingOptions { bandwidth: 1 << 20, ..started };
        assert_eq!((job.options(), job.least_throttle()), (limited.clone(), 40));
        let all = Parameters {
            bandwidth: Some(0),
            downtime_limit: Some(Duration::from_millis(7)),
            max_passes: Some(3),
            policy: Some(NonConvergence::Fail),
            switch_after: Some(2),
            throttle: Some(0),
        };
        job.set_parameters(&all);
        let changed = OutgoingOptions {
            bandwidth: 0,
            downtime_limit: Duration::from_millis(7),
            max_passes: 3,
            policy: NonConvergence::Fail,
            switch_after: 2,
            ..limited
        };
        assert_eq!((job.options(), job.least_throttle()), (changed, 0));
    }

    #[test]
    fn postcopy_is_requested_only_of_a_hybrid_whose_passes_run() {
        let options = |mode| OutgoingOptions { mode, ..OutgoingOptions::default() };
        let precopy = OutgoingJob::new(common(), options(Mode::Precopy)).unwrap();
        assert!(!precopy.request_postcopy() && !precopy.is_postcopy_requested());
        let hybrid = OutgoingJob::new(common(), options(Mode::Hybrid)).unwrap();
        hybrid.enter(Phase::Stopping);
        assert!(!hybrid.request_postcopy() && !hybrid.is_postcopy_requested());
        hybrid.enter(Phase::Passes);
        assert!(hybrid.request_postcopy() && hybrid.is_postcopy_requested());
        hybrid.enter(Phase::Stopping);
        assert!(!hybrid.request_postcopy(), "too late");
        assert!(hybrid.is_postcopy_requested(), "the first request still holds");
    }

    #[test]
    fn a_guest_whose_pages_were_released_is_not_complete() {
        let options = OutgoingOptions { release: true, ..OutgoingOptions::default() };
        let own = OutgoingJob::new(common(), options.clone()).unwrap();
        assert_eq!(own.check_complete(), Ok(()));
        add(&own.live.released_pages, 3);
        assert_eq!(own.check_complete(), Err(IncompleteMemory::Released(3)));
        let adopted = OutgoingJob::adopted(common(), options).unwrap();
        assert_eq!(adopted.check_complete(), Err(IncompleteMemory::MaybeReleased));
        let kept = OutgoingJob::adopted(common(), OutgoingOptions::default()).unwrap();
        assert_eq!(kept.check_complete(), Ok(()));
    }
}
