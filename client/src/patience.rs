//! How long an agent may take.
//!
//! | while | patience |
//! | --- | --- |
//! | memory is protected, or the guest is paused for the agent | the shorter of [`Config::stall_timeout`] and [`Config::request_timeout`] |
//! | memory is missing, and otherwise | [`Config::request_timeout`] |
//!
//! Without an agent a guest goes on that is paused, or that waits to write. One whose memory is
//! missing is lost, so a false alarm is worse there than a longer wait.
//!
//! The patience is asked for again while an answer is waited for: the guest may be paused, or its
//! memory protected, after the request was sent.
//!
//! [`Config::stall_timeout`]: crate::Config::stall_timeout
//! [`Config::request_timeout`]: crate::Config::request_timeout

use crate::client::Config;
use crate::error::Error;
use crate::ownership::SharedOwnership;
use crate::writes::Writes;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Shortest time that a [`Config`] may name: with less, threads of the client would do nothing but
/// look at the clock.
const SHORTEST: Duration = Duration::from_millis(1);
/// As good as never, and far from the end of the clock.
const LONGEST: Duration = Duration::from_secs(1 << 32);

/// The point in time at which this time is over. A time that the clock cannot add is as long as
/// 136 years.
pub(crate) fn deadline(time: Duration) -> Instant {
    Instant::now() + time.min(LONGEST)
}

/// Refuses a configuration whose times are too short.
///
/// # Errors
/// Which one, and what is allowed.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    let Config { request_timeout, stall_timeout, heartbeat, log_covers: _ } = *config;
    let times = [
        ("request_timeout", request_timeout),
        ("stall_timeout", stall_timeout),
        ("heartbeat", heartbeat),
    ];
    match times.into_iter().find(|(_, time)| *time < SHORTEST) {
        Some((field, value)) => Err(Error::TooShort { field, value, shortest: SHORTEST }),
        None => Ok(()),
    }
}

/// How long the agent may take, given what depends on it just now.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    request_timeout: Duration,
    least: Duration,
    ownership: Arc<SharedOwnership>,
    writes: Arc<Writes>,
}

impl Patience {
    pub(crate) fn new(
        config: &Config, ownership: &Arc<SharedOwnership>, writes: &Arc<Writes>,
    ) -> Self {
        Self {
            request_timeout: config.request_timeout,
            least: config.request_timeout.min(config.stall_timeout),
            ownership: Arc::clone(ownership),
            writes: Arc::clone(writes),
        }
    }

    /// How long the agent may take to answer now.
    pub(crate) fn now(&self) -> Duration {
        let held_up = self.writes.are_watched() || self.ownership.lock().waits_for_agent();
        if held_up { self.least } else { self.request_timeout }
    }

    /// The same at its least.
    pub(crate) fn least(&self) -> Duration {
        self.least
    }

    /// The same at its most.
    pub(crate) fn most(&self) -> Duration {
        self.request_timeout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_too_long_for_the_clock() {
        assert!(deadline(Duration::MAX) > Instant::now());
    }

    #[test]
    fn times_that_are_too_short_are_refused_by_name() {
        check(&Config::default()).unwrap();
        check(&Config { request_timeout: Duration::MAX, ..Config::default() }).unwrap();
        let short = Duration::from_micros(1);
        let configs = [
            ("request_timeout", Config { request_timeout: short, ..Config::default() }),
            ("stall_timeout", Config { stall_timeout: short, ..Config::default() }),
            ("heartbeat", Config { heartbeat: Duration::ZERO, ..Config::default() }),
        ];
        for (field, config) in configs {
            let error = check(&config).unwrap_err().to_string();
            assert!(
                error.starts_with(field) && error.ends_with("allowed are 1ms and more"),
                "{error}"
            );
        }
    }
}
