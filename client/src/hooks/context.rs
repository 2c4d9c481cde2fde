// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the hooks of one agent work on.

use super::error::HookError;
use crate::client::WeakClient;
use crate::error::Error;
use crate::heartbeat::Probe;
use crate::link::Link;
use crate::memory::Memory;
use crate::missing_pages::MissingPages;
use crate::ownership::{Forbidden, SharedOwnership};
use crate::tracking::active::ActiveTrackers;
use crate::watched_writes::WatchedWrites;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use std::sync::Arc;

/// The connection to the agent, and what its hook channel shares with the client.
#[derive(Debug)]
pub(crate) struct HookContext {
    pub(crate) link: Arc<Link>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) ownership: Arc<SharedOwnership>,
    pub(crate) missing: Arc<MissingPages>,
    pub(crate) writes: Arc<WatchedWrites>,
    pub(crate) tracking: Arc<ActiveTrackers>,
    pub(crate) probe: Probe,
    pub(crate) client: WeakClient,
}

impl HookContext {
    /// Refuses to pause or to save a guest whose memory is not all here: a missing page would be
    /// taken for zero.
    pub(super) fn check_memory_complete(&self) -> Reply<()> {
        if self.missing.is_complete() {
            Ok(())
        } else {
            Err(RemoteError::new(ErrorCode::State, Error::MemoryLost))
        }
    }
}

/// The answer to a hook that the VMM could not carry out.
pub(super) fn failed(error: HookError) -> RemoteError {
    let code = if error.is_panic() { ErrorCode::Panicked } else { ErrorCode::Other };
    RemoteError::new(code, error)
}

/// The answer to a hook that the agent may not call now.
pub(super) fn forbidden(error: Forbidden) -> RemoteError {
    RemoteError::new(ErrorCode::State, error)
}
