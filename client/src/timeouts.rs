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

use crate::config::Config;
use crate::ownership::SharedOwnership;
use crate::watched_writes::WatchedWrites;
use std::sync::Arc;
use std::time::Duration;

/// How long the agent may take, given what depends on it just now.
#[derive(Debug, Clone)]
pub(crate) struct Timeouts {
    request_timeout: Duration,
    shortest: Duration,
    ownership: Arc<SharedOwnership>,
    writes: Arc<WatchedWrites>,
}

impl Timeouts {
    pub(crate) fn new(
        config: &Config, ownership: &Arc<SharedOwnership>, writes: &Arc<WatchedWrites>,
    ) -> Self {
        Self {
            request_timeout: config.request_timeout,
            shortest: config.request_timeout.min(config.stall_timeout),
            ownership: Arc::clone(ownership),
            writes: Arc::clone(writes),
        }
    }

    /// How long the agent may take to answer now.
    pub(crate) fn current(&self) -> Duration {
        let held_up = self.writes.are_watched() || self.ownership.lock().is_paused_for_agent();
        if held_up { self.shortest } else { self.request_timeout }
    }

    /// The same at its least.
    pub(crate) fn shortest(&self) -> Duration {
        self.shortest
    }

    /// The same at its most.
    pub(crate) fn longest(&self) -> Duration {
        self.request_timeout
    }
}
