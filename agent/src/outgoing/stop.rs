// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The stop: the time from the pause of the guest until the destination has loaded its state (the
//! record LOADED).
//!
//! During a stop the source waits for hooks of the VMM and for the peer. Each of these waits has
//! its own limit. But a peer that makes a little progress within each limit could keep the guest
//! paused for ever. So the whole stop has one deadline ([`Stop::limit`]), and every wait ends with
//! it.
//!
//! If the deadline passes, the migration fails, and the guest continues at the source.

use crate::job::{Deadline, JobError};
use pageferry_protocol::control::job::{MIN_BANDWIDTH, OutgoingOptions};
use std::time::{Duration, Instant};

/// How many times slower than measured the link may be while the guest is paused. A link that is
/// slower still makes too little progress.
const SLACK: u32 = 10;
/// The bandwidth in bytes per second that is expected of a link if none was measured.
const UNMEASURED: u64 = 1 << 20;

/// The stop of a guest for its hand-over. The drop removes the deadline, because the hooks that
/// resume the guest after a failure must have their full time.
#[derive(Debug)]
pub struct Stop {
    deadline: Deadline,
    started: Instant,
    limit: Duration,
}

impl Stop {
    /// Begins a stop now, before the number of bytes to send is known.
    pub fn begin(deadline: &Deadline, options: &OutgoingOptions) -> Self {
        let (started, limit) = (Instant::now(), Self::limit(options, 0, 0));
        deadline.set(Some(started + limit));
        Self { deadline: deadline.clone(), started, limit }
    }

    /// The longest stop for `bytes` that must be sent over a link with the measured `bandwidth` in
    /// bytes per second; 0 if it was not measured.
    ///
    /// It is `peer_timeout`, plus two `hook_timeout`, plus the time for the bytes:
    ///
    /// - measured: ten times the time that they take at that bandwidth, which counts as at least
    ///   [`MIN_BANDWIDTH`];
    /// - not measured: the time that they take at 1 MiB/s. That is slow enough without a factor.
    pub fn limit(options: &OutgoingOptions, bytes: u64, bandwidth: u64) -> Duration {
        let (rate, slack) = match bandwidth {
            0 => (UNMEASURED, 1),
            measured => (measured.max(MIN_BANDWIDTH), SLACK),
        };
        // No overflow: at most 2^64 bytes, at 2^16 bytes a second or more.
        let transfer = Duration::from_secs_f64(bytes as f64 / rate as f64) * slack;
        options.peer_timeout + 2 * options.hook_timeout + transfer
    }

    /// Moves the deadline, now that the number of bytes to send is known. It counts from the
    /// beginning of the stop.
    pub fn set_bytes_to_send(&mut self, options: &OutgoingOptions, bytes: u64, bandwidth: u64) {
        self.limit = Self::limit(options, bytes, bandwidth);
        self.deadline.set(Some(self.started + self.limit));
    }

    /// The current limit of the stop.
    #[cfg(test)]
    pub fn allowed(&self) -> Duration {
        self.limit
    }

    /// The error to report if the hand-over failed with `error`. If the deadline has passed, it
    /// says so and names the limit.
    pub fn explain(&self, error: JobError) -> JobError {
        if self.deadline.has_passed() {
            JobError::StopTooLong { limit: self.limit, source: Box::new(error) }
        } else {
            error
        }
    }

