//! What there is to save, as of one moment.
//!
//! The guest stands still. Discards go on, and find either that the moment has not come, and what
//! they discard is saved as discarded, or that it was, and save what they discard first: both
//! happen under one lock ([`GuestMemory::marking`](crate::memory::GuestMemory::marking)).

use super::checkpoint::Changes;
use super::prepare::Prepared;
use super::protect::{Mode, WriteWatch};
use crate::image::ImageWriter;
use crate::job::{Job, JobError};
use crate::memory::copy_before_write::CopyBeforeWrite;
use crate::tracking::{DirtyPages, check_discards};
use std::sync::Arc;

/// What there is to save. Until it is dropped discards save what they discard.
pub struct PointInTime {
    job: Arc<Job>,
    /// Pages that are discarded.
    pub discarded: DirtyPages,
    /// All that is to be captured.
    pub copier: Arc<CopyBeforeWrite>,
}

impl PointInTime {
    /// Takes the moment. What the guest writes after it is reported, if there is a `watch`.
    pub fn take(
        job: &Arc<Job>, writer: &Arc<ImageWriter>, watch: Option<&WriteWatch>,
        changes: &mut Changes, mut prepared: Prepared,
    ) -> Result<Self, JobError> {
        let memory = &job.memory;
        let pending = &prepared.pending;
        let protection = watch.map(WriteWatch::protection);
        let copier = Arc::new(CopyBeforeWrite::new(
            memory,
            pending.clone(),
            protection,
            writer.clone(),
            job.live.clone(),
        ));
        job.set_missing(pending);
        // No fault of before is being answered any more: it would lift what is protected here.
        let mut mode = watch.map(WriteWatch::hold_faults);
        watch.map_or(Ok(()), WriteWatch::check)?;
        writer.is_now();
        memory.marking.instant(|| {
            let changed = changes.begin_epoch(std::mem::take(&mut prepared.later))?;
            for (at, block) in memory.blocks().iter().enumerate() {
                for (word, bits) in block.discarded.nonzero_words(block.all()) {
                    prepared.discarded.block(at).or_word(word, bits);
                }
                prepared.pages_to_save(at, changed, |word, pages| {
                    prepared.pending.add_pages(at, word, pages)
                })?;
                if let Some(watch) = watch {
                    watch.protect_rest(at, prepared.pending.block(at).bits())?;
                }
            }
            check_discards(memory)?;
            Ok::<_, JobError>(copier.clone())
        })?;
        if let Some(mode) = &mut mode {
            **mode = Mode::CopyBeforeWrite(copier.clone());
        }
        drop(mode);
        Ok(Self { job: job.clone(), discarded: prepared.discarded, copier })
    }
}

impl PointInTime {
    /// All was captured, and what others had of it in their hands is put.
    ///
    /// # Errors
    /// If one of them could not.
    pub fn finish(&self) -> Result<(), JobError> {
        self.job.memory.marking.end();
        self.copier.finish(&self.job.memory.readers)
    }
}

impl Drop for PointInTime {
    fn drop(&mut self) {
        // If it failed, faults are still answered.
        self.copier.stop_faults();
        self.job.memory.marking.end();
    }
}
