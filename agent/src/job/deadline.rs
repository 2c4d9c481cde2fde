//! The time by which the hand-over of a paused guest must be done.
//!
//! A guest that is paused for a migration waits for its VMM's hooks, for its destination, and for a
//! peer that may take or send a byte now and then. Each of these waits has a limit of its own, and
//! a peer that makes a little progress within each of them could hold the guest for ever. So the
//! whole stop, from the pause to the destination's LOADED, has one deadline, and every wait ends
//! with it. The migration fails then, and the guest runs on at the source.
//!
//! See [`Stop::limit`] for what the limit is.

use super::JobError;
use pageferry_protocol::control::job::{MIN_BANDWIDTH, OutgoingOptions};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much slower than measured the link may be while the guest is paused. Less is no progress.
const SLACK: u32 = 10;
/// Bytes per second that a link is expected to carry as long as nothing was measured.
const UNMEASURED: u64 = 1 << 20;

/// The deadline of a job's stop, if its guest is paused for a hand-over. Clones are the same
/// deadline.
#[derive(Debug, Clone, Default)]
pub struct Deadline(Arc<Mutex<Option<Instant>>>);

impl Deadline {
    fn at(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    /// The earlier one of this deadline and `own`.
    pub fn cap(&self, own: Instant) -> Instant {
        self.at().map_or(own, |at| at.min(own))
    }

    /// `own`, or what is left until this deadline if that is less.
    pub fn cap_timeout(&self, own: Duration) -> Duration {
        self.at().map_or(own, |at| own.min(at.saturating_duration_since(Instant::now())))
    }

    /// True if there is a deadline and it is over.
    pub fn has_passed(&self) -> bool {
        self.at().is_some_and(|at| Instant::now() >= at)
    }
}

/// The stop of a guest for its hand-over. On drop its deadline is lifted: what resumes the guest
/// must not be cut short by it.
#[derive(Debug)]
pub struct Stop {
    deadline: Deadline,
    started: Instant,
    limit: Duration,
}

impl Stop {
    /// Begins now, with nothing to send that is known yet.
    pub fn begin(deadline: &Deadline, options: &OutgoingOptions) -> Self {
        let (started, limit) = (Instant::now(), Self::limit(options, 0, 0));
        deadline.set(Some(started + limit));
        Self { deadline: deadline.clone(), started, limit }
    }

    /// How long a guest may be paused that has `bytes` to send over a link that carried `bandwidth`
    /// bytes per second, 0 if that was not measured: `peer_timeout` and two `hook_timeout`, and
    ///
    /// - measured: ten times what the bytes should take at that bandwidth, which counts as at least
    ///   [`MIN_BANDWIDTH`];
    /// - not measured: once what they take at 1 MiB/s, which is slow enough without a factor.
    pub fn limit(options: &OutgoingOptions, bytes: u64, bandwidth: u64) -> Duration {
        let (rate, slack) = match bandwidth {
            0 => (UNMEASURED, 1),
            measured => (measured.max(MIN_BANDWIDTH), SLACK),
        };
        // At most 2^64 bytes at 2^16 a second: no overflow.
        let transfer = Duration::from_secs_f64(bytes as f64 / rate as f64) * slack;
        options.peer_timeout + 2 * options.hook_timeout + transfer
    }

    /// It became known how much is to be sent: moves the deadline to where it belongs.
    pub fn expect(&mut self, options: &OutgoingOptions, bytes: u64, bandwidth: u64) {
        self.limit = Self::limit(options, bytes, bandwidth);
        self.deadline.set(Some(self.started + self.limit));
    }

    /// How long the guest may be paused, as far as is known by now.
    #[cfg(test)]
    pub fn allowed(&self) -> Duration {
        self.limit
    }

    /// What to report if the hand-over failed with `error`.
    pub fn explain(&self, error: JobError) -> JobError {
        if self.deadline.has_passed() {
            JobError::StopTooLong { limit: self.limit, source: Box::new(error) }
        } else {
            error
        }
    }

