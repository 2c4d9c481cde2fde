//! What remains to be sent when the guest stops.
//!
//! That is what is dirty and not discarded, rounded outward to the destination's host pages: those
//! are placed whole, so the destination frees all of one of which a page is dirty. A discarded page
//! in such a host page comes along as zero, and one that was written after its discard with its
//! content; both stay discarded, and are told apart from the others by their flag.

use super::super::Migration;
use super::super::pass::find_allocated;
use super::Since;
use crate::job::{JobError, add};
use crate::memory::Block;
use crate::memory::host_page_set::HostPageSet;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use pageferry_protocol::stream::payload::{MAX_BITMAP_PAGES, encode_bitmap};
use pageferry_protocol::stream::record::FLAG_STRAY;
use pageferry_protocol::stream::{Kind, RecordHeader};

impl Migration {
    /// Finds what remains, after telling the destination of all discards.
    pub(super) fn find_remaining(&mut self, since: Since) -> Result<HostPageSet, JobError> {
        let memory = self.job.memory.clone();
        match since {
            Since::TheStart => {
                // Nothing is known of what was written before, as at the first sync of a tracker.
                for block in memory.blocks() {
                    block.stray.clear(block.all());
                }
                self.send_discards()?;
                for (at, block) in memory.blocks().iter().enumerate() {
                    find_allocated(
                        block,
                        self.dirty.pages.block(at),
                        self.dirty.announced.block(at),
                        block.all(),
                    )?;
                }
            }
            Since::Passes => {
                self.sync()?;
                self.send_discards()?;
            }
        }
        let missing = HostPageSet::empty(&memory, &self.streams.host_pages)?;
        for (at, block) in memory.blocks().iter().enumerate() {
            self.dirty
                .pages
                .block(at)
                .take(block.all(), |word, bits| missing.add_pages(at, word, bits));
        }
        Ok(missing)
    }

    /// Tells the destination, which makes holes of it.
    pub(super) fn send_remaining(&mut self, missing: &HostPageSet) -> Result<(), JobError> {
        let job = self.job.clone();
        for (at, block) in job.memory.blocks().iter().enumerate() {
            for first in (0..block.geometry.pages()).step_by(MAX_BITMAP_PAGES as usize) {
                let chunk = PageRange::new(first, MAX_BITMAP_PAGES).intersection(&block.all());
                if missing.block(at).bits().next_set(missing.block(at).covering(chunk)).is_none() {
                    continue;
                }
                let words = chunk.first / WORD_BITS..chunk.end().div_ceil(WORD_BITS);
                // Both of one look: a page that is discarded in between would be in both, and
                // counted twice.
                let split = |word: u64| {
                    let (pages, discarded) =
                        (missing.block(at).page_word(word), block.discarded.word(word));
                    (pages & !discarded, pages & discarded)
                };
                let (populated, discarded): (Vec<u64>, Vec<u64>) = words.map(split).unzip();
                self.send_bitmap(block, chunk, 0, &populated)?;
                self.send_bitmap(block, chunk, FLAG_STRAY, &discarded)?;
            }
        }
        Ok(())
    }

    /// Sends the part of `chunk` between the first and the last word that has a page.
    fn send_bitmap(
        &mut self, block: &Block, chunk: PageRange, flags: u16, bits: &[u64],
    ) -> Result<(), JobError> {
        let Some(start) = bits.iter().position(|word| *word != 0) else { return Ok(()) };
        let end = bits.iter().rposition(|word| *word != 0).map_or(start, |last| last + 1);
        let pages = PageRange::new(
            chunk.first + start as u64 * WORD_BITS,
            (end - start) as u64 * WORD_BITS,
        );
        let payload = encode_bitmap(bits[start..end].iter().copied());
        let header = RecordHeader::new(
            Kind::Remaining,
            flags,
            block.geometry.id,
            pages.intersection(&chunk),
            payload.len(),
        );
        let bytes = self.streams.primary.writer.write(header, &payload)?;
        add(&self.job.live.wire_bytes, bytes);
        Ok(())
    }
}
