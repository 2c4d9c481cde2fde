// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A pass: one walk of all workers over the dirty pages.
//!
//! The memory is cut into chunks, which the workers claim one by one ([`Chunks`]). Each worker
//! takes the dirty bits of its chunk, reads the pages, finds the zero pages, and sends on its own
//! stream. So no thread scans for the others, and a slow worker or stream claims fewer chunks.
//!
//! The less is dirty, the smaller are the chunks of a pass. Otherwise the pages that a guest keeps
//! writing, which often lie in one piece, would be one or two chunks. In the last pass, while the
//! guest is paused, all other streams would wait for the streams that have them.
//!
//! The destination answers when it has applied the pass. If one worker fails, the others stop at
//! their next chunk, and the pass fails.

use super::clear_ahead::{ClearAhead, UNIT};
use super::fixup::DirtyState;
use super::migration::Migration;
use super::sender::{PageSender, SendContext};
use crate::devices::balloon::hints::FreePages;
use crate::devices::registry::AskedForFreePages;
use crate::job::{JobError, get};
use crate::memory::MemoryError;
use crate::memory::chunks::Chunks;
use crate::memory::host_page_set::words_of;
use crate::memory::{Block, GuestMemory};
use crate::sandbox::{ThreadKind, enter_thread};
use crate::transport::StreamError;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use pageferry_protocol::stream::Kind;
use std::time::Instant;

/// Pages of a chunk in the first pass, and most in every other: 64 MiB.
const LARGEST_CHUNK: u64 = (64 << 20) / PAGE_SIZE;
/// A stretch that is cleared in a tracker ahead of the workers has a chunk for each of them.
const _: () = assert!(LARGEST_CHUNK <= UNIT);
/// Fewest pages of a chunk: 2 MiB. To claim a smaller one would cost more than it shares better.
const SMALLEST_CHUNK: u64 = (2 << 20) / PAGE_SIZE;
/// Dirty pages that lie together are at least so many chunks for each worker. So a worker that
/// still has one when the others have none left keeps them waiting for an eighth of its own time.
const CHUNKS_PER_WORKER: u64 = 8;
/// Number of words of zero pages in a row after which a worker looks for the next data in the file.
const HOLE_WORDS: u64 = 4;

/// The pages of a chunk in a pass after the first, in which `dirty` pages are sent on `streams`.
fn chunk_pages(dirty: u64, streams: usize) -> u64 {
    let share = dirty / (CHUNKS_PER_WORKER * streams.max(1) as u64);
    (share / SMALLEST_CHUNK * SMALLEST_CHUNK).clamp(SMALLEST_CHUNK, LARGEST_CHUNK)
}

/// What all workers of a pass share.
struct Pass<'a> {
    view: SendContext<'a>,
    chunks: Chunks<'a>,
    dirty: &'a DirtyState,
    /// In pass 0: finds what to send.
    first: Option<FirstPass<'a>>,
    /// Clears the tracker whose sync does not clear, if there is one.
    clear: Option<ClearAhead<'a>>,
    number: u64,
}

/// Finds what pass 0 sends.
#[derive(Clone, Copy)]
pub(super) struct FirstPass<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) dirty: &'a DirtyState,
    /// Pages that are free in the guest.
    pub(super) free: Option<&'a FreePages>,
}

impl FirstPass<'_> {
    /// Makes dirty what is to be sent of `range`: the allocated pages that are not free.
    ///
    /// A free page holds nothing that anybody needs. What the guest writes to it after it said so,
    /// the trackers report. So call this before the tracker is cleared, and clear what is dirty
    /// then: a later look could find a page that was written before the clear, and leave it out.
    ///
    /// # Errors
    /// If the file cannot be examined.
    pub(super) fn find(&self, at: usize, range: PageRange) -> Result<(), JobError> {
        let dirty = self.dirty.pages.block(at);
        find_allocated(&self.memory.blocks()[at], dirty, self.dirty.announced.block(at), range)?;
        if let Some(free) = self.free {
            for (word, _) in dirty.nonzero_words(range) {
                dirty.take_bits(word, free.word(at, word));
            }
        }
        Ok(())
    }
}

