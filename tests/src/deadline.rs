// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting for a condition, always with a deadline.

use crate::Error;
use std::time::{Duration, Instant};

/// Interval at which a condition is polled.
const LOOK: Duration = Duration::from_millis(2);

/// Polls `found` until it returns something, for at most `timeout`. `what` names it in the error.
///
/// # Errors
/// If it did not come in time.
pub fn wait_for<T>(
    what: &str, timeout: Duration, mut found: impl FnMut() -> Option<T>,
) -> Result<T, Error> {
    let started = Instant::now();
    loop {
        if let Some(value) = found() {
            return Ok(value);
        }
        if started.elapsed() >= timeout {
            return Err(Error::Deadline { what: what.to_owned(), timeout });
        }
        std::thread::sleep(LOOK);
    }
}

/// Polls `holds` until it returns true, for at most `timeout`. `what` names it in the error.
///
/// # Errors
/// If it did not come true in time.
pub fn wait_until(
    what: &str, timeout: Duration, mut holds: impl FnMut() -> bool,
) -> Result<(), Error> {
    wait_for(what, timeout, || holds().then_some(()))
}
