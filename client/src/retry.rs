//! Asking again while a job is in the way.

use crate::deadline::deadline;
use crate::error::Error;
use pageferry_protocol::control::reply::ErrorCode;
use std::time::{Duration, Instant};

/// Time between two tries.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Runs `ask` until it returns anything but that a job is in the way, for `timeout` at most and at
/// least once. Between two tries nothing of the client is held, so others may ask meanwhile, the
/// hooks among them.
///
/// # Errors
/// Those of `ask`; the code is `Busy` if the job was in the way all the time.
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
