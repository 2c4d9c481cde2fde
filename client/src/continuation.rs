// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the next agent is had for a guest whose memory is missing, what it needs, and when that is
//! given up.
//!
//! The first attempt is made at once, because the guest may be waiting. The pauses between further
//! ones grow. An agent that is lost again without having brought a page counts as an attempt that
//! failed, unless it has answered for as long as all attempts may take: one that always dies or
//! hangs as it continues must not be started for ever while the guest waits.

use crate::wakeup::Wakeup;
use pageferry_protocol::control::grants::MAX_GRANTS;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// By how much each pause is longer than the one before.
const STEP: Duration = Duration::from_millis(5);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(1);

/// What the next agent needs of the job that it continues.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The journal, as the agent before has encoded it. Empty if there is none.
    pub(crate) journal: Vec<u8>,
    /// What was granted to the agent before.
    pub(crate) grants: Vec<OwnedFd>,
}

impl Kept {
    /// Keeps the journal, and duplicates of these descriptors.
    pub(crate) fn new(journal: Vec<u8>, grants: &[OwnedFd]) -> io::Result<Self> {
        let grants = grants.iter().take(MAX_GRANTS).map(OwnedFd::try_clone);
        Ok(Self { journal, grants: grants.collect::<Result<_, _>>()? })
    }

    /// True if no other agent can continue.
    pub(crate) fn is_empty(&self) -> bool {
        self.journal.is_empty()
    }
}

/// How a supervisor replaces an agent that was lost while memory is missing.
pub(crate) struct Replacer {
    /// Attaches an agent in place of the one of this connection. Does nothing if the VMM has
    /// decided otherwise.
    pub(crate) replace: Box<dyn Fn(u64) -> Result<(), String> + Send + Sync>,
    /// Wakes the supervisor.
    pub(crate) wakeup: Arc<Wakeup>,
    /// How long the guest waits for the next agent.
    pub(crate) limit: Duration,
}

impl std::fmt::Debug for Replacer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replacer").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// The attempts since an agent has brought a page.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    count: u32,
    lost_at: Option<Instant>,
    attached_at: Option<Instant>,
    /// When the last agent has answered.
    answered_at: Option<Instant>,
    /// Pages that were owed when the agent before was lost.
    owed: u64,
}

impl Attempts {
    /// An agent was lost, and so many pages are owed.
    pub(crate) fn lost(&mut self, now: Instant, owed: u64, limit: Duration) {
        let served = self.answered_at.zip(self.attached_at);
        let served =
            served.map(|(answered, attached)| answered.saturating_duration_since(attached));
        if owed < self.owed || served.is_some_and(|served| served >= limit) {
            *self = Self::default();
        }
        self.owed = owed;
        self.lost_at.get_or_insert(now);
    }

    /// The agent has answered.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.answered_at = Some(now);
    }

    /// The pause before the next attempt. `None` if there is no other within `limit`.
    pub(crate) fn next(&mut self, now: Instant, limit: Duration) -> Option<Duration> {
        let waited = self.lost_at.map_or(Duration::ZERO, |at| now.duration_since(at));
        if self.count > 0 && waited >= limit {
            return None;
        }
        let pause = (STEP * self.count).min(LONGEST);
        self.count += 1;
        Some(pause)
    }

    /// An agent continues.
    pub(crate) fn attached(&mut self, now: Instant) {
        (self.attached_at, self.answered_at) = (Some(now), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn agents_that_bring_nothing_are_attempts_until_the_time_is_over() {
        // Dead at once, and frozen: such an agent is found after a while.
        for found_after in [Duration::from_millis(100), Duration::from_secs(10)] {
            let (start, mut attempts) = (Instant::now(), Attempts::default());
            let (mut now, mut count) = (start, 0);
            attempts.lost(now, 5, LIMIT);
            while let Some(pause) = attempts.next(now, LIMIT) {
                assert_eq!(pause, (STEP * count).min(LONGEST));
                count += 1;
                now += pause;
                attempts.attached(now);
                now += found_after;
                attempts.lost(now, 5, LIMIT);
            }
            let over = now - start;
            assert!(over >= LIMIT && over < LIMIT + LONGEST + found_after, "{over:?}");
        }
    }

    #[test]
    fn an_agent_that_brings_a_page_or_answers_for_long_begins_anew() {
        let (now, mut attempts) = (Instant::now(), Attempts::default());
        let late = now + LIMIT;
        attempts.lost(now, 5, LIMIT);
        assert_eq!(attempts.next(now, LIMIT), Some(Duration::ZERO));
        attempts.attached(now);
        attempts.lost(late, 5, LIMIT);
        assert_eq!(attempts.next(late, LIMIT), None, "it has neither");
        attempts.lost(late, 4, LIMIT);
        assert_eq!(attempts.next(late, LIMIT), Some(Duration::ZERO));
        attempts.attached(late);
        attempts.answered(late + LIMIT);
        attempts.lost(late + LIMIT, 4, LIMIT);
        assert_eq!(attempts.next(late + LIMIT, LIMIT), Some(Duration::ZERO));
    }

    #[test]
    fn without_time_there_is_one_attempt() {
        let (now, mut attempts) = (Instant::now(), Attempts::default());
        attempts.lost(now, 5, Duration::ZERO);
        assert_eq!(attempts.next(now, Duration::ZERO), Some(Duration::ZERO));
        assert_eq!(attempts.next(now, Duration::ZERO), None);
    }
}
