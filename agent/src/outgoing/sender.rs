// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sender of one stream: reads pages into a buffer, finds the zero pages, and sends records in
//! batches.
//!
//! A batch holds the pages of at least one word of the bitmap (256 KiB). That is large enough to
//! make the cost of system calls small, and small enough to stay in the cache while the pages are
//! read, scanned, checksummed and sent.

use super::compress::Compressor;
use crate::job::{Job, JobError};
use crate::memory::Block;
use crate::memory::MemoryError;
use crate::memory::fence::Reading;
use crate::memory::zero::data_mask;
use crate::stats::worker::WorkerCounters;
use crate::tracking::DirtyPages;
use crate::transport::{Limiter, RecordWriter, StreamSocket};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::stream::payload::Totals;
use pageferry_protocol::stream::record::{FLAG_STRAY, FLAG_WHOLE};
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use rustix::io::IoSlice;

/// Bytes of one word of pages.
const WORD_BYTES: usize = (WORD_BITS * PAGE_SIZE) as usize;
/// Words of 2 MiB.
const WHOLE_WORDS: u64 = (2 << 20) / WORD_BYTES as u64;
/// A batch is sent when it holds this many bytes.
const BATCH: usize = WORD_BYTES;

/// A queued record: its header, and the part of the buffer that is its payload.
type Queued = ([u8; RECORD_SIZE], std::ops::Range<usize>);

/// The sender of one stream, used by one worker.
#[derive(Debug)]
pub struct PageSender {
    index: usize,
    writer: RecordWriter,
    buffer: Vec<u8>,
    filled: usize,
    queue: Vec<Queued>,
    compressor: Option<Compressor>,
    /// A run of zero pages that may still grow: id of the block, flags, and pages.
    zeros: Option<(u32, u16, PageRange)>,
    /// Data records say where all pages of 2 MiB follow.
    marks_whole: bool,
    /// The word that is queued begins such 2 MiB.
    is_whole: bool,
    /// The totals of this stream.
    pub totals: Totals,
    /// What was counted since the last send.
    counters: WorkerCounters,
    broken: bool,
}

/// What a worker must know about the pass.
#[derive(Debug, Clone, Copy)]
pub struct SendContext<'a> {
    /// The job.
    pub job: &'a Job,
    /// The bandwidth limit that all streams share.
    pub limiter: &'a Limiter,
    /// Zero pages are sent. False in pass 0, because the destination starts from holes.
    pub send_zeros: bool,
    /// Gets the pages that are sent with content. See [`super::unannounced_frees`].
    pub sent: Option<&'a DirtyPages>,
}

/// The dirty pages of a word whose bits were taken.
struct TakenWord {
    /// The pages to send.
    send: u64,
    /// Those of them that are discarded, and were written after the discard.
    stray: u64,
}

impl TakenWord {
    /// Takes the dirty bits of a word, and leaves out discarded pages (`never-read` and
    /// `clear-then-read`).
    fn take(counters: &mut WorkerCounters, block: &Block, dirty: &MappedBitmap, word: u64) -> Self {
        let taken = dirty.take_word(word);
        counters.pass_pages_done += u64::from(taken.count_ones());
        let discarded = block.discarded.word(word) & taken;
        let stray = if discarded == 0 { 0 } else { block.stray.word(word) & discarded };
        Self { send: taken & (!discarded | stray), stray }
    }
}

impl PageSender {
    /// The sender of stream `index`. It compresses if it gets a compressor.
    pub fn new(index: usize, socket: StreamSocket, compressor: Option<Compressor>) -> Self {
        Self {
            index,
            writer: RecordWriter::new(socket),
            buffer: Vec::new(),
            filled: 0,
            queue: Vec::new(),
            compressor,
            zeros: None,
            marks_whole: false,
            is_whole: false,
            totals: Totals::default(),
            counters: WorkerCounters::default(),
            broken: false,
        }
    }

    /// The same sender, whose records say where all pages of 2 MiB follow if `marks_whole`.
    #[must_use]
    pub fn marking_whole(self, marks_whole: bool) -> Self {
        Self { marks_whole, ..self }
    }

    /// True for the primary.
    pub fn is_primary(&self) -> bool {
        self.index == 0
    }

    /// The socket of the stream.
    pub fn socket(&self) -> &StreamSocket {
        self.writer.socket()
    }

