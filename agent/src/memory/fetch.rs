// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that a device of this agent needs before they have come, in postcopy and in a lazy
//! restore.
//!
//! The device touches the guest's memory through a mapping of its own, which nobody watches. If it
//! touched a missing page, the kernel would allocate a page of zeroes, and the content that comes
//! later would be lost. So the device first has the page fetched as if the guest had touched it.

use super::guest_memory::GuestMemory;
use super::missing_pages::MissingPages;
use crate::waiting::may_wait;
use pageferry_protocol::memory::PageRange;
use std::time::{Duration, Instant};

/// Interval at which a device looks whether its page has come. If there was no memory for the page,
/// it is also asked for again.
const LOOK: Duration = Duration::from_millis(1);

impl GuestMemory {
    /// True if none of these pages is missing: indexes of blocks, and pages.
    pub fn are_present(&self, pages: &[(usize, PageRange)]) -> bool {
        self.missing_pages().is_none_or(|missing| self.missing_of(&missing, pages).is_empty())
    }

    /// True if one of these pages is discarded. A device leaves it alone: a touch would allocate it
    /// ([`never-populate`](crate::invariants#never-populate)).
    pub fn are_discarded(&self, pages: &[(usize, PageRange)]) -> bool {
        pages.iter().any(|(at, range)| self.blocks()[*at].discarded.runs(*range).next().is_some())
    }

    /// Fetches those of these pages that are missing, and waits for them. False if they do not come
    /// within `limit`, or `go_on` is false before.
    pub fn fetch(
        &self, pages: &[(usize, PageRange)], limit: Duration, go_on: impl Fn() -> bool,
    ) -> bool {
        may_wait("fetch pages for a device");
        let end = Instant::now() + limit;
        loop {
            let Some(missing_pages) = self.missing_pages() else { return true };
            let missing = self.missing_of(&missing_pages, pages);
            if missing.is_empty() {
                return true;
            }
            if Instant::now() >= end || !go_on() {
                return false;
            }
            missing_pages.demands().add(missing);
            std::thread::sleep(LOOK);
        }
    }

    /// The host pages that are missing or being placed.
    fn missing_of(
        &self, missing_pages: &MissingPages, pages: &[(usize, PageRange)],
    ) -> Vec<(usize, u64)> {
        let mut found = Vec::new();
        for (at, range) in pages {
            let missing = missing_pages.missing().block(*at);
            let host_pages = missing.covering(*range);
            for run in missing.bits().runs(host_pages) {
                found.extend((run.first..run.end()).map(|host_page| (*at, host_page)));
            }
        }
        if found.is_empty() {
            // A page counts as here from the moment that a thread takes it to place it.
            self.readers.wait(|at, word| {
                let placed = missing_pages.published_pages(at, word);
                pages.iter().any(|(other, range)| *other == at && range.overlaps(&placed))
            });
        }
        found
    }
}
