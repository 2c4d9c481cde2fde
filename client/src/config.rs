//! How a client is set up.

use crate::error::Error;
use std::time::Duration;

/// Shortest time that a [`Config`] may name: with less, threads of the client would do nothing but
/// look at the clock.
const SHORTEST: Duration = Duration::from_millis(1);
/// How a client is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes of guest physical address space that the dirty log covers, from address zero. The
    /// default of 4 TiB takes a memfd of 128 MiB, which is sparse: it costs memory only where guest
    /// pages are dirty. No block can lie outside.
    pub log_covers: u64,
    /// How long the agent may take to answer a request, and to take an answer. It is lost if it
    /// takes longer. While it takes a snapshot it answers a discard when it has saved what that
    /// covers: large ones are cut into requests with which a disk that saves 13 MiB in a second is
    /// in time, if this and `stall_timeout` are at least 80 milliseconds. To listen at a name it
    /// looks that up for up to 5 seconds, so leave it more than those.
    pub request_timeout: Duration,
    /// The same, while the agent holds up a guest that can go on without it: a background snapshot
    /// watches its writes, or it is paused by a hook and not given up. `request_timeout` if that is
    /// shorter. An agent that hangs is found within this time and half a second then, and the guest
    /// goes on. The agent answers at any time, however busy its jobs are; what this has to cover is
    /// a machine that gives the agent no processor for a while. A false alarm costs the job.
    ///
    /// A guest whose memory is still to come (postcopy, lazy restore) cannot go on without its
    /// agent, and a false alarm would cost the guest. So there `request_timeout` counts.
    pub stall_timeout: Duration,
    /// Time between two signs of life of the agent while nothing waits for it. An idle agent that
    /// hangs is found within this time and `request_timeout`, and
    /// [`Hooks::agent_lost`](crate::Hooks::agent_lost) is called.
    pub heartbeat: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            log_covers: 4 << 40,
            request_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(3),
            heartbeat: Duration::from_secs(5),
        }
    }
}

impl Config {
    /// Refuses times that are too short.
    ///
    /// # Errors
    /// Which one, and what is allowed.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Config { request_timeout, stall_timeout, heartbeat, log_covers: _ } = *self;
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_are_too_short_are_refused_by_name() {
        Config::default().check().unwrap();
        Config { request_timeout: Duration::MAX, ..Config::default() }.check().unwrap();
        let short = Duration::from_micros(1);
        let configs = [
            ("request_timeout", Config { request_timeout: short, ..Config::default() }),
            ("stall_timeout", Config { stall_timeout: short, ..Config::default() }),
            ("heartbeat", Config { heartbeat: Duration::ZERO, ..Config::default() }),
        ];
        for (field, config) in configs {
            let error = config.check().unwrap_err().to_string();
            assert!(
                error.starts_with(field) && error.ends_with("allowed are 1ms and more"),
                "{error}"
            );
        }
    }
}
