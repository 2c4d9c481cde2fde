//! What the hooks of one agent work on.

use super::error::HookError;
use crate::error::Error;
use crate::faults::Faults;
use crate::heartbeat::Probe;
use crate::link::Link;
use crate::memory::Memory;
use crate::ownership::{Forbidden, SharedOwnership};
use crate::tracking::active::Tracking;
use crate::writes::Writes;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use std::sync::Arc;

/// The connection to the agent, and what its hook channel shares with the client.
#[derive(Debug)]
pub(crate) struct HookContext {
    pub(crate) link: Arc<Link>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) ownership: Arc<SharedOwnership>,
    pub(crate) faults: Arc<Faults>,
    pub(crate) writes: Arc<Writes>,
    pub(crate) tracking: Arc<Tracking>,
    pub(crate) probe: Probe,
}

impl HookContext {
    /// Refuses to pause or to save a guest whose memory is not all here: a missing page would be
    /// taken for zero.
    pub(super) fn check_whole(&self) -> Reply<()> {
        if self.faults.is_whole() {
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
