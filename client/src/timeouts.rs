// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long an agent may take to answer.
//!
//! | while | timeout |
//! | --- | --- |
//! | memory is protected, the guest is paused for the agent, or memory is missing that the next agent would bring | the shorter of [`Config::stall_timeout`] and [`Config::request_timeout`] |
//! | memory is missing that no other agent can bring, and otherwise | [`Config::request_timeout`] |
//!
//! A guest that is paused, or that waits to write, continues when its agent is given up, and one
//! that waits for a page when the next agent has come. So a short timeout costs at most a job. A
//! guest whose memory is missing and that no other agent can help is lost with its agent, so there
//! a false alarm is worse than a longer wait.
//!
//! The timeout is read again while a request waits for its answer: the guest may be paused, or its
//! memory protected, after the request was sent.
//!
//! [`Config::stall_timeout`]: crate::Config::stall_timeout
//! [`Config::request_timeout`]: crate::Config::request_timeout

use crate::config::Config;
use crate::missing_pages::MissingPages;
use crate::ownership::SharedOwnership;
use crate::watched_writes::WatchedWrites;
use std::sync::Arc;
use std::time::Duration;

/// The timeout of a request, which depends on what waits for the agent at the moment.
#[derive(Debug, Clone)]
pub(crate) struct Timeouts {
    request_timeout: Duration,
    shortest: Duration,
    ownership: Arc<SharedOwnership>,
    writes: Arc<WatchedWrites>,
    missing: Arc<MissingPages>,
}

impl Timeouts {
    pub(crate) fn new(
        config: &Config, ownership: &Arc<SharedOwnership>, writes: &Arc<WatchedWrites>,
        missing: &Arc<MissingPages>,
    ) -> Self {
        Self {
            request_timeout: config.request_timeout,
            shortest: config.request_timeout.min(config.stall_timeout),
            ownership: Arc::clone(ownership),
            writes: Arc::clone(writes),
            missing: Arc::clone(missing),
        }
    }

    /// The timeout at this moment.
    pub(crate) fn current(&self) -> Duration {
        let held_up = self.writes.are_watched()
            || self.missing.is_continuable()
            || self.ownership.lock().is_paused_for_agent();
        if held_up { self.shortest } else { self.request_timeout }
    }

    /// The shortest timeout that a request may have.
    pub(crate) fn shortest(&self) -> Duration {
        self.shortest
    }

    /// The longest timeout that a request may have.
    pub(crate) fn longest(&self) -> Duration {
        self.request_timeout
    }
}
