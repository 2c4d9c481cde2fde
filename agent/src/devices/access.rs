// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When a device may change the guest's memory.

use crate::memory::GuestMemory;
use std::fmt::Debug;
use std::sync::Arc;

/// The memory of the session, for a device.
pub trait SessionMemory: Debug + Send + Sync {
    /// Runs `act` on the session's memory. Returns false, and does nothing, while a job allows no
    /// change: it is past its last sync, waits for a guest, or restores one. The device is told
    /// when a job changes its phase, and tries again then.
    fn with_memory(&self, act: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool;

    /// The session's memory, to look at. `None` if the agent is ending.
    fn memory(&self) -> Option<Arc<GuestMemory>>;
}