    /// The destination has loaded the state: what comes now has limits of its own.
    pub fn is_loaded(&self) {
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
    use std::sync::mpsc::channel;

    fn options() -> OutgoingOptions {
        let (peer_timeout, hook_timeout) = (Duration::from_secs(30), Duration::from_secs(10));
        OutgoingOptions { peer_timeout, hook_timeout, ..OutgoingOptions::default() }
    }

    #[test]
    fn a_slow_link_with_much_to_carry_gets_the_time_that_it_needs_and_a_trickle_does_not() {
        assert_eq!(Stop::limit(&options(), 0, 0), Duration::from_secs(50));
        // 10 GiB at 100 MiB/s should take 102.4 s.
        assert_eq!(Stop::limit(&options(), 10 << 30, 100 << 20), Duration::from_secs(50 + 1024));
        // Never measured: 1 MiB/s.
        assert_eq!(Stop::limit(&options(), 64 << 20, 0), Duration::from_secs(50 + 64));
        // A peer that was slow on purpose gets no more than the slowest link that works.
        assert_eq!(Stop::limit(&options(), 64 << 10, 1), Duration::from_secs(50 + 10));
        assert!(Stop::limit(&options(), u64::MAX, 1) > Duration::from_secs(1 << 40));
    }

    #[test]
    fn a_deadline_caps_waits_until_the_stop_is_over() {
        let deadline = Deadline::default();
        let far = Instant::now() + Duration::from_secs(1 << 20);
        assert_eq!(deadline.cap(far), far);
        let mut stop = Stop::begin(&deadline, &options());
        assert!(deadline.cap(far) < far && !deadline.has_passed());
        stop.expect(&options(), 1 << 50, 1 << 20);
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

    /// What a hook of a stop comes to whose deadline is over, and whose VMM never answers.
    fn asked(hook: fn(&Arc<Job>) -> Option<JobError>) -> Option<JobError> {
        let (ours, _vmm) = UnixStream::pair().unwrap();
        let (memory, hooks) = (Arc::new(memory(&[64])), Arc::new(Hooks::new(Some(ours.into()))));
        let for_ever = OutgoingOptions { hook_timeout: Duration::from_secs(1 << 20), ..options() };
        let job = Job::new(1, JobKind::Outgoing, memory, hooks, for_ever, notifier().unwrap());
        let job = Arc::new(job.unwrap());
        let none = OutgoingOptions {
            peer_timeout: Duration::ZERO,
            hook_timeout: Duration::ZERO,
            ..options()
        };
        let _stop = Stop::begin(&job.stop, &none);
        let (say, answer) = channel();
        std::thread::spawn(move || say.send(hook(&job)));
        answer
            .recv_timeout(Duration::from_secs(60))
            .expect("the hook waits longer than the stop may take")
    }

    fn trackers(job: &Job) -> Trackers {
        let choice = TrackerChoice { declared: Declared::HOOKS, pagemap: None };
        Trackers::new(&choice, &job.hooks, job.options().hook_timeout, &job.stop)
    }

    #[test]
    fn no_hook_of_a_stop_is_waited_for_once_its_deadline_is_over() {
        let late = |error: Option<JobError>, name: &str| {
            let error = error.unwrap();
            let (JobError::Hook(error) | JobError::Tracking(TrackingError::Hook(error))) = error
            else {
                panic!("{error}")
            };
            assert!(
                matches!(error, HookError::Socket { hook, .. } if hook == name),
                "{name}: {error}"
            );
        };
        late(asked(|job| PausedGuest::pause(job).err()), "pause");
        late(asked(|job| SavedState::of(job).err()), "save state");
        late(
            asked(|job| {
                let dirty = DirtyPages::none(&job.memory).unwrap();
                trackers(job).sync(&job.memory, &dirty).err().map(JobError::from)
            }),
            "sync tracker",
        );
        late(
            asked(|job| {
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
