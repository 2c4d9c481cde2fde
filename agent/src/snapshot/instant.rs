//! What there is to save, as of one moment.
//!
//! The guest stands still. Discards go on, and find either that the moment has not come, and what they discard is saved as discarded, or that it was, and save what they discard
//! first: both happen under one lock ([`GuestMemory::marking`](crate::memory::GuestMemory::marking)).

use super::checkpoint::Changes;
use super::protect::{Mode, Watch};
use crate::image::ImageWriter;
use crate::job::{Job, JobError};
use crate::memory::capturing::Capturing;
use crate::memory::owed::Owed;
use crate::memory::{Block, GuestMemory};
use crate::tracking::DirtyPages;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use std::sync::Arc;

/// What there is to save. Until it is dropped discards save what they discard.
pub struct AsOfNow {
    job: Arc<Job>,
    /// Pages that are discarded.
    pub discarded: DirtyPages,
    /// All that is to be captured.
    pub capturing: Arc<Capturing>,
}

impl AsOfNow {
    /// Takes the moment. What the guest writes after it is reported, if there is a `watch`.
    pub fn take(
        job: &Arc<Job>, writer: &Arc<ImageWriter>, watch: Option<&Watch>, changes: &mut Changes,
    ) -> Result<Self, JobError> {
        let memory = &job.memory;
        let discarded = DirtyPages::none(memory)?;
        let host_page = |block: &Arc<Block>| if watch.is_some() { block.backing.host_page_size() } else { PAGE_SIZE };
        let host_pages: Vec<u64> = memory.blocks().iter().map(host_page).collect();
        let pending = Arc::new(Owed::nothing(memory, &host_pages)?);
        let protection = watch.map(Watch::protection);
        let capturing = Arc::new(Capturing::new(memory, pending.clone(), protection, writer.clone(), job.live.clone()));
        job.owes(&pending);
        let later = DirtyPages::none(memory)?;
        // No fault of before is being answered any more: it would lift what is protected here.
        let mut mode = watch.map(Watch::hold);
        writer.is_now();
        memory.marking.instant(|| {
            let changed = changes.cut(later)?;
            for (at, block) in memory.blocks().iter().enumerate() {
                for (word, bits) in block.discarded.nonzero_words(block.all()) {
                    discarded.block(at).or_word(word, bits);
                }
                to_save(memory, at, changed, |word, pages| pending.add_pages(at, word, pages))?;
                if let Some(watch) = watch {
                    watch.protect_rest(at, pending.block(at).bits())?;
                }
            }
            Ok::<_, JobError>(capturing.clone())
        })?;
        if let Some(mode) = &mut mode {
            **mode = Mode::Capturing(capturing.clone());
        }
        drop(mode);
        Ok(Self { job: job.clone(), discarded, capturing })
    }
}

impl AsOfNow {
    /// All was captured, and what others had of it in their hands is put.
    ///
    /// # Errors
    /// If one of them could not.
    pub fn settle(&self) -> Result<(), JobError> {
        self.job.memory.marking.end();
        self.capturing.settled(&self.job.memory.readers)
    }
}

impl Drop for AsOfNow {
    fn drop(&mut self) {
        // If it failed, faults are still answered.
        self.capturing.end();
        self.job.memory.marking.end();
    }
}

/// Hands out the pages of the block at index `at` that are to be saved, word by word: allocated, as far as that is told, not discarded, and changed, if that is asked for.
pub fn to_save(
    memory: &GuestMemory, at: usize, changed: Option<&DirtyPages>, mut found: impl FnMut(u64, u64),
) -> Result<(), JobError> {
    let block = &memory.blocks()[at];
    let failed = |source| JobError::Backing { id: block.geometry.id, source };
    for run in block.backing.data_runs(block.all()) {
        let run = run.map_err(failed)?;
        for word in run.first / WORD_BITS..run.end().div_ceil(WORD_BITS) {
            let first = word * WORD_BITS;
            let pages = run.intersection(&PageRange::new(first, WORD_BITS));
            let wanted = changed.map_or(u64::MAX, |changed| changed.block(at).word(word));
            let bits = word_mask(pages.first - first, pages.end() - first) & wanted & !block.discarded.word(word);
            if bits != 0 {
                found(word, bits);
            }
        }
    }
    Ok(())
}