    /// Removes the deadline, because the destination has loaded the state. The waits from here on
    /// have their own limits.
    pub fn end_deadline(&self) {
        self.deadline.set(None);
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.deadline.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::{HookError, Hooks};
    use crate::job::pause::{PausedGuest, SavedState};
    use crate::job::{Job, notifier};
    use crate::memory::test_support::memory;
    use crate::tracking::{DirtyPages, TrackerChoice, Trackers, TrackingError};
    use pageferry_protocol::control::Trackers as Declared;
    use pageferry_protocol::control::job::JobKind;
    use pageferry_protocol::memory::PageRange;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    fn options() -> OutgoingOptions {
        let (peer_timeout, hook_timeout) = (Duration::from_secs(30), Duration::from_secs(10));
        OutgoingOptions { peer_timeout, hook_timeout, ..OutgoingOptions::default() }
    }

    #[test]
    fn a_slow_link_gets_the_time_that_it_needs_and_a_trickle_does_not() {
        assert_eq!(Stop::limit(&options(), 0, 0), Duration::from_secs(50));
        // 10 GiB at 100 MiB/s should take 102.4 s.
        assert_eq!(Stop::limit(&options(), 10 << 30, 100 << 20), Duration::from_secs(50 + 1024));
        // Not measured: 1 MiB/s.
        assert_eq!(Stop::limit(&options(), 64 << 20, 0), Duration::from_secs(50 + 64));
        // A peer that was slow on purpose gets no more time than the slowest link that works.
        assert_eq!(Stop::limit(&options(), 64 << 10, 1), Duration::from_secs(50 + 10));
        assert!(Stop::limit(&options(), u64::MAX, 1) > Duration::from_secs(1 << 40));
    }

    #[test]
    fn a_deadline_caps_waits_until_the_stop_ends() {
        let deadline = Deadline::default();
        let far = Instant::now() + Duration::from_secs(1 << 20);
        assert_eq!(deadline.cap(far), far);
        let mut stop = Stop::begin(&deadline, &options());
        assert!(deadline.cap(far) < far && !deadline.has_passed());
        stop.set_bytes_to_send(&options(), 1 << 50, 1 << 20);
        assert_eq!(deadline.cap(far), far);
        drop(stop);
        let none = OutgoingOptions {
            peer_timeout: Duration::ZERO,
            hook_timeout: Duration::ZERO,
            ..options()
        };
        let stop = Stop::begin(&deadline, &none);
        assert!(deadline.has_passed() && deadline.cap_timeout(Duration::from_secs(9)).is_zero());
        assert!(matches!(stop.explain(JobError::Cancelled), JobError::StopTooLong { .. }));
        drop(stop);
        assert!(!deadline.has_passed());
    }

    /// Calls `hook` in a stop whose deadline has passed, with a VMM that never answers.
    fn in_expired_stop(hook: fn(&Arc<Job>) -> Option<JobError>) -> Option<JobError> {
        let (ours, _vmm) = UnixStream::pair().unwrap();
        let (memory, hooks) = (Arc::new(memory(&[64])), Arc::new(Hooks::new(Some(ours.into()))));
        let for_ever = OutgoingOptions { hook_timeout: Duration::from_secs(1 << 20), ..options() };
        let common = (&for_ever).into();
        let job = Job::new(1, JobKind::Outgoing, memory, hooks, common, notifier().unwrap());
        let job = Arc::new(job.unwrap());
        let none = OutgoingOptions {
            peer_timeout: Duration::ZERO,
            hook_timeout: Duration::ZERO,
            ..options()
        };
        let _stop = Stop::begin(&job.stop, &none);
        let (sender, outcome) = channel();
        std::thread::spawn(move || sender.send(hook(&job)));
        outcome
            .recv_timeout(Duration::from_secs(60))
            .expect("the hook waits longer than the stop may take")
    }

    fn trackers(job: &Job) -> Trackers {
        let choice = TrackerChoice { declared: Declared::HOOKS, pagemap: None };
        Trackers::new(&choice, &job.hooks, job.hook_timeout, &job.stop)
    }

    #[test]
    fn no_hook_of_a_stop_waits_after_the_deadline() {
        let late = |error: Option<JobError>, name: &str| {
            let error = error.unwrap();
            let (JobError::Hook(error) | JobError::Tracking(TrackingError::Hook(error))) = error
            else {
                panic!("{error}")
            };
            assert!(
                matches!(error, HookError::Late { hook, .. } if hook == name),
                "{name}: {error}"
            );
        };
        late(in_expired_stop(|job| PausedGuest::pause(job).err()), "pause");
        late(in_expired_stop(|job| SavedState::of(job).err()), "save state");
        late(
            in_expired_stop(|job| {
                let dirty = DirtyPages::none(&job.memory).unwrap();
                trackers(job).sync(&job.memory, &dirty, 1).err().map(JobError::from)
            }),
            "sync tracker",
        );
        late(
            in_expired_stop(|job| {
                let (dirty, range) =
                    (DirtyPages::none(&job.memory).unwrap(), PageRange::new(0, 64));
                dirty.block(0).set(range);
                let trackers = trackers(job);
                trackers
                    .lazy_clear()
                    .unwrap()
                    .clear(0, dirty.block(0), range)
                    .err()
                    .map(JobError::from)
            }),
            "clear tracker",
        );
    }
}
