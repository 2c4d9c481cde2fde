// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Starts and ends the recording of discards ([`super::recorded_discards`]).

use super::guest_memory::GuestMemory;
use super::recorded_discards::RecordedDiscards;
use pageferry_protocol::shm::MappingError;
use std::sync::Arc;

/// A running recording. It ends on drop.
#[derive(Debug)]
pub struct DiscardRecorder {
    memory: Arc<GuestMemory>,
    recorded: Arc<RecordedDiscards>,
}

impl DiscardRecorder {
    /// Starts to record. `now` runs at the same moment: the marks of each discard are set either
    /// before `now` runs, or after it and recorded.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn start(memory: &Arc<GuestMemory>, now: impl FnOnce()) -> Result<Self, MappingError> {
        let recorded = Arc::new(RecordedDiscards::none(memory.blocks())?);
        let marking = memory.marking.lock();
        now();
        memory.set_recorded(Some(recorded.clone()));
        drop(marking);
        Ok(Self { memory: memory.clone(), recorded })
    }

    /// What was recorded until now.
    pub fn recorded(&self) -> &RecordedDiscards {
        &self.recorded
    }
}

impl Drop for DiscardRecorder {
    fn drop(&mut self) {
        self.memory.clear_recorded(&self.recorded);
    }
}