impl Migration {
    /// Sends the dirty pages, and waits until the destination has applied them.
    pub(super) fn run_pass(&mut self) -> Result<(), JobError> {
        let job = self.job.clone();
        let started = Instant::now();
        let number = self.measurements.passes();
        let (sent_before, bytes_before) = (get(&job.live.pages_sent), get(&job.live.wire_bytes));
        self.send_discards()?;

        let (memory, clear) = (&*job.memory, self.trackers.lazy_clear());
        let streams = self.streams.senders.len();
        let free = self.free_pages.as_ref().map(AskedForFreePages::pages);
        let first = (number == 0).then_some(FirstPass { memory, dirty: &self.dirty, free });
        let pass = Pass {
            view: SendContext {
                job: &job,
                limiter: &job.limiter,
                send_zeros: number > 0,
                sent: self.unannounced_frees.sent(),
            },
            chunks: chunks(&job.memory, &self.dirty, number, streams),
            dirty: &self.dirty,
            first,
            clear: clear.map(|clear| ClearAhead::new(memory, &self.dirty, clear, streams, first)),
            number,
        };
        run_workers(&pass, &mut self.streams.senders)?;
        drop(pass);
        // The guest gets its free pages back.
        self.free_pages = None;

        let done = self.streams.primary.expect(Kind::PassDone, "the end of the pass")?;
        if done != number {
            return Err(StreamError::Pass { stream: 0, found: done, expected: number }.into());
        }
        let pages = get(&job.live.pages_sent) - sent_before;
        let bytes = get(&job.live.wire_bytes) - bytes_before;
        self.measurements.record_pass(pages, bytes, started.elapsed());
        let measurements = self.measurements.clone();
        job.count(|counters| measurements.report(counters));
        job.announce();
        Ok(())
    }
}

/// The chunks of pass `number`.
fn chunks<'a>(
    memory: &'a GuestMemory, dirty: &'a DirtyState, number: u64, streams: usize,
) -> Chunks<'a> {
    if number == 0 {
        // Which pages are sent is known only when a worker has looked at their chunk.
        return Chunks::new(memory, LARGEST_CHUNK);
    }
    let pages = chunk_pages(dirty.remaining(), streams);
    Chunks::new(memory, pages).only(|at, rest| dirty.pages.block(at).next_set(rest))
}

/// Runs one worker for each stream. Returns the first error in the order of the streams.
fn run_workers(pass: &Pass<'_>, senders: &mut [PageSender]) -> Result<(), JobError> {
    // The job's own thread is the primary's worker: with one stream no thread is started.
    let Some((primary, others)) = senders.split_first_mut() else { return Ok(()) };
    std::thread::scope(|scope| {
        let spawn = |sender| {
            scope.spawn(move || {
                enter_thread(ThreadKind::Pages);
                work(pass, sender)
            })
        };
        let threads: Vec<_> = others.iter_mut().map(spawn).collect();
        let first = work(pass, primary);
        let rest =
            threads.into_iter().map(|thread| thread.join().unwrap_or(Err(JobError::Panicked)));
        rest.fold(first, |outcome, other| outcome.and(other))
    })
}

fn work(pass: &Pass<'_>, sender: &mut PageSender) -> Result<(), JobError> {
    let outcome = work_chunks(pass, sender).and_then(|()| sender.end_pass(&pass.view, pass.number));
    if outcome.is_err() {
        pass.chunks.stop();
    }
    outcome
}

fn work_chunks(pass: &Pass<'_>, sender: &mut PageSender) -> Result<(), JobError> {
    let memory = &pass.view.job.memory;
    while let Some((at, chunk)) = pass.chunks.claim() {
        let block: &Block = &memory.blocks()[at];
        let dirty = pass.dirty.pages.block(at);
        match (&pass.clear, &pass.first) {
            // `clear-then-read`: before the first page of the chunk is read.
            (Some(clear), _) if !clear.reach(at, chunk)? => break,
            (Some(_), _) => {}
            (None, Some(first)) => first.find(at, chunk)?,
            (None, None) => {}
        }
        send_chunk(pass, sender, (at, block), dirty, chunk)?;
    }
    Ok(())
}

/// Makes dirty what pass 0 has to send of a chunk: the allocated pages, without those that were
/// announced as discarded before the pass. Announced pages are left out even if the VMM populates
/// them now; see `find_new_discards` in [`super::fixup`].
///
/// Holes need not be sent, because the destination starts from holes. If the guest writes to a hole
/// after this walk has passed it, a tracker reports the page: all trackers were started before.
pub(super) fn find_allocated(
    block: &Block, dirty: &MappedBitmap, announced: &MappedBitmap, chunk: PageRange,
) -> Result<(), JobError> {
    let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
    for run in block.backing.data_runs(chunk) {
        for (word, mask) in words_of(run.map_err(failed)?) {
            dirty.or_word(word, mask & !announced.word(word));
        }
    }
    Ok(())
}

