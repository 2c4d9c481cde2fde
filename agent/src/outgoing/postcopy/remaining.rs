// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages that remain to be sent when the guest stops (postcopy).
//!
//! These are the dirty pages that are not discarded, rounded outward to the host pages of the
//! destination. The destination places a host page as a whole, so it punches the whole host page if
//! one page of it is dirty, and all its pages must be sent.
//!
//! A discarded page in such a host page is sent as zero. A page that was written after its discard
//! is sent with its content. Both stay discarded: they are announced with the stray flag.

use super::super::migration::Migration;
use super::super::pass::find_allocated;
use crate::job::{JobError, add};
use crate::memory::Block;
use crate::memory::host_page_set::{HostPageSet, words_of};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use pageferry_protocol::stream::payload::{MAX_BITMAP_PAGES, encode_bitmap};
use pageferry_protocol::stream::record::FLAG_STRAY;
use pageferry_protocol::stream::{Kind, RecordHeader};

/// What the destination has when the guest is moved before the rest of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlreadySent {
    /// Nothing was sent: all allocated pages remain.
    Nothing,
    /// Passes were sent: the dirty pages remain.
    Passes,
}

impl Migration {
    /// Announces all discards, and finds the pages that remain.
    pub(super) fn find_remaining(&mut self, since: AlreadySent) -> Result<HostPageSet, JobError> {
        let memory = self.job.memory.clone();
        match since {
            AlreadySent::Nothing => {
                // As at the first sync of a tracker, nothing is known about writes before.
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
            AlreadySent::Passes => {
                self.sync()?;
                self.send_discards()?;
            }
        }
        let missing = HostPageSet::empty(memory.blocks(), &self.streams.host_pages)?;
        for (at, block) in memory.blocks().iter().enumerate() {
            self.dirty
                .pages
                .block(at)
                .take(block.all(), |word, bits| missing.add_pages(at, word, bits));
        }
        Ok(missing)
    }

    /// Announces the pages that remain. The destination makes holes of them.
    pub(super) fn send_remaining(&mut self, missing: &HostPageSet) -> Result<(), JobError> {
        let job = self.job.clone();
        for (at, block) in job.memory.blocks().iter().enumerate() {
            for first in (0..block.geometry.pages()).step_by(MAX_BITMAP_PAGES as usize) {
                let chunk = PageRange::new(first, MAX_BITMAP_PAGES).intersection(&block.all());
                if missing.block(at).bits().next_set(missing.block(at).covering(chunk)).is_none() {
                    continue;
                }
                // Both sets come from one read of the marks. If a page was discarded between two
                // reads, it would be in both sets and be counted twice.
                let split = |(word, _): (u64, u64)| {
                    let (pages, discarded) =
                        (missing.block(at).page_word(word), block.discarded.word(word));
                    (pages & !discarded, pages & discarded)
                };
                let (populated, discarded): (Vec<u64>, Vec<u64>) =
                    words_of(chunk).map(split).unzip();
                self.send_bitmap(block, chunk, 0, &populated)?;
                self.send_bitmap(block, chunk, FLAG_STRAY, &discarded)?;
            }
        }
        Ok(())
    }

    /// Sends the part of `chunk` from the first to the last word that has a page.
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