    /// True if a record may have been sent in part.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Takes the dirty pages of word `word` of the block, reads them, and queues their records.
    ///
    /// # Errors
    /// If the file cannot be read or the stream is broken.
    pub fn queue_dirty_word(
        &mut self, pass: &SendContext<'_>, (at, block): (usize, &Block), dirty: &MappedBitmap,
        word: u64,
    ) -> Result<(), JobError> {
        // The destination is empty before pass 0, and only then can large pages come into it.
        self.is_whole = self.marks_whole
            && !pass.send_zeros
            && word.is_multiple_of(WHOLE_WORDS)
            && (word..word + WHOLE_WORDS).all(|word| has_word(dirty, word));
        // `never-read`: publish the word first, and look at the discard marks and the known holes
        // after that; see the fence. `clear-then-read`: take the dirty bits before the read.
        let reading = pass.job.memory.readers.reading(self.index, at, word);
        let TakenWord { send, stray } = TakenWord::take(&mut self.counters, block, dirty, word);
        self.send_word(pass, (at, block), word, send, stray, reading)
    }

    /// Postcopy: queues the pages `pages` of word `word`, which the caller has taken from the
    /// missing pages. The destination waits for each of them. So pages that were discarded in the
    /// meantime are queued as zero, and not read.
    ///
    /// # Errors
    /// If the file cannot be read or the stream is broken.
    pub fn queue_missing_pages(
        &mut self, pass: &SendContext<'_>, (at, block): (usize, &Block), word: u64, pages: u64,
    ) -> Result<(), JobError> {
        let reading = pass.job.memory.readers.reading(self.index, at, word);
        let discarded = block.discarded.word(word) & pages;
        let stray = if discarded == 0 { 0 } else { block.stray.word(word) & discarded };
        let stale = discarded & !stray;
        self.send_word(pass, (at, block), word, pages & !stale, stray, reading)?;
        self.queue_zero_pages(pass, block.geometry.id, word * WORD_BITS, stale, stale);
        Ok(())
    }

    /// Queues the pages `send` of a word, which the caller has taken. Pages that were freed and are
    /// still holes are queued as zero, and not read.
    fn send_word(
        &mut self, pass: &SendContext<'_>, (at, block): (usize, &Block), word: u64, send: u64,
        stray: u64, reading: Reading<'_>,
    ) -> Result<(), JobError> {
        let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
        let holes = block.known_holes(word, send).map_err(failed)?;
        let data = self.read_word(pass, block, word, send & !holes, stray, reading)?;
        if let Some(sent) = pass.sent {
            sent.block(at).or_word(word, data);
        }
        // In pass 0 the destination has holes already.
        if holes != 0 && pass.send_zeros {
            self.queue_zero_pages(pass, block.geometry.id, word * WORD_BITS, holes, stray);
            self.counters.freed_pages += u64::from(holes.count_ones());
        }
        Ok(())
    }

    /// Sends those of the dirty pages of a block as zero that were freed and are still holes.
    ///
    /// # Errors
    /// If the file cannot be examined, or the stream is broken.
    pub fn send_known_holes(
        &mut self, pass: &SendContext<'_>, block: &Block, dirty: &MappedBitmap,
    ) -> Result<(), JobError> {
        for (word, pages) in dirty.nonzero_words(block.all()) {
            let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
            let holes =
                block.known_holes(word, pages & !block.discarded.word(word)).map_err(failed)?;
            self.queue_zero_pages(pass, block.geometry.id, word * WORD_BITS, holes, 0);
            self.counters.freed_pages += u64::from(holes.count_ones());
        }
        self.flush(pass)
    }