fn send_chunk(
    pass: &Pass<'_>, sender: &mut PageSender, (at, block): (usize, &Block), dirty: &MappedBitmap,
    chunk: PageRange,
) -> Result<(), JobError> {
    let mut hole = HoleFinder::new(block, chunk);
    for (word, _) in dirty.nonzero_words(chunk) {
        pass.view.job.check()?;
        if hole.covers(word)? {
            sender.queue_hole(&pass.view, block, dirty, word);
            continue;
        }
        let data_before = sender.totals.data_pages;
        sender.queue_dirty_word(&pass.view, (at, block), dirty, word)?;
        hole.saw(sender.totals.data_pages > data_before);
    }
    sender.flush(&pass.view)
}

/// Finds large holes among the dirty pages. A VMM that populates much memory makes many untouched
/// pages dirty. One look at the file then replaces reading gigabytes of zeroes.
///
/// A hole that it finds counts as zero for this pass. If the guest writes to it after the look, the
/// next sync reports the page, because the tracker was cleared before.
struct HoleFinder<'a> {
    block: &'a Block,
    chunk: PageRange,
    /// Number of words in a row that were all zero.
    zeros: u64,
    /// There is no data in the words below this one.
    until: u64,
}

impl<'a> HoleFinder<'a> {
    fn new(block: &'a Block, chunk: PageRange) -> Self {
        Self { block, chunk, zeros: 0, until: 0 }
    }

    fn covers(&mut self, word: u64) -> Result<bool, JobError> {
        if word < self.until {
            return Ok(true);
        }
        if self.zeros < HOLE_WORDS || !self.block.backing.tells_holes() {
            return Ok(false);
        }
        let first = word * WORD_BITS;
        let rest = PageRange::new(first, self.chunk.end() - first);
        let failed = |source| MemoryError::Backing { id: self.block.geometry.id, source };
        let data = self.block.backing.first_data(rest).map_err(failed)?;
        self.until = data.map_or(self.chunk.end().div_ceil(WORD_BITS), |page| page / WORD_BITS);
        self.zeros = 0;
        Ok(word < self.until)
    }

    fn saw(&mut self, data: bool) {
        self.zeros = if data { 0 } else { self.zeros + 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;

    #[test]
    fn chunks_shrink_with_what_is_dirty() {
        const MIB: u64 = (1 << 20) / PAGE_SIZE;
        for (dirty, streams, chunk) in [
            (0, 1, 2),
            (128, 8, 2),
            (128, 1, 16),
            (128 * 8 + 100, 8, 16),
            (1024, 2, 64),
            (1024, 32, 4),
            (1 << 20, 2, 64),
            (u64::MAX / MIB, 1, 64),
        ] {
            let pages = chunk_pages(dirty * MIB, streams);
            assert_eq!(pages, chunk * MIB, "{dirty} MiB dirty, {streams} streams");
        }
    }

    #[test]
    fn allocated_pages_are_dirty_unless_announced_as_discarded() {
        let memory = memory(&[512]);
        let block = &memory.blocks()[0];
        let bitmap = || MappedBitmap::private(512).unwrap();
        let (dirty, announced) = (bitmap(), bitmap());
        for page in [3, 130, 131, 132, 400] {
            block.backing.write(page * PAGE_SIZE, &[1]).unwrap();
        }
        announced.set(PageRange::new(132, 10));
        find_allocated(block, &dirty, &announced, PageRange::new(64, 192)).unwrap();
        let found: Vec<_> = dirty.runs(dirty.all()).collect();
        assert_eq!(found, [PageRange::new(130, 2)]);
    }

    #[test]
    fn a_hole_is_skipped_after_some_words_of_zeroes() {
        const WORDS: u64 = 20;
        const DATA: u64 = 14;
        let memory = memory(&[WORDS * WORD_BITS]);
        let block = &memory.blocks()[0];
        block.backing.write((DATA * WORD_BITS + 7) * PAGE_SIZE, &[1]).unwrap();
        let mut finder = HoleFinder::new(block, block.all());
        let mut read = Vec::new();
        for word in 0..WORDS {
            if !finder.covers(word).unwrap() {
                read.push(word);
                finder.saw(word == DATA);
            }
        }
        assert_eq!(read, [0, 1, 2, 3, 14, 15, 16, 17, 18]);
    }
}
