// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Points in time that are a duration away.

use std::time::{Duration, Instant};

/// As good as never, and far from the end of the clock.
const LONGEST: Duration = Duration::from_secs(1 << 32);

/// The point in time that is `time` from now. Anything above 136 years counts as 136 years, since
/// the clock may be unable to add it.
pub(crate) fn deadline(time: Duration) -> Instant {
    Instant::now() + time.min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_too_long_for_the_clock() {
        assert!(deadline(Duration::MAX) > Instant::now());
    }
}
