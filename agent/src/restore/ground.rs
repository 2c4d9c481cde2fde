//! The memory before anything is in it, and again if it comes to nothing.
//!
//! A restore starts from holes, whatever the memory held, and allocates no page that the image has no content of (law 2). What is discarded in the image is discarded here. What
//! the VMM discards from then on is its own word, and stays.

use super::source::Source;
use crate::job::{Job, JobError, add};
use crate::memory::Block;
use pageferry_protocol::shm::MappedBitmap;

/// Memory that is being filled. Unless the guest got it, it is empty again on drop.
#[derive(Debug)]
pub struct Ground<'a> {
    job: &'a Job,
    source: &'a Source,
    /// The guest has it, or may have.
    pub taken: bool,
}

impl<'a> Ground<'a> {
    /// Makes all memory holes, and discarded what is so in the image.
    ///
    /// # Errors
    /// If a file cannot be emptied, or the job is cancelled.
    pub fn clear(job: &'a Job, source: &'a Source) -> Result<Self, JobError> {
        let ground = Self { job, source, taken: false };
        for (at, block) in job.memory.blocks().iter().enumerate() {
            job.cancel.check()?;
            block.backing.empty().map_err(|source| JobError::Backing { id: block.geometry.id, source })?;
            let (discarded, present) = (source.discarded(at), source.present(at).count(block.all()));
            // A discard that comes meanwhile has marked all of its pages before this, or marks them after it.
            let marking = job.memory.marking.hold();
            mark(block, discarded);
            drop(marking);
            let gone = discarded.count(block.all());
            add(&job.live.discarded_pages, gone);
            add(&job.live.zero_pages, block.geometry.pages() - gone - present);
        }
        Ok(ground)
    }
}

impl Drop for Ground<'_> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        for (at, block) in self.job.memory.blocks().iter().enumerate() {
            if let Err(error) = block.backing.empty() {
                log::warn!("block {}: {}", block.geometry.id, crate::error::chain(&error));
            }
            let discarded = self.source.discarded(at);
            for (word, bits) in discarded.nonzero_words(block.all()) {
                block.discarded.take_bits(word, bits);
            }
        }
    }
}

/// Makes `discarded` those that are discarded of a block.
fn mark(block: &Block, discarded: &MappedBitmap) {
    for (word, bits) in block.discarded.nonzero_words(block.all()) {
        block.discarded.take_bits(word, bits & !discarded.word(word));
    }
    for (word, bits) in discarded.nonzero_words(block.all()) {
        block.discarded.or_word(word, bits);
    }
}