    /// Reads the pages `send` of a word and queues their records. `reading` is dropped as soon as
    /// the pages are read. Returns those that are not zero.
    fn read_word(
        &mut self, pass: &SendContext<'_>, block: &Block, word: u64, send: u64, stray: u64,
        reading: Reading<'_>,
    ) -> Result<u64, JobError> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; BATCH + WORD_BYTES];
        }
        let first = word * WORD_BITS;
        let start = self.filled;
        for run in runs_of_word(first, send) {
            let bytes = run.bytes() as usize;
            let target = &mut self.buffer[self.filled..self.filled + bytes];
            let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
            block.backing.read(run.offset(), target).map_err(failed)?;
            self.filled += bytes;
        }
        drop(reading);
        let data = self.queue_word(pass, block.geometry.id, first, send, stray, start);
        if self.filled >= BATCH {
            self.flush(pass)?;
        }
        Ok(data)
    }

    /// Takes the dirty pages of word `word` of the block, which lie in a hole. They are queued as
    /// zero, and not read.
    pub fn queue_hole(
        &mut self, pass: &SendContext<'_>, block: &Block, dirty: &MappedBitmap, word: u64,
    ) {
        let TakenWord { send, stray } = TakenWord::take(&mut self.counters, block, dirty, word);
        self.queue_zero_pages(pass, block.geometry.id, word * WORD_BITS, send, stray);
    }

    /// Queues records for the pages `send` of a word. Their bytes lie in the buffer from `start`
    /// on, one page after another. Returns the pages that are not zero.
    fn queue_word(
        &mut self, pass: &SendContext<'_>, block: u32, first: u64, send: u64, stray: u64,
        start: usize,
    ) -> u64 {
        // Bit n of `dense` stands for the n-th page that was read. Spread the bits to the places of
        // these pages in the word.
        let dense = data_mask(&self.buffer[start..self.filled]);
        let data = if send == u64::MAX { dense } else { spread(dense, send) };
        let page_offset = |run: &PageRange| {
            // In the buffer, all pages of `send` below the run come before it.
            let below = send & ((1u64 << (run.first - first)) - 1);
            let at = start + below.count_ones() as usize * PAGE_SIZE as usize;
            at..at + run.bytes() as usize
        };
        // A piece that begins with zero pages has more of them as often as not.
        let whole = if self.is_whole && data == u64::MAX { FLAG_WHOLE } else { 0 };
        self.is_whole = false;
        let flagged = [(data & !stray, whole), (data & stray, FLAG_STRAY)];
        let socket = self.writer.socket();
        let most = pass.limiter.max_pages_per_send();
        match &mut self.compressor {
            None => {
                for (mask, flags) in flagged {
                    for run in runs_of_word(first, mask).flat_map(|run| split_run(run, most)) {
                        let bytes = page_offset(&run);
                        let header = RecordHeader::new(Kind::Data, flags, block, run, bytes.len());
                        self.queue.push((
                            header
                                .with_checksum(socket.checked(&self.buffer[bytes.clone()]))
                                .to_wire(),
                            bytes,
                        ));
                    }
                }
            }
            Some(compressor) => {
                compressor.begin(self.filled - start);
                for (mask, flags) in flagged {
                    for run in runs_of_word(first, mask).flat_map(|run| split_run(run, most)) {
                        let (bytes, flag) = compressor.add(&self.buffer[page_offset(&run)]);
                        let header =
                            RecordHeader::new(Kind::Data, flags | flag, block, run, bytes.len());
                        let header = header
                            .with_checksum(socket.checked(&compressor.output()[bytes.clone()]));
                        self.queue.push((header.to_wire(), start + bytes.start..start + bytes.end));
                    }
                }
                // Copy the compressed runs over the pages: more words then fit into the buffer
                // before it is sent.
                let packed = compressor.output();
                self.buffer[start..start + packed.len()].copy_from_slice(packed);
                self.filled = start + packed.len();
            }
        }
        self.totals.data_pages += u64::from(data.count_ones());
        self.totals.stray_pages += u64::from((data & stray).count_ones());
        self.counters.pages_sent += u64::from(data.count_ones());
        self.counters.stray_pages += u64::from((data & stray).count_ones());
        self.queue_zero_pages(pass, block, first, send & !data, stray);
        if data == 0 {
            // No page of this word has content, so the next word may use its part of the buffer.
            self.filled = start;
        }
        data
    }

    /// Queues the zero pages `zero` of a word. Those that are also in `stray` are flagged, and
    /// counted as stray.
    fn queue_zero_pages(
        &mut self, pass: &SendContext<'_>, block: u32, first: u64, zero: u64, stray: u64,
    ) {
        self.counters.zero_pages += u64::from(zero.count_ones());
        self.counters.stray_pages += u64::from((zero & stray).count_ones());
        if !pass.send_zeros {
            return;
        }
        self.totals.stray_pages += u64::from((zero & stray).count_ones());
        for (mask, flags) in [(zero & !stray, 0), (zero & stray, FLAG_STRAY)] {
            for run in runs_of_word(first, mask) {
                self.queue_zeros(block, flags, run);
            }
        }
    }

    /// Queues a run of zero pages. It is joined with the run before if the two touch.
    fn queue_zeros(&mut self, block: u32, flags: u16, run: PageRange) {
        match &mut self.zeros {
            Some((last_block, last_flags, last))
                if (*last_block, *last_flags, last.end()) == (block, flags, run.first) =>
            {
                last.count += run.count;
            }
            _ => {
                self.end_zeros();
                self.zeros = Some((block, flags, run));
            }
        }
    }

    /// Ends a run of zero pages that could still grow, so that the next pages form another record.
    pub fn end_zeros(&mut self) {
        if let Some((block, flags, run)) = self.zeros.take() {
            self.totals.zero_pages += run.count;
            self.queue.push((
                RecordHeader::new(Kind::Zero, flags, block, run, 0).with_checksum(&[]).to_wire(),
                0..0,
            ));
        }
    }

    /// Sends all queued records.
    ///
    /// # Errors
    /// If the stream is broken or the job cancelled.
    pub fn flush(&mut self, pass: &SendContext<'_>) -> Result<(), JobError> {
        self.end_zeros();
        self.filled = 0;
        if self.queue.is_empty() {
            // Zero pages of pass 0, for which nothing is sent.
            self.counters.publish(&pass.job.live);
            return Ok(());
        }
        let mut from = 0;
        while from < self.queue.len() {
            from = self.send_queued(pass, from)?;
        }
        self.queue.clear();
        Ok(())
    }

    /// Sends as many queued records as the limit allows at once, from the record at `from` on.
    /// Returns the index of the next record.
    fn send_queued(&mut self, pass: &SendContext<'_>, from: usize) -> Result<usize, JobError> {
        let most = pass.limiter.max_pages_per_send().saturating_mul(PAGE_SIZE + RECORD_SIZE as u64);
        let (mut bytes, mut to) = (0, from);
        for (header, payload) in &self.queue[from..] {
            let record = header.len() + payload.len();
            if to > from && (bytes + record) as u64 > most {
                break;
            }
            (bytes, to) = (bytes + record, to + 1);
        }
        pass.limiter.wait_to_send(bytes, &pass.job.cancel, self.writer.socket())?;
        let mut parts = Vec::with_capacity((to - from) * 2);
        for (header, payload) in &self.queue[from..to] {
            parts.push(IoSlice::new(header));
            if !payload.is_empty() {
                parts.push(IoSlice::new(&self.buffer[payload.clone()]));
            }
        }
        // Until the write returns, a record may be sent in part.
        self.broken = true;
        self.writer.socket().write_all(&mut parts)?;
        self.broken = false;
        self.counters.wire_bytes += bytes as u64;
        self.counters.publish(&pass.job.live);
        Ok(to)
    }

    /// Ends a pass on this stream.
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn end_pass(&mut self, pass: &SendContext<'_>, number: u64) -> Result<(), JobError> {
        self.flush(pass)?;
        self.totals.passes += 1;
        self.write(pass.job, RecordHeader::plain(Kind::PassEnd, number, 0), &[])
    }

    /// Writes a record that is not pages. All queued records must have been sent before.
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn write(
        &mut self, job: &Job, header: RecordHeader, payload: &[u8],
    ) -> Result<(), JobError> {
        self.broken = true;
        let bytes = self.writer.write(header, payload)?;
        self.broken = false;
        self.counters.wire_bytes += bytes;
        self.counters.publish(&job.live);
        Ok(())
    }
}

fn has_word(dirty: &MappedBitmap, word: u64) -> bool {
    (word + 1) * WORD_BITS <= dirty.pages() && dirty.word(word) == u64::MAX
}

/// Splits a run into pieces of at most `most` pages.
fn split_run(run: PageRange, most: u64) -> impl Iterator<Item = PageRange> {
    let step = most.clamp(1, WORD_BITS);
    (run.first..run.end())
        .step_by(step as usize)
        .map(move |first| PageRange::new(first, step.min(run.end() - first)))
}

/// Moves the lowest bits of `dense` to the places of the bits that are set in `places`: the first
/// bit to the lowest place, and so on.
fn spread(mut dense: u64, places: u64) -> u64 {
    let mut spread = 0;
    let mut rest = places;
    while rest != 0 && dense != 0 {
        let lowest = rest & rest.wrapping_neg();
        if dense & 1 != 0 {
            spread |= lowest;
        }
        dense >>= 1;
        rest ^= lowest;
    }
    spread
}

#[cfg(test)]
mod tests;
