// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each queue of the balloon is for.
//!
//! The text of the specification gives each queue a fixed number. Linux, and all back-ends, count
//! only the queues of features that were negotiated, so reporting may be 2, 3 or 4. Both are
//! accepted: a driver that counts has set up no queue beyond the number of those that it uses.

use super::feature;

/// The most queues: inflate, deflate, statistics, hinting, reporting.
pub const MAX_QUEUES: usize = 5;
/// The number of the queue of statistics.
pub const STATS: usize = 2;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Pages that go into the balloon.
    Inflate,
    /// Pages that come out.
    Deflate,
    /// What the guest says about its memory.
    Stats,
    /// Free pages that a migration leaves out.
    Hint,
    /// Free memory that the guest reports.
    Report,
}

/// The queues by their numbers in the specification.
const ALL: [Queue; MAX_QUEUES] =
    [Queue::Inflate, Queue::Deflate, Queue::Stats, Queue::Hint, Queue::Report];

/// What the queue with this number is for. `features` are those of the driver, and `in_use` says
/// which queues it has set up. `None` if no feature uses the queue.
pub fn purpose(number: usize, features: u64, in_use: &[bool]) -> Option<Queue> {
    let is_used = |queue: &Queue| match queue {
        Queue::Inflate | Queue::Deflate => true,
        Queue::Stats => features & feature::STATS != 0,
        Queue::Hint => features & feature::HINTING != 0,
        Queue::Report => features & feature::REPORTING != 0,
    };
    let counted: Vec<Queue> = ALL.iter().copied().filter(is_used).collect();
    let is_fixed = in_use.iter().skip(counted.len()).any(|in_use| *in_use);
    if is_fixed { ALL.get(number).copied().filter(is_used) } else { counted.get(number).copied() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_that_count_and_drivers_that_do_not_are_understood() {
        let of = |features, in_use: &[usize]| -> Vec<Option<Queue>> {
            let set: Vec<bool> = (0..MAX_QUEUES).map(|queue| in_use.contains(&queue)).collect();
            in_use.iter().map(|number| purpose(*number, features, &set)).collect()
        };
        use Queue::*;
        let (stats, hinting, reporting) = (feature::STATS, feature::HINTING, feature::REPORTING);
        assert_eq!(of(0, &[0, 1]), [Some(Inflate), Some(Deflate)]);
        assert_eq!(of(reporting, &[0, 1, 2]), [Some(Inflate), Some(Deflate), Some(Report)]);
        assert_eq!(of(stats | reporting, &[2, 3]), [Some(Stats), Some(Report)]);
        assert_eq!(of(reporting, &[0, 4]), [Some(Inflate), Some(Report)]);
        assert_eq!(of(stats | reporting, &[2, 4]), [Some(Stats), Some(Report)]);
        assert_eq!(of(hinting | reporting, &[2, 3]), [Some(Hint), Some(Report)]);
        assert_eq!(of(hinting | reporting, &[3, 4]), [Some(Hint), Some(Report)]);
        assert_eq!(of(0, &[2]), [None], "of a feature that was not chosen");
        assert_eq!(of(stats, &[3]), [None]);
    }
}
