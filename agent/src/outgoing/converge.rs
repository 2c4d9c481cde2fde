// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Convergence: the decision when to stop the guest.
//!
//! After each pass the agent computes the expected downtime: the time to send the dirty pages at
//! the measured bandwidth, plus the time of a sync. If that is within the downtime limit, or no
//! page is dirty, the guest is stopped. If it is still above the limit after `max_passes` passes,
//! the policy decides.
//!
//! A limit below the time of a sync can be reached only when no page is dirty. Passes are short
//! then, and one more pass changes little. To save work, only the first `QUICK_PASSES` passes
//! follow each other at once. Each later pass starts at least `INTERVAL` after the one before.

use crate::job::{JobError, micros};
use crate::outgoing::OutgoingError;
use pageferry_protocol::control::job::{Counters, Mode, NonConvergence, OutgoingOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use std::time::Duration;

/// A pass with fewer bytes says little about the bandwidth.
const MEANINGFUL: u64 = 1 << 20;
/// Number of passes that follow each other at once: each may be much shorter than the last.
const QUICK_PASSES: u64 = 30;
/// Shortest time between the starts of two later passes.
const INTERVAL: Duration = Duration::from_millis(100);
/// The first throttle, and the increase of each later step, in percent.
const THROTTLE_STEP: u32 = 20;
const THROTTLE_MORE: u32 = 10;

/// The measurements of the passes so far.
#[derive(Debug, Clone, Default)]
pub struct PassMeasurements {
    passes: u64,
    /// Bytes per second on the wire.
    bandwidth: u64,
    /// Bytes of pages per second. More than `bandwidth` if the pages are compressed.
    content_rate: u64,
    /// Pages per second.
    dirty_rate: u64,
    sync_time: Duration,
    pass_time: Duration,
    expected: Duration,
    throttle: u32,
}

/// What to do after a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Run another pass.
    Pass,
    /// Stop the guest.
    Stop,
    /// Throttle the guest by this many percent, then run another pass.
    Throttle(u32),
    /// Move the guest now, and its memory after it.
    Postcopy,
}

impl PassMeasurements {
    /// Number of passes that have ended.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// Measured bandwidth in bytes per second; 0 if nothing was sent yet.
    pub fn bandwidth(&self) -> u64 {
        self.bandwidth
    }

    /// The time that the last sync took, with its fix-up.
    pub fn sync_time(&self) -> Duration {
        self.sync_time
    }

    /// Notes the time of a sync.
    pub fn record_sync(&mut self, time: Duration) {
        self.sync_time = time;
    }

    /// Adds the time of its fix-up.
    pub fn add_fixup_time(&mut self, time: Duration) {
        self.sync_time += time;
    }

    /// Notes what a pass sent, and its time.
    pub fn record_pass(&mut self, pages: u64, bytes: u64, time: Duration) {
        self.passes += 1;
        self.pass_time = time;
        // A short pass measures latency, so it counts only while there is no better measurement.
        if bytes.max(pages * PAGE_SIZE) >= MEANINGFUL || (self.bandwidth == 0 && bytes > 0) {
            self.bandwidth = per_second(bytes, time).max(1);
            self.content_rate = per_second(bytes.max(pages * PAGE_SIZE), time).max(1);
        }
    }

    /// How long to wait before the next pass.
    pub fn delay_before_next_pass(&self) -> Duration {
        if self.passes < QUICK_PASSES {
            Duration::ZERO
        } else {
            INTERVAL.saturating_sub(self.pass_time + self.sync_time)
        }
    }

