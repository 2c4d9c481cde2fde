// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A deadline that all waits of a job share while its guest is paused for the hand-over.
//!
//! [`Stop`](crate::outgoing::stop::Stop) sets it and removes it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// The instant from which deadlines count.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The deadline of a job's stop. It is not set while there is no stop. Clones share the deadline.
///
/// It has no lock, because every wait of every stream looks at it.
#[derive(Debug, Clone, Default)]
pub struct Deadline {
    /// Nanoseconds from [`START`]; 0 if it is not set.
    at: Arc<AtomicU64>,
}

impl Deadline {
    fn at(&self) -> Option<Instant> {
        match self.at.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(*START + Duration::from_nanos(nanos)),
        }
    }

    /// Sets the deadline, or removes it.
    pub fn set(&self, at: Option<Instant>) {
        let start = *START;
        let nanos = |at: Instant| {
            u64::try_from(at.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX).max(1)
        };
        self.at.store(at.map_or(0, nanos), Ordering::Relaxed);
    }

    /// The earlier one of `own` and this deadline.
    pub fn cap(&self, own: Instant) -> Instant {
        self.at().map_or(own, |at| at.min(own))
    }

    /// The smaller one of `own` and the time until this deadline.
    pub fn cap_timeout(&self, own: Duration) -> Duration {
        self.at().map_or(own, |at| own.min(at.saturating_duration_since(Instant::now())))
    }

    /// True if the deadline is set and has passed.
    pub fn has_passed(&self) -> bool {
        self.at().is_some_and(|at| Instant::now() >= at)
    }
}
