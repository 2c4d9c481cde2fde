// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages that are owed to a guest which runs before all of its memory is here.
//!
//! This bitmap lies with the VMM, so it outlives the agent, and the next agent learns from it which
//! pages are still to come. [`super::missing_pages`] keeps it:
//!
//! - Before the guest runs, and before discards know of missing pages, these become owed.
//! - A page that arrives is placed, and then its bit is cleared. If the agent ends in between, the
//!   next one places the page a second time, and the kernel refuses that, because it is there.
//! - The bit of a page that is discarded or freed is cleared before the discard or the free is
//!   acknowledged, also if discards do not know of missing pages yet. Otherwise this agent or the
//!   next one would place stale content ([`never-read`](crate::invariants#never-read)).
//! - The next agent makes the owed pages missing, has discards know of them, and then looks again:
//!   what is not owed any more by then is not missing either. A model checks these steps against
//!   those of a discard in every order.
//!
//! Bits are only cleared while the guest runs, and the next agent looks at them when the process of
//! the last one has ended. So a clear needs no order with the page that it is about.
//!
//! One thing cannot be seen from here: a page that the VMM has given up by itself (madvise), if the
//! agent has read that event and ends before it has cleared the bit. The next agent gives the page
//! its old content, which the guest has given up.

use super::bus_guard::GuardedRange;
use super::error::MemoryError;
use super::guest_memory::GuestMemory;
use super::host_page_set::{BlockHostPages, HostPageSet};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use std::sync::atomic::{AtomicBool, Ordering};

/// The owed pages of a block, one bit for each.
#[derive(Debug)]
pub struct OwedPages {
    // Before the bitmap, so that the guard is dropped first.
    guard: GuardedRange,
    bits: MappedBitmap,
    /// False as long as no page was ever owed: then discards do not look at the bitmap, which is
    /// all holes.
    any: AtomicBool,
}

impl OwedPages {
    /// Guards the bitmap, which the VMM shares.
    pub fn new(bits: MappedBitmap) -> Self {
        // Set from the start if a lost agent owes pages: discards may come before the job goes on.
        let any = AtomicBool::new(bits.next_set(bits.all()).is_some());
        Self { guard: GuardedRange::of(bits.storage()), bits, any }
    }

    /// All pages that are `missing` are owed now.
    fn add(&self, missing: &BlockHostPages) {
        self.any.store(true, Ordering::SeqCst);
        for run in missing.bits().runs(missing.bits().all()) {
            self.bits.set(missing.pages(run));
        }
    }

    /// These pages are discarded or freed.
    pub(super) fn forget(&self, pages: PageRange) {
        if self.any.load(Ordering::SeqCst) {
            self.bits.clear(pages);
        }
    }

    /// Those of the host pages `bits` of word `word` in which a page is owed.
    pub(super) fn host_pages_in(&self, host_pages: &BlockHostPages, word: u64, bits: u64) -> u64 {
        if host_pages.unit() == 1 {
            return bits & self.bits.word(word);
        }
        let is_owed = |bit: &u64| {
            let host_page = PageRange::new(word * WORD_BITS + bit, 1);
            bits >> bit & 1 != 0 && self.bits.next_set(host_pages.pages(host_page)).is_some()
        };
        (0..WORD_BITS).filter(is_owed).fold(0, |owed, bit| owed | 1 << bit)
    }

    /// The host pages `bits` of word `word` are not owed any more.
    pub(super) fn settle(&self, host_pages: &BlockHostPages, word: u64, bits: u64) {
        if host_pages.unit() == 1 {
            self.bits.take_bits(word, bits);
            return;
        }
        for run in runs_of_word(word * WORD_BITS, bits) {
            self.bits.clear(host_pages.pages(run));
        }
    }

    /// The words of the bitmap in which pages are owed. `None` if the file was truncated: then
    /// nobody knows.
    fn words(&self) -> Option<Vec<(u64, u64)>> {
        let words = self.bits.nonzero_words(self.bits.all()).collect();
        (!self.guard.was_lost()).then_some(words)
    }
}

impl GuestMemory {
    /// True if the VMM keeps the owed pages of all blocks.
    pub fn keeps_owed(&self) -> bool {
        self.blocks().iter().all(|block| block.owed.is_some())
    }

    /// From now on these pages are owed. Call it before
    /// [`GuestMemory::set_missing_pages`], and while what is given back is recorded.
    pub fn owe(&self, missing: &HostPageSet) {
        for (at, block) in self.blocks().iter().enumerate() {
            block.owed.iter().for_each(|owed| owed.add(missing.block(at)));
        }
    }

    /// The host pages that are owed, for the agent that continues.
    ///
    /// # Errors
    /// If that is not known, or there is no memory for the set.
    pub fn owed_pages(&self) -> Result<HostPageSet, MemoryError> {
        let host_pages: Vec<u64> =
            self.blocks().iter().map(|block| block.backing.host_page_size()).collect();
        let missing = HostPageSet::empty(self.blocks(), &host_pages)?;
        for (at, block) in self.blocks().iter().enumerate() {
            let owed = block.owed.as_ref().and_then(OwedPages::words);
            let owed = owed.ok_or(MemoryError::OwedUnknown { id: block.geometry.id })?;
            owed.into_iter().for_each(|(word, bits)| missing.add_pages(at, word, bits));
        }
        Ok(missing)
    }
}