    /// Decides what to do. After the last sync `remaining` pages are dirty.
    ///
    /// # Errors
    /// If the passes do not converge and the policy is to fail.
    pub fn decide(&mut self, options: &OutgoingOptions, remaining: u64) -> Result<Next, JobError> {
        self.dirty_rate = per_second(remaining, self.pass_time);
        self.expected = self.expect(remaining, options.bandwidth);
        let limit = options.downtime_limit;
        // If nothing is dirty, another pass cannot make the downtime shorter.
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
            NonConvergence::Fail => Err(OutgoingError::NotConverging {
                passes: self.passes,
                remaining,
                expected: self.expected,
                limit,
            }
            .into()),
        }
    }

    /// `limit` is the limit of the bandwidth that holds now, which may be below what was measured.
    fn expect(&self, remaining: u64, limit: u64) -> Duration {
        let slower = match limit {
            0 => 1.0,
            limit => (self.bandwidth as f64 / limit as f64).max(1.0),
        };
        let send = match remaining {
            0 => Duration::ZERO,
            // Nothing was sent yet, so the bandwidth is unknown. A pass will measure it.
            _ if self.content_rate == 0 => Duration::MAX,
            pages => Duration::from_secs_f64(
                (pages * PAGE_SIZE) as f64 / self.content_rate as f64 * slower,
            ),
        };
        send.saturating_add(self.sync_time)
    }

    /// Copies the measurements into the counters of the job.
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
    fn pace() -> PassMeasurements {
        let mut pace = PassMeasurements::default();
        pace.record_pass(1 << 18, 1 << 30, Duration::from_secs(1));
        pace
    }

    #[test]
    fn the_guest_is_stopped_when_pages_and_sync_fit_the_limit() {
        let options = options(NonConvergence::KeepGoing, 1);
        let fits = (1 << 18) / 10 - 1;
        assert_eq!(pace().decide(&options, fits).unwrap(), Next::Stop);
        assert_eq!(pace().decide(&options, fits + 1000).unwrap(), Next::Pass);
        let mut slow = pace();
        slow.record_sync(Duration::from_millis(50));
        assert_eq!(slow.decide(&options, fits).unwrap(), Next::Pass);
        assert_eq!(slow.decide(&options, fits / 2 - 100).unwrap(), Next::Stop);
    }

    #[test]
    fn a_limit_below_what_was_measured_counts() {
        let options = options(NonConvergence::KeepGoing, 1);
        let fits = (1 << 18) / 10 - 1;
        let lowered = |bandwidth| OutgoingOptions { bandwidth, ..options.clone() };
        assert_eq!(pace().decide(&lowered(2 << 30), fits).unwrap(), Next::Stop);
        assert_eq!(pace().decide(&lowered(1 << 29), fits).unwrap(), Next::Pass);
        assert_eq!(pace().decide(&lowered(1 << 29), fits / 2).unwrap(), Next::Stop);
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
            pace.record_pass(1 << 18, 1 << 30, Duration::from_secs(1));
            assert_eq!(pace.decide(&options(policy, 2), much).ok(), first);
        }
    }

    #[test]
    fn the_guest_is_stopped_when_no_page_is_dirty() {
        let mut pace = pace();
        pace.record_sync(Duration::from_millis(5));
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
        pace.record_sync(Duration::from_millis(5));
        let limit = |policy| OutgoingOptions {
            downtime_limit: Duration::from_millis(1),
            ..options(policy, 1)
        };
        assert_eq!(pace.decide(&limit(NonConvergence::StopAnyway), 1).unwrap(), Next::Stop);
        assert!(pace.decide(&limit(NonConvergence::Fail), 1).is_err());
    }

    #[test]
    fn later_passes_start_at_an_interval() {
        let mut pace = PassMeasurements::default();
        for _ in 0..QUICK_PASSES {
            assert_eq!(pace.delay_before_next_pass(), Duration::ZERO);
            pace.record_pass(1, 4128, Duration::from_millis(10));
        }
        pace.record_sync(Duration::from_millis(5));
        assert_eq!(pace.delay_before_next_pass(), INTERVAL - Duration::from_millis(15));
        pace.record_pass(1 << 18, 1 << 30, Duration::from_secs(1));
        assert_eq!(pace.delay_before_next_pass(), Duration::ZERO);
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
    fn the_expected_downtime_counts_compression() {
        let mut pace = PassMeasurements::default();
        // 1 GiB of pages in a second, compressed to a quarter.
        pace.record_pass(1 << 18, 1 << 28, Duration::from_secs(1));
        let fits = (1 << 18) / 10 - 1;
        let options = options(NonConvergence::KeepGoing, 1);
        assert_eq!(pace.decide(&options, fits).unwrap(), Next::Stop);
        assert_eq!(pace.decide(&options, fits + 1000).unwrap(), Next::Pass);
        assert_eq!(pace.bandwidth, 1 << 28);
    }

    #[test]
    fn a_tiny_pass_counts_while_there_is_no_other() {
        let mut pace = PassMeasurements::default();
        pace.record_pass(0, 0, Duration::from_millis(10));
        assert_eq!(pace.bandwidth(), 0, "nothing was sent yet");
        pace.record_pass(1, 4128, Duration::from_millis(10));
        assert_eq!(pace.bandwidth(), 412_800);
    }

    #[test]
    fn a_tiny_pass_does_not_spoil_the_bandwidth() {
        let mut pace = pace();
        pace.record_pass(1, 4128, Duration::from_millis(10));
        assert_eq!(pace.bandwidth, 1 << 30);
    }
}
