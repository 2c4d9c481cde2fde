// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The fence: keeps a discard away from pages that a worker is reading, without a lock in the
//! worker's loop ([`never-read`](crate::invariants#never-read) and
//! [`clear-then-read`](crate::invariants#clear-then-read)).
//!
//! A worker publishes the word of pages that it is about to read, and then looks whether the pages
//! are discarded. A discard marks the pages, and then looks which workers are reading. Both put a
//! sequentially consistent memory fence between their store and their load, so at least one of them
//! sees the other:
//!
//! - The worker sees the mark and does not read the page; or
//! - the discard sees the worker and waits until it has moved on. It need not wait for a word that
//!   the worker publishes later: the worker looks at the marks after that.
//!
//! A worker that panics drops its [`Reading`], so no discard waits for it forever.

use super::sync::{AtomicU64, Ordering, fence, yield_now};

/// Most workers of a job at once: as many as a migration has streams. The two numbers below come
/// after them in the fence.
const WORKERS: usize = 64;
/// The number of the thread that handles the write faults of a snapshot.
pub const FAULTS: usize = WORKERS;
/// The number of the connection's thread, which captures discarded pages during a snapshot.
pub const SESSION: usize = WORKERS + 1;
/// Most readers at once.
pub const MAX_READERS: usize = WORKERS + 2;
/// The low bits of a published value hold the index of the word, plus one.
const WORD_BITS: u32 = 40;

/// One slot for each reader, each on a cache line of its own.
#[derive(Debug)]
pub struct Readers {
    slots: Vec<Slot>,
}

#[derive(Debug)]
#[repr(align(64))]
struct Slot(AtomicU64);

/// A published word of pages. Withdrawn on drop.
#[derive(Debug)]
pub struct Reading<'a> {
    slot: &'a AtomicU64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // Release: the reads are over before any thread sees the slot free.
        self.slot.store(0, Ordering::Release);
    }
}

impl Readers {
    /// Slots for `count` readers.
    pub fn new(count: usize) -> Self {
        Self { slots: (0..count).map(|_| Slot(AtomicU64::new(0))).collect() }
    }

    /// Publishes that `worker` is about to read pages of word `word` of the block at index `block`.
    /// Look whether they are discarded after this call, not before. A worker publishes one word at
    /// a time.
    ///
    /// Worker numbers wrap at the number of slots. The caller gives each worker a number of its
    /// own.
    pub fn reading(&self, worker: usize, block: usize, word: u64) -> Reading<'_> {
        let slot = &self.slots[worker % self.slots.len()].0;
        // Release: a thread that sees this word knows that the worker's earlier reads are over. It
        // may never see the slot free between two words.
        slot.store(((block as u64) << WORD_BITS) | (word + 1), Ordering::Release);
        fence(Ordering::SeqCst);
        Reading { slot }
    }

    /// Waits until the words are withdrawn that were published before this call and for which
    /// `overlaps(block index, word)` is true. Call it after the marks are set.
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
