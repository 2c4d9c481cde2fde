// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What one scrape reads from the agent.

use crate::session::sample::SessionSample;

/// The agent at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Connections to the control socket, with the VMM's.
    pub connections: usize,
    /// The VMM, its memory and its jobs.
    pub session: SessionSample,
}
