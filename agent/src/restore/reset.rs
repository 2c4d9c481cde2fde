// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Resetting the memory: before a restore, and after a restore that failed.
//!
//! A restore starts with empty memory, whatever the memory held before: all blocks are made holes.
//! So it allocates no page that has no content in the image
//! ([`never-populate`](crate::invariants#never-populate)). The discard marks become those of the
//! image. The pages that the VMM discards after it asked for the restore stay discarded, in any
//! case.
//!
//! If the restore fails before the guest has the memory, [`ResetGuard`] makes all blocks holes
//! again on drop, and brings back the discard marks from before the request.

use super::source::Source;
use crate::job::{Job, JobError, add};
use crate::memory::MemoryError;
use crate::memory::backing::BackingKind;
use crate::memory::discard_recorder::DiscardRecorder;
use crate::memory::recorded_discards::RecordedDiscards;
use crate::memory::{Block, GuestMemory};
use crate::tracking::DirtyPages;
use pageferry_protocol::shm::MappingError;
use std::sync::Arc;

/// Guards memory that a restore fills. On drop the memory is made empty again, unless it was handed
/// over to the guest.
#[derive(Debug)]
pub struct ResetGuard<'a> {
    job: &'a Job,
    source: &'a Source,
    /// What the VMM had discarded before the request, and what it gave back since.
    pub discards: &'a DiscardsSinceRequest,
    /// The guest has the memory, or may have it.
    pub handed_over: bool,
}

impl<'a> ResetGuard<'a> {
    /// Makes all memory holes, and sets the discard marks of the image.
    ///
    /// # Errors
    /// If a file cannot be punched, or the job is cancelled.
    pub fn reset(
        job: &'a Job, source: &'a Source, discards: &'a DiscardsSinceRequest,
    ) -> Result<Self, JobError> {
        let guard = Self { job, source, discards, handed_over: false };
        for (at, block) in job.memory.blocks().iter().enumerate() {
            job.check()?;
            empty(block)?;
            let (discarded, present) =
                (source.discarded(at), source.present(at).count(block.all()));
            guard.mark(at, block);
            let gone = discarded.count(block.all());
            add(&job.live.discarded_pages, gone);
            add(&job.live.zero_pages, block.geometry.pages() - gone - present);
        }
        Ok(guard)
    }
}

impl ResetGuard<'_> {
    /// Makes all memory holes once more. To be called right after the mappings were registered for
    /// missing faults.
    ///
    /// Between [`ResetGuard::reset`] and the registration the VMM may have touched pages. The
    /// kernel then allocated pages of zeroes. Without this they would count as content: the guest
    /// would read zero and never fault.
    ///
    /// # Errors
    /// If a file cannot be punched.
    pub fn punch_again(&self) -> Result<(), JobError> {
        Ok(self.job.memory.blocks().iter().try_for_each(|block| empty(block))?)
    }

    /// Gives back again what the VMM gave back since the request: in a clone, to make the memory
    /// empty has brought back what the base has there.
    ///
    /// # Errors
    /// If the pages cannot be given back.
    pub fn give_back_again(&self) -> Result<(), JobError> {
        let since = self.discards.since();
        for (at, block) in self.job.memory.blocks().iter().enumerate() {
            if block.backing.kind() != BackingKind::Clone {
                continue;
            }
            for given_back in [since.discarded(at), since.freed(at)] {
                for run in given_back.runs(block.all()) {
                    let id = block.geometry.id;
                    block
                        .backing
                        .punch(run)
                        .map_err(|source| MemoryError::Backing { id, source })?;
                }
            }
        }
        Ok(())
    }

    /// Sets the discard marks of a block: the discards of the image, and those that the VMM made
    /// since the request. Stray writes of the old guest do not count any more.
    fn mark(&self, at: usize, block: &Block) {
        let (before, since, discarded) = (
            self.discards.before.block(at),
            self.discards.since().discarded(at),
            self.source.discarded(at),
        );
        // A discard sets all its marks under this lock, so it sets them either before or after the
        // loops below.
        let _marking = self.job.memory.marking.lock();
        for (word, bits) in before.nonzero_words(block.all()) {
            block.discarded.take_bits(word, bits & !(discarded.word(word) | since.word(word)));
        }
        for (word, bits) in discarded.nonzero_words(block.all()) {
            block.discarded.or_word(word, bits);
            if !block.backing.tells_holes() {
                block.unsettled.or_word(word, bits);
            }
        }
        block.stray.clear(block.all());
    }

    /// Brings back the discard marks from before the request, and keeps the discards since.
    fn unmark(&self, at: usize, block: &Block) {
        let (before, since, discarded) = (
            self.discards.before.block(at),
            self.discards.since().discarded(at),
            self.source.discarded(at),
        );
        let _marking = self.job.memory.marking.lock();
        for (word, bits) in discarded.nonzero_words(block.all()) {
            block.discarded.take_bits(word, bits & !(before.word(word) | since.word(word)));
        }
        for (word, bits) in before.nonzero_words(block.all()) {
            block.discarded.or_word(word, bits);
        }
    }
}

fn empty(block: &Block) -> Result<(), MemoryError> {
    block.backing.empty().map_err(|source| MemoryError::Backing { id: block.geometry.id, source })
}

impl Drop for ResetGuard<'_> {
    fn drop(&mut self) {
        if self.handed_over {
            return;
        }
        for (at, block) in self.job.memory.blocks().iter().enumerate() {
            if let Err(error) = empty(block) {
                log::warn!("{}", crate::error::chain(&error));
            }
            self.unmark(at, block);
        }
    }
}

/// What the VMM had discarded when it asked for a restore, and what it gave back since.
///
/// A page that was discarded before and is discarded again belongs to both. The second discard is
/// the only sign that the page must stay discarded. The VMM populates nothing during the restore.
#[derive(Debug)]
pub struct DiscardsSinceRequest {
    before: DirtyPages,
    since: DiscardRecorder,
}

impl DiscardsSinceRequest {
    /// Starts to record. All pages that are discarded now count as discarded before.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn start(memory: &Arc<GuestMemory>) -> Result<Self, MappingError> {
        let before = DirtyPages::none(memory)?;
        let since = DiscardRecorder::start(memory, || {
            for (at, block) in memory.blocks().iter().enumerate() {
                for (word, bits) in block.discarded.nonzero_words(block.all()) {
                    before.block(at).or_word(word, bits);
                }
            }
        })?;
        Ok(Self { before, since })
    }

    /// What the VMM gave back since the start of the recording.
    pub fn since(&self) -> &RecordedDiscards {
        self.since.recorded()
    }
}

/// From which moment on the VMM's discards are about the memory that is being restored.
#[derive(Debug)]
pub enum RecordDiscards {
    /// From the request on: the VMM asked for the restore itself.
    SinceRequest(DiscardsSinceRequest),
    /// From the moment on at which the VMM gave up its guest. Discards before that are about the
    /// old guest.
    FromPause,
}
