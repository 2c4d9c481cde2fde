// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waking a [supervisor](crate::Supervisor) that waits.

use crate::sync::lock;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Counts what may change the decision of a supervisor: the last client is dropped, the guest is
/// taken by force, the VMM has started an agent.
#[derive(Debug, Default)]
pub(crate) struct Wakeup {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Wakeup {
    /// Wakes the supervisor. It then looks at everything again.
    pub(crate) fn wake(&self) {
        *lock(&self.count) += 1;
        self.changed.notify_all();
    }

    /// How often [`Wakeup::wake`] was called. Read this before looking at anything, and then wait
    /// for the next call.
    pub(crate) fn count(&self) -> u64 {
        *lock(&self.count)
    }

    /// Waits until [`Wakeup::wake`] was called more than `seen` times, but no longer than
    /// `timeout`.
    pub(crate) fn wait(&self, seen: u64, timeout: Duration) {
        let waited =
            self.changed.wait_timeout_while(lock(&self.count), timeout, |count| *count == seen);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Otherwise this test does not end.
    const AN_HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_wait_ends_when_it_is_woken_also_before_it_began() {
        let wakeup = Arc::new(Wakeup::default());
        let seen = wakeup.count();
        wakeup.wake();
        wakeup.wait(seen, AN_HOUR);

        let seen = wakeup.count();
        let waiting = Arc::clone(&wakeup);
        let thread = std::thread::spawn(move || waiting.wait(seen, AN_HOUR));
        wakeup.wake();
        thread.join().unwrap();
        assert_ne!(wakeup.count(), seen);
    }
}
