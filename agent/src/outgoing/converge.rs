//! When to stop the guest.
//!
//! After each pass the expected downtime is computed: the dirty pages over the measured bandwidth,
//! plus the time of a sync. If it is within the limit, or nothing is dirty, the guest is stopped.
//! If the passes that were allowed did not get there, the policy decides.
//!
//! A limit below the cost of a sync is reached only when nothing is dirty. Passes are short then,
//! and one more of them changes little. So only the first `QUICK_PASSES` follow each other at once;
//! a later one begins `INTERVAL` after the last one at the earliest.

use crate::job::{JobError, micros};
use pageferry_protocol::control::job::{Counters, Mode, NonConvergence, OutgoingOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use std::time::Duration;

/// A pass shorter than this says little of the bandwidth.
const MEANINGFUL: u64 = 1 << 20;
/// Passes that follow each other at once: they may shrink from one to the next.
const QUICK_PASSES: u64 = 30;
/// Shortest time between the starts of two later passes.
const INTERVAL: Duration = Duration::from_millis(100);
/// The throttle of the first step, and of each one more, in percent.
const THROTTLE_STEP: u32 = 20;
const THROTTLE_MORE: u32 = 10;

/// What was measured so far.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    passes: u64,
    /// Bytes per second on the wire.
    bandwidth: u64,
    /// Bytes of pages per second: more than that if they are compressed.
    content_rate: u64,
    /// Pages per second.
    dirty_rate: u64,
    sync_time: Duration,
    pass_time: Duration,
    expected: Duration,
    throttle: u32,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another pass.
    Pass,
    /// Stop the guest.
    Stop,
    /// Hold the guest back for this many percent, then another pass.
    Throttle(u32),
    /// Let the guest go on at the destination, and its memory follow.
    Postcopy,
}

impl Pace {
    /// Passes that ended.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// Bytes per second that the link carried; 0 if nothing was sent yet.
    pub fn bandwidth(&self) -> u64 {
        self.bandwidth
    }

    /// How long the last sync took, with its fix-up.
    pub fn sync_time(&self) -> Duration {
        self.sync_time
    }

    /// A sync took so long.
    pub fn synced(&mut self, time: Duration) {
        self.sync_time = time;
    }

    /// Its fix-up took so long.
    pub fn synced_more(&mut self, time: Duration) {
        self.sync_time += time;
    }

    /// A pass sent so much in such a time.
    pub fn passed(&mut self, pages: u64, bytes: u64, time: Duration) {
        self.passes += 1;
        self.pass_time = time;
        // A short pass is all latency; it only counts if there is nothing better.
        if bytes.max(pages * PAGE_SIZE) >= MEANINGFUL || (self.bandwidth == 0 && bytes > 0) {
            self.bandwidth = per_second(bytes, time).max(1);
            self.content_rate = per_second(bytes.max(pages * PAGE_SIZE), time).max(1);
        }
    }

    /// How long to wait before the next pass.
    pub fn rest(&self) -> Duration {
        if self.passes < QUICK_PASSES {
            Duration::ZERO
        } else {
            INTERVAL.saturating_sub(self.pass_time + self.sync_time)
        }
    }

    /// Decides, with `remaining` dirty pages after the last sync.
    ///
    /// # Errors
    /// If the passes do not converge and the policy is to fail.
    pub fn decide(&mut self, options: &OutgoingOptions, remaining: u64) -> Result<Next, JobError> {
        self.dirty_rate = per_second(remaining, self.pass_time);
        self.expected = self.expect(remaining);
        let limit = options.downtime_limit;
        // With nothing left, another pass cannot make the downtime shorter.
        if remaining == 0 || self.expected <= limit {
            return Ok(Next::Stop);
        }
        let switch_after = u64::from(options.switch_after);
        if options.mode == Mode::Hybrid && switch_after > 0 && self.passes >= switch_after {
            return Ok(Next::Postcopy);
        }
        if options.max_passes == 0 || self.passes < u64::from(options.max_passes) {
            return Ok(Next::Pass);
        }
        match options.policy {
            NonConvergence::KeepGoing => Ok(Next::Pass),
            NonConvergence::StopAnyway => Ok(Next::Stop),
            NonConvergence::Postcopy => Ok(Next::Postcopy),
            NonConvergence::Throttle => {
                self.throttle = if self.throttle == 0 {
                    THROTTLE_STEP
                } else {
                    (self.throttle + THROTTLE_MORE).min(99)
                };
                Ok(Next::Throttle(self.throttle))
            }
            NonConvergence::Fail => Err(JobError::NotConverging {
                passes: self.passes,
                remaining,
                expected: self.expected,
                limit,
            }),
        }
    }

    fn expect(&self, remaining: u64) -> Duration {
        let send = match remaining {
            0 => Duration::ZERO,
            // Nothing was sent yet, so nothing is known: let a pass find out.
            _ if self.content_rate == 0 => Duration::MAX,
            pages => Duration::from_secs_f64((pages * PAGE_SIZE) as f64 / self.content_rate as f64),
        };
        send.saturating_add(self.sync_time)
    }

    /// Writes what was measured into the figures of the job.
    pub fn report(&self, counters: &mut Counters) {
        counters.passes = self.passes;
        counters.bandwidth = self.bandwidth;
        counters.dirty_pages_per_s = self.dirty_rate;
        counters.expected_downtime_us = micros(self.expected);
    }
}

