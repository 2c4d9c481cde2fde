//! The memory before anything is in it, and again if it comes to nothing.
//!
//! A restore starts from holes, whatever the memory held, and allocates no page that the image has
//! no content of (`never-populate`). What is discarded in the image is discarded here. What the VMM
//! discards from then on is its own word, and stays.

use super::source::Source;
use crate::job::{Job, JobError, add};
use crate::memory::recorded_discards::{DiscardRecorder, RecordedDiscards};
use crate::memory::{Block, GuestMemory};
use crate::tracking::DirtyPages;
use pageferry_protocol::shm::MappingError;
use std::sync::Arc;

/// Memory that is being filled. Unless the guest got it, it is empty again on drop.
#[derive(Debug)]
pub struct ResetGuard<'a> {
    job: &'a Job,
    source: &'a Source,
    /// What the VMM had discarded, and what it gave back since.
    pub discards: &'a DiscardsSinceRequest,
    /// The guest has it, or may have.
    pub handed_over: bool,
}

impl<'a> ResetGuard<'a> {
    /// Makes all memory holes, and discarded what is so in the image.
    ///
    /// # Errors
    /// If a file cannot be emptied, or the job is cancelled.
    pub fn reset(
        job: &'a Job, source: &'a Source, word: &'a DiscardsSinceRequest,
    ) -> Result<Self, JobError> {
        let ground = Self { job, source, discards: word, handed_over: false };
        for (at, block) in job.memory.blocks().iter().enumerate() {
            job.check()?;
            empty(block)?;
            let (discarded, present) =
                (source.discarded(at), source.present(at).count(block.all()));
            ground.mark(at, block);
            let gone = discarded.count(block.all());
            add(&job.live.discarded_pages, gone);
            add(&job.live.zero_pages, block.geometry.pages() - gone - present);
        }
        Ok(ground)
    }
}

impl ResetGuard<'_> {
    /// Makes all memory holes once more, when missing pages are waited for from now on: what the
    /// VMM looked at between [`ResetGuard::reset`] and then is a page of zeroes by now, and would
    /// be taken for what was to come.
    ///
    /// # Errors
    /// If a file cannot be emptied.
    pub fn punch_again(&self) -> Result<(), JobError> {
        self.job.memory.blocks().iter().try_for_each(|block| empty(block))
    }

    /// What is discarded in the image is discarded, and what the VMM discarded since it asked for
    /// this. Nothing of the guest before is known to be stray.
    fn mark(&self, at: usize, block: &Block) {
        let (before, since, discarded) = (
            self.discards.before.block(at),
            self.discards.since().discarded(at),
            self.source.discarded(at),
        );
        // A discard that comes meanwhile has marked all of its pages before this, or marks them
        // after it.
        let _marking = self.job.memory.marking.hold();
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

    /// As it was before, and what the VMM discarded since.
    fn unmark(&self, at: usize, block: &Block) {
        let (before, since, discarded) = (
            self.discards.before.block(at),
            self.discards.since().discarded(at),
            self.source.discarded(at),
        );
        let _marking = self.job.memory.marking.hold();
        for (word, bits) in discarded.nonzero_words(block.all()) {
            block.discarded.take_bits(word, bits & !(before.word(word) | since.word(word)));
        }
        for (word, bits) in before.nonzero_words(block.all()) {
            block.discarded.or_word(word, bits);
        }
    }
}

fn empty(block: &Block) -> Result<(), JobError> {
    block.backing.empty().map_err(|source| JobError::Backing { id: block.geometry.id, source })
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

/// What the VMM had discarded when it asked for a restore, and what it gives back from then on:
/// also a page that it had discarded before. That it discards such a page again is the only sign
/// that the page is to stay discarded. It populates nothing meanwhile.
#[derive(Debug)]
pub struct DiscardsSinceRequest {
    before: DirtyPages,
    since: DiscardRecorder,
}

impl DiscardsSinceRequest {
    /// What is discarded now was discarded before.
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

    /// What the VMM gave back since then.
    pub fn since(&self) -> &RecordedDiscards {
        self.since.recorded()
    }
}

/// From when on what the VMM discards is its own word on the memory that it gets.
#[derive(Debug)]
pub enum RecordDiscards {
    /// It has asked for the restore.
    SinceRequest(DiscardsSinceRequest),
    /// From the moment on that the VMM has given its guest up: until then it is of that guest.
    FromPause,
}
