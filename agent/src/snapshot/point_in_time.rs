// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The instant of a snapshot: decides which pages are saved, and takes their state.
//!
//! The guest is paused. Discards continue, and the instant is taken under the same lock as their
//! marks ([`GuestMemory::marking`](crate::memory::GuestMemory::marking)). So a discard either comes
//! before the instant, and the snapshot saves its pages as discarded, or it comes after the
//! instant, finds the snapshot, and has the pages captured first.

use super::changes::Changes;
use super::prepare::Prepared;
use super::protect::WriteWatch;
use super::watch_state::WriteFaultAction;
use crate::image::ImageWriter;
use crate::job::{Job, JobError};
use crate::memory::copy_before_write::CopyBeforeWrite;
use crate::tracking::{DirtyPages, check_discards};
use std::sync::Arc;

/// What is saved as of the instant. Until it is dropped, discards have their pages captured first.
pub struct PointInTime {
    job: Arc<Job>,
    /// Pages that were discarded at the instant.
    pub discarded: DirtyPages,
    /// The pages to capture.
    pub copier: Arc<CopyBeforeWrite>,
}

impl PointInTime {
    /// Takes the instant. With a `watch`, the guest's later writes are reported. Pages that are
    /// captured for them take at most `capture_memory` bytes.
    pub fn take(
        job: &Arc<Job>, writer: &Arc<ImageWriter>, watch: Option<&WriteWatch>,
        changes: &mut Changes, mut prepared: Prepared, capture_memory: usize,
    ) -> Result<Self, JobError> {
        let memory = &job.memory;
        let pending = &prepared.pending;
        let protection = watch.map(WriteWatch::protection);
        let copier = Arc::new(CopyBeforeWrite::new(
            memory.blocks(),
            pending.clone(),
            protection,
            writer.clone(),
            capture_memory,
            job.live.clone(),
        ));
        job.set_remaining(pending);
        // From here on no fault that was read before is being handled: it would remove protection
        // that is set below.
        let mut mode = watch.map(WriteWatch::hold_faults);
        watch.map_or(Ok(()), WriteWatch::check)?;
        writer.set_instant_to_now();
        memory.marking.take_instant(|| {
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
            **mode = WriteFaultAction::CopyBeforeWrite(copier.clone());
        }
        drop(mode);
        Ok(Self { job: job.clone(), discarded: prepared.discarded, copier })
    }
}

impl PointInTime {
    /// Waits after the sweep until all captured pages are in the image, also those that discards
    /// and faults have captured.
    ///
    /// # Errors
    /// If one of them failed.
    pub fn finish(&self) -> Result<(), JobError> {
        self.job.memory.marking.end_snapshot();
        Ok(self.copier.finish(&self.job.memory.readers)?)
    }
}

impl Drop for PointInTime {
    fn drop(&mut self) {
        // Faults are handled even after a failure, but they must take no page any more.
        self.copier.stop_faults();
        self.job.memory.marking.end_snapshot();
    }
}
