//! What the VMM gave back since a job began to listen.
//!
//! A job that fills memory changes the marks of discards itself, so the marks do not tell it what
//! the VMM said meanwhile; and a page that is freed has no mark at all. So each discard and each
//! free also notes its pages here, if somebody listens. They are noted with
//! [`GuestMemory::marking`] held, and before the fence: a worker that published its word first
//! either sees the note, or is waited for.

use super::GuestMemory;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use std::sync::Arc;

/// Pages that were given back, in the order of the memory's blocks.
#[derive(Debug)]
pub struct RecordedDiscards {
    discarded: Vec<MappedBitmap>,
    freed: Vec<MappedBitmap>,
}

impl RecordedDiscards {
    fn none(memory: &GuestMemory) -> Result<Self, MappingError> {
        let bitmaps = || -> Result<Vec<_>, MappingError> {
            memory
                .blocks()
                .iter()
                .map(|block| MappedBitmap::private(block.geometry.pages()))
                .collect()
        };
        Ok(Self { discarded: bitmaps()?, freed: bitmaps()? })
    }

    /// True if nothing of this block was given back.
    pub fn is_empty(&self, at: usize) -> bool {
        [&self.discarded[at], &self.freed[at]]
            .iter()
            .all(|pages| pages.next_set(pages.all()).is_none())
    }

    /// Pages that were discarded: also those that were discarded before, and that did not stay so.
    pub fn discarded(&self, at: usize) -> &MappedBitmap {
        &self.discarded[at]
    }

    /// Pages that were freed.
    pub fn freed(&self, at: usize) -> &MappedBitmap {
        &self.freed[at]
    }

    /// What was said of the pages `range` until now does not count any more.
    pub fn forget(&self, at: usize, range: PageRange) {
        self.discarded[at].clear(range);
        self.freed[at].clear(range);
    }
}

/// Somebody listens; nobody any more on drop.
#[derive(Debug)]
pub struct DiscardRecorder {
    memory: Arc<GuestMemory>,
    noted: Arc<RecordedDiscards>,
}

impl DiscardRecorder {
    /// From now on what is given back is noted. `now` runs at that moment: marks are set before it
    /// or after it.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn start(memory: &Arc<GuestMemory>, now: impl FnOnce()) -> Result<Self, MappingError> {
        let noted = Arc::new(RecordedDiscards::none(memory)?);
        let marking = memory.marking.hold();
        now();
        memory.set_recorded(Some(noted.clone()));
        drop(marking);
        Ok(Self { memory: memory.clone(), noted })
    }

    /// What was given back.
    pub fn recorded(&self) -> &RecordedDiscards {
        &self.noted
    }
}

impl Drop for DiscardRecorder {
    fn drop(&mut self) {
        self.memory.clear_recorded(&self.noted);
    }
}
