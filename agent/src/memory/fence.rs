//! Keeps a discard away from what a worker is reading, without a lock in the worker's loop
//! (`never-read` and `clear-then-read`).
//!
//! A worker publishes the word of pages that it is about to read, and only then looks whether they
//! are discarded; a discard marks the pages, and only then looks who is reading. Both put a
//! sequentially consistent fence between their store and their load, so at least one of them sees
//! the other: either the worker sees the mark and does not read, or the discard sees the worker and
//! waits until it has moved on. It need not wait for what the worker publishes afterwards: that was
//! checked after the mark.
//!
//! A worker that dies drops its [`Reading`], so nobody waits for it.

use super::sync::{AtomicU64, Ordering, fence, yield_now};

/// Most workers of a job at once, as many as streams. Behind them in the fence are the two below.
const WORKERS: usize = 64;
/// The number of the thread that serves the faults of a snapshot.
pub const FAULTS: usize = WORKERS;
/// The number of the session's thread, which saves what is discarded during a snapshot.
pub const SESSION: usize = WORKERS + 1;
/// Most readers at once.
pub const MAX_READERS: usize = WORKERS + 2;
/// Low bits of a published value that hold the word's index, plus one.
const WORD_BITS: u32 = 40;

/// One slot per worker, each on a cache line of its own.
#[derive(Debug)]
pub struct Readers {
    slots: Vec<Slot>,
}

#[derive(Debug)]
#[repr(align(64))]
struct Slot(AtomicU64);

/// A word of pages that is being read; ends on drop.
#[derive(Debug)]
pub struct Reading<'a> {
    slot: &'a AtomicU64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // Release: the reads are over before anyone sees the slot free.
        self.slot.store(0, Ordering::Release);
    }
}

impl Readers {
    /// Slots for `count` workers.
    pub fn new(count: usize) -> Self {
        Self { slots: (0..count).map(|_| Slot(AtomicU64::new(0))).collect() }
    }

    /// Publishes that `worker` is about to read pages of word `word` of the block at index `block`.
    /// Look whether they are discarded after this, not before. A worker reads one word at a time.
    ///
    /// Worker numbers wrap at the number of slots; the caller gives each worker its own.
    pub fn reading(&self, worker: usize, block: usize, word: u64) -> Reading<'_> {
        let slot = &self.slots[worker % self.slots.len()].0;
        // Release: who sees this sees that all the worker read before is over. It may never see the
        // slot free in between.
        slot.store(((block as u64) << WORD_BITS) | (word + 1), Ordering::Release);
        fence(Ordering::SeqCst);
        Reading { slot }
    }

    /// Returns when nobody reads pages any more for which `overlaps(block index, word)` holds and
    /// which were published before. Call it after the marks are set.
    pub fn wait(&self, overlaps: impl Fn(usize, u64) -> bool) {
        fence(Ordering::SeqCst);
        for Slot(slot) in &self.slots {
            let seen = slot.load(Ordering::Acquire);
            if seen == 0
                || !overlaps((seen >> WORD_BITS) as usize, (seen & ((1 << WORD_BITS) - 1)) - 1)
            {
                continue;
            }
            while slot.load(Ordering::Acquire) == seen {
                yield_now();
            }
        }
    }
}
