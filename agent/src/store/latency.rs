// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a store takes to answer, and when an answer is late.

use std::time::Duration;

/// Number of answers that are remembered.
const REMEMBERED: usize = 64;
/// Fewest answers from which something is known.
const FEWEST: usize = 8;
/// Before that, an answer is late after this time.
const AT_FIRST: Duration = Duration::from_millis(300);
/// The shortest and longest time after which an answer is late.
const BOUNDS: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(2));

/// How long the last answers took.
#[derive(Debug, Default)]
pub(super) struct Latency {
    last: Vec<Duration>,
    next: usize,
}

impl Latency {
    /// An answer took so long.
    pub(super) fn took(&mut self, time: Duration) {
        match self.last.get_mut(self.next) {
            Some(oldest) => *oldest = time,
            None => self.last.push(time),
        }
        self.next = (self.next + 1) % REMEMBERED;
    }

    /// An answer is late after this time: half as long again as 19 of 20 took. So about one request
    /// in twenty is sent twice.
    pub(super) fn hedge(&self) -> Duration {
        if self.last.len() < FEWEST {
            return AT_FIRST;
        }
        let mut sorted = self.last.clone();
        sorted.sort_unstable();
        let usual = sorted.get(sorted.len() * 19 / 20).copied().unwrap_or(AT_FIRST);
        (usual * 3 / 2).clamp(BOUNDS.0, BOUNDS.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_late_when_it_takes_longer_than_most() {
        let mut latency = Latency::default();
        assert_eq!(latency.hedge(), AT_FIRST);
        (0..100).for_each(|_| latency.took(Duration::from_millis(20)));
        assert_eq!(latency.hedge(), Duration::from_millis(30));
        // One that is lost does not change it.
        latency.took(Duration::from_secs(30));
        assert_eq!(latency.hedge(), Duration::from_millis(30));
        (0..100).for_each(|_| latency.took(Duration::from_secs(9)));
        assert_eq!(latency.hedge(), BOUNDS.1);
    }
}
