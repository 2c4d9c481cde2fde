// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty log that the VMM shares with its back-ends (`SET_LOG_BASE`).

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::memory::GuestMemory;
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::Hook;
use std::sync::Arc;
use std::time::Duration;

/// The shared log. It is always on, because the VMM's devices and its other vhost-user back-ends
/// mark it.
pub struct LogTracker;

impl Tracker for LogTracker {
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        let log = memory.log.as_ref().ok_or(TrackingError::NoLog)?;
        let covered = log.log.pages();
        // Bits that are set now are older than the start.
        memory.blocks().iter().for_each(|block| {
            log.log.bits().clear(block.log_pages());
        });
        match memory.blocks().iter().find(|block| block.log_pages().end() > covered) {
            Some(block) => Err(TrackingError::ShortLog {
                covered,
                id: block.geometry.id,
                end: block.log_pages().end(),
            }),
            None => Ok(()),
        }
    }

    fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError> {
        let log = memory.log.as_ref().ok_or(TrackingError::NoLog)?;
        for (index, block) in memory.blocks().iter().enumerate() {
            // Once this agent has taken bits, no other agent can find them.
            memory.current.check()?;
            log.log.drain_into(block.log_pages(), dirty.block(index));
        }
        if log.was_lost() {
            return Err(TrackingError::Lost { what: "dirty log", state: "dirty" });
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

/// Tells a VMM whose writers all mark the log that a job is about to read memory. The VMM gives
/// back first what it has queued, which is then not read for nothing. The hooks of other trackers
/// do the same.
pub(super) struct LogStart {
    hooks: Arc<Hooks>,
    timeout: Duration,
}

impl LogStart {
    pub(super) fn new(hooks: Arc<Hooks>, timeout: Duration) -> Self {
        Self { hooks, timeout }
    }
}

impl Tracker for LogStart {
    fn start(&mut self, _memory: &GuestMemory) -> Result<(), TrackingError> {
        let hook = Hook::StartTracking { sources: Declared::LOG_IS_COMPLETE };
        Ok(self.hooks.ask(&hook, self.timeout)?)
    }

    fn sync(&mut self, _memory: &GuestMemory, _dirty: &DirtyPages) -> Result<(), TrackingError> {
        Ok(())
    }

    fn stop(&mut self) {}
}
