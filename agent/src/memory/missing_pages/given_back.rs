// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Missing pages that are discarded, freed or removed, and so need not come any more.

use super::{MissingPages, key};
use crate::memory::fence::Readers;
use crate::memory::recorded_discards::RecordedDiscards;
use crate::stats::add;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::userfault::AddressRange;
use std::sync::atomic::{Ordering, fence};

impl MissingPages {
    /// A discard of `range` has set its marks: the pages of it that are missing need not come any
    /// more.
    pub(in crate::memory) fn drop_missing(&self, at: usize, range: PageRange) {
        let host_pages = self.missing.block(at).covering(range);
        let mut any = false;
        self.missing.take_range(at, host_pages, |word, bits| {
            self.dropped[at].or_word(word, bits);
            self.settle(at, word, bits);
            add(
                &self.live.dropped_pages,
                u64::from(bits.count_ones()) * self.missing.block(at).unit(),
            );
            any = true;
        });
        if any {
            self.notify();
        }
    }

    /// Drops the missing pages that were discarded before discards knew of this set. Call it after
    /// [`GuestMemory::set_missing_pages`](crate::memory::GuestMemory::set_missing_pages).
    pub fn drop_discarded(&self) {
        for (at, block) in self.blocks.iter().enumerate() {
            self.drop_whole_host_pages(at, &block.discarded);
        }
    }

    /// Drops the missing pages that are not owed any more: they were given back before discards
    /// knew of this set. For an agent that continues the job of another. Call it after
    /// [`GuestMemory::set_missing_pages`](crate::memory::GuestMemory::set_missing_pages).
    pub fn drop_settled(&self) {
        for (at, block) in self.blocks.iter().enumerate() {
            let (Some(owed), missing) = (&block.owed, self.missing.block(at)) else { continue };
            for (word, bits) in missing.bits().nonzero_words(missing.bits().all()) {
                let gone = bits & !owed.host_pages_in(missing, word, bits);
                for run in runs_of_word(word * WORD_BITS, gone) {
                    self.drop_missing(at, missing.pages(run));
                }
            }
        }
    }

    /// Drops the missing pages that were given back while a recorder ran.
    pub fn drop_recorded(&self, recorded: &RecordedDiscards) {
        for at in 0..self.requested.len() {
            self.drop_whole_host_pages(at, recorded.discarded(at));
            self.drop_whole_host_pages(at, recorded.freed(at));
        }
    }

    fn drop_whole_host_pages(&self, at: usize, given_back: &MappedBitmap) {
        let host_pages = self.missing.block(at);
        let unit = host_pages.unit();
        for run in given_back.runs(given_back.all()) {
            // A host page that is only partly discarded must still come.
            let (first, end) = (run.first.div_ceil(unit), run.end() / unit);
            self.drop_missing(
                at,
                host_pages.pages(PageRange::new(first, end.saturating_sub(first))),
            );
        }
    }

    /// The VMM gave up the memory at these addresses, and punched it by itself. The pages that are
    /// missing need not come any more.
    pub fn removed(&self, readers: &Readers, removed: AddressRange) {
        for (at, host_pages) in self.placer.mappings().locate_range(removed) {
            let pages = self.missing.block(at).pages(host_pages);
            self.drop_missing(at, pages);
            readers
                .wait(|index, word| index == at && self.published_pages(at, word).overlaps(&pages));
            self.drop_missing(at, pages);
            self.wake_waiting(at, pages);
        }
    }

    /// A discard of `range` is done: wakes the threads that wait for a page of it. They touch the
    /// page again, and the fault handler places zero.
    pub(in crate::memory) fn wake_waiting(&self, at: usize, range: PageRange) {
        fence(Ordering::SeqCst);
        let host_pages = self.missing.block(at).covering(range);
        // A touch before this discard says nothing about the faults after it.
        self.touched[at].clear(host_pages);
        self.requested[at].take(host_pages, |word, bits| {
            for run in runs_of_word(word * WORD_BITS, bits) {
                for host_page in run.first..run.end() {
                    self.live.latency.forget(key(at, host_page));
                    self.placer.wake(at, PageRange::new(host_page, 1));
                }
            }
        });
    }
}
