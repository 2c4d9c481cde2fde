// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Repeating a request while a job is in the way.

use crate::deadline::deadline;
use crate::error::Error;
use pageferry_protocol::control::reply::ErrorCode;
use std::time::{Duration, Instant};

/// Time between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Runs `ask` until it returns anything but `Busy`, for at most `timeout` and at least once. Holds
/// no lock between two attempts, so that other threads may send requests meanwhile, also hooks.
///
/// # Errors
/// Those of `ask`; the code is `Busy` if a job was in the way all the time.
pub(crate) fn retry_while_busy<T>(
    timeout: Duration, mut ask: impl FnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    let deadline = deadline(timeout);
    loop {
        let outcome = ask();
        let left = deadline.saturating_duration_since(Instant::now());
        if !matches!(outcome, Err(Error::Refused { code: ErrorCode::Busy, .. })) || left.is_zero() {
            return outcome;
        }
        std::thread::sleep(RETRY_INTERVAL.min(left));
    }
}
