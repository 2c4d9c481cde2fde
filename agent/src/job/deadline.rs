// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A deadline that all waits of a job share while its guest is paused for the hand-over.
//!
//! [`Stop`](crate::outgoing::stop::Stop) sets it and removes it.

use crate::lock::lock;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The deadline of a job's stop. It is not set while there is no stop. Clones share the deadline.
#[derive(Debug, Clone, Default)]
pub struct Deadline(Arc<Mutex<Option<Instant>>>);

impl Deadline {
    fn at(&self) -> Option<Instant> {
        *lock(&self.0)
    }

    /// Sets the deadline, or removes it.
    pub fn set(&self, at: Option<Instant>) {
        *lock(&self.0) = at;
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