fn per_second(count: u64, time: Duration) -> u64 {
    (count as f64 / time.as_secs_f64().max(1e-6)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(policy: NonConvergence, max_passes: u32) -> OutgoingOptions {
        OutgoingOptions {
            policy,
            max_passes,
            downtime_limit: Duration::from_millis(100),
            ..OutgoingOptions::default()
        }
    }

    /// After one pass of 1 GiB in a second.
    fn pace() -> Pace {
        let mut pace = Pace::default();
        pace.passed(1 << 18, 1 << 30, Duration::from_secs(1));
        pace
    }

    #[test]
    fn what_fits_the_limit_stops_the_guest_and_the_sync_counts() {
        let options = options(NonConvergence::KeepGoing, 1);
        let fits = (1 << 18) / 10 - 1;
        assert_eq!(pace().decide(&options, fits).unwrap(), Next::Stop);
        assert_eq!(pace().decide(&options, fits + 1000).unwrap(), Next::Pass);
        let mut slow = pace();
        slow.synced(Duration::from_millis(50));
        assert_eq!(slow.decide(&options, fits).unwrap(), Next::Pass);
        assert_eq!(slow.decide(&options, fits / 2 - 100).unwrap(), Next::Stop);
    }

    #[test]
    fn the_policy_decides_only_after_the_allowed_passes() {
        let much = 1 << 20;
        for (policy, first) in [
            (NonConvergence::KeepGoing, Some(Next::Pass)),
            (NonConvergence::StopAnyway, Some(Next::Stop)),
            (NonConvergence::Throttle, Some(Next::Throttle(20))),
            (NonConvergence::Fail, None),
            (NonConvergence::Postcopy, Some(Next::Postcopy)),
        ] {
            let mut pace = pace();
            assert_eq!(pace.decide(&options(policy, 2), much).unwrap(), Next::Pass);
            assert_eq!(pace.decide(&options(policy, 0), much).unwrap(), Next::Pass);
            pace.passed(1 << 18, 1 << 30, Duration::from_secs(1));
            assert_eq!(pace.decide(&options(policy, 2), much).ok(), first);
        }
    }

    #[test]
    fn with_nothing_left_the_guest_is_stopped_whatever_the_limit_is() {
        let mut pace = pace();
        pace.synced(Duration::from_millis(5));
        let options = OutgoingOptions {
            downtime_limit: Duration::ZERO,
            ..options(NonConvergence::KeepGoing, 1)
        };
        assert_eq!(pace.decide(&options, 0).unwrap(), Next::Stop);
        assert_eq!(pace.decide(&options, 1).unwrap(), Next::Pass);
    }

    #[test]
    fn a_limit_below_the_cost_of_a_sync_leaves_it_to_the_policy() {
        let mut pace = pace();
        pace.synced(Duration::from_millis(5));
        let limit = |policy| OutgoingOptions {
            downtime_limit: Duration::from_millis(1),
            ..options(policy, 1)
        };
        assert_eq!(pace.decide(&limit(NonConvergence::StopAnyway), 1).unwrap(), Next::Stop);
        assert!(pace.decide(&limit(NonConvergence::Fail), 1).is_err());
    }

    #[test]
    fn passes_that_go_on_and_on_wait_for_each_other() {
        let mut pace = Pace::default();
        for _ in 0..QUICK_PASSES {
            assert_eq!(pace.rest(), Duration::ZERO);
            pace.passed(1, 4128, Duration::from_millis(10));
        }
        pace.synced(Duration::from_millis(5));
        assert_eq!(pace.rest(), INTERVAL - Duration::from_millis(15));
        pace.passed(1 << 18, 1 << 30, Duration::from_secs(1));
        assert_eq!(pace.rest(), Duration::ZERO);
    }

    #[test]
    fn hybrid_switches_after_its_passes_unless_they_converge() {
        let hybrid = |switch_after| OutgoingOptions {
            mode: Mode::Hybrid,
            switch_after,
            ..options(NonConvergence::KeepGoing, 1)
        };
        assert_eq!(pace().decide(&hybrid(1), 1 << 20).unwrap(), Next::Postcopy);
        assert_eq!(pace().decide(&hybrid(1), 10).unwrap(), Next::Stop);
        assert_eq!(pace().decide(&hybrid(2), 1 << 20).unwrap(), Next::Pass);
        assert_eq!(pace().decide(&hybrid(0), 1 << 20).unwrap(), Next::Pass);
    }

    #[test]
    fn the_throttle_grows_and_stays_below_a_full_stop() {
        let mut pace = pace();
        let options = options(NonConvergence::Throttle, 1);
        let steps: Vec<Next> = (0..12).map(|_| pace.decide(&options, 1 << 20).unwrap()).collect();
        assert_eq!(steps[..3], [Next::Throttle(20), Next::Throttle(30), Next::Throttle(40)]);
        assert_eq!(steps[11], Next::Throttle(99));
    }

    #[test]
    fn what_is_compressed_is_expected_to_stay_so() {
        let mut pace = Pace::default();
        // 1 GiB in a second, as a quarter of that.
        pace.passed(1 << 18, 1 << 28, Duration::from_secs(1));
        let fits = (1 << 18) / 10 - 1;
        let options = options(NonConvergence::KeepGoing, 1);
        assert_eq!(pace.decide(&options, fits).unwrap(), Next::Stop);
        assert_eq!(pace.decide(&options, fits + 1000).unwrap(), Next::Pass);
        assert_eq!(pace.bandwidth, 1 << 28);
    }

    #[test]
    fn a_tiny_pass_is_better_than_none() {
        let mut pace = Pace::default();
        pace.passed(0, 0, Duration::from_millis(10));
        assert_eq!(pace.bandwidth(), 0, "nothing was sent yet");
        pace.passed(1, 4128, Duration::from_millis(10));
        assert_eq!(pace.bandwidth(), 412_800);
    }

    #[test]
    fn a_tiny_pass_does_not_spoil_the_bandwidth() {
        let mut pace = pace();
        pace.passed(1, 4128, Duration::from_millis(10));
        assert_eq!(pace.bandwidth, 1 << 30);
    }
}
