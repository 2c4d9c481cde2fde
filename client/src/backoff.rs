// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pauses between attempts to start an agent.

use std::time::Duration;

/// The first pause.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest pause. An agent that served for this long was a good one.
pub(crate) const LONGEST: Duration = Duration::from_secs(5);

/// Pauses that double from [`SHORTEST`] to [`LONGEST`] until an agent has served for a while.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: SHORTEST }
    }
}

impl Backoff {
    /// The pause before the next attempt.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        pause
    }

    /// An agent was lost that served for this time. One that always ends at once, as with an option
    /// that it does not know, must not be started again and again without a pause.
    pub(crate) fn served(&mut self, time: Duration) {
        if time >= LONGEST {
            self.next = SHORTEST;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_an_agent_served_for_a_while() {
        let mut backoff = Backoff::default();
        let mut pauses = || [(); 8].map(|()| backoff.pause().as_millis());
        assert_eq!(pauses(), [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        backoff.served(LONGEST - Duration::from_millis(1));
        assert_eq!(backoff.pause(), LONGEST);
        backoff.served(LONGEST);
        assert_eq!(backoff.pause(), SHORTEST);
    }
}
