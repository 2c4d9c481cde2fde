// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting: at the start of a migration the guest says which of its pages are free, so
//! that the first pass leaves them out.
//!
//! The device asks with a number from 2 on, in the configuration space. The driver answers with
//! that number, then with its free pages, and 0 when there are no more. It takes the pages away
//! from its guest, and gives them back at [`DONE`], or earlier if it needs them. What the guest
//! writes to them from then on the trackers report, as they report any write.
//!
//! The numbers tell rounds apart: an answer to an earlier round is stale, and is ignored. A driver
//! that is silent or lies delays nobody: the pass takes what has arrived when it comes by.

use crate::devices::guest_map::DeviceMemory;
use crate::memory::GuestMemory;
use crate::tracking::DirtyPages;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::Arc;

/// The driver ends a round, and the device asks for nothing.
pub const STOP: u32 = 0;
/// The device needs no hints any more: the driver gives the pages back to its guest.
pub const DONE: u32 = 1;
/// The number of the first round.
const FIRST: u32 = 2;

/// The free pages of a round.
#[derive(Debug)]
pub struct FreePages {
    memory: Arc<GuestMemory>,
    pages: DirtyPages,
}

impl FreePages {
    /// These pages, each of the block at an index.
    #[cfg(test)]
    pub fn of(memory: &Arc<GuestMemory>, free: impl Iterator<Item = (usize, u64)>) -> Self {
        let pages = DirtyPages::none(memory).unwrap();
        free.for_each(|(at, page)| _ = pages.block(at).set(PageRange::new(page, 1)));
        Self { memory: memory.clone(), pages }
    }

    /// The pages of the block at index `at`: bits of a word.
    pub fn word(&self, at: usize, word: u64) -> u64 {
        self.pages.block(at).word(word)
    }
}

/// The rounds of hints.
#[derive(Debug, Default)]
pub struct Hints {
    /// What the device asks for: a round, [`DONE`] or [`STOP`].
    command: u32,
    /// The number of the last round.
    last: u32,
    /// The round that the driver answers now.
    answers: u32,
    round: Option<Arc<FreePages>>,
    /// Pages of the last round that has ended.
    ended: u64,
}

impl Hints {
    /// The command of the configuration space.
    pub fn command(&self) -> u32 {
        self.command
    }

    /// Begins a round. `None` without memory for it.
    pub fn begin(&mut self, memory: &Arc<GuestMemory>) -> Option<Arc<FreePages>> {
        let pages = DirtyPages::none(memory).ok()?;
        self.last = self.last.checked_add(1).map_or(FIRST, |next| next.max(FIRST));
        self.command = self.last;
        let round = Arc::new(FreePages { memory: memory.clone(), pages });
        self.round = Some(round.clone());
        Some(round)
    }

    /// Ends the round.
    pub fn end(&mut self) {
        self.ended = self.pages();
        (self.command, self.round) = (DONE, None);
    }

    /// The number of free pages of this round, or of the last one.
    pub fn pages(&self) -> u64 {
        self.round.as_ref().map_or(self.ended, |round| round.pages.count())
    }

    /// The driver begins anew, and has not answered yet.
    pub fn reset(&mut self) {
        self.answers = STOP;
        if self.round.is_none() {
            self.command = STOP;
        }
    }

    /// The driver says which round it answers, or that it has no more pages.
    pub fn set_round(&mut self, bytes: &[u8]) {
        if let Ok(number) = <[u8; 4]>::try_from(bytes) {
            self.answers = u32::from_le_bytes(number);
        }
    }

    /// The driver says that these bytes are free.
    pub fn add(&mut self, memory: &DeviceMemory<'_>, gpa: u64, length: u64) {
        let Some(round) = &self.round else { return };
        // The job has the memory with which it began.
        if self.answers != self.command || !Arc::ptr_eq(&round.memory, memory.memory()) {
            return;
        }
        // Only whole pages are free.
        let end = gpa.saturating_add(length) / PAGE_SIZE * PAGE_SIZE;
        let Some(start) = gpa.checked_next_multiple_of(PAGE_SIZE) else { return };
        for (at, pages) in memory.pages(start, end.saturating_sub(start)) {
            round.pages.block(at).set(PageRange::new(pages.first, pages.count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::guest_map::GuestMap;
    use crate::devices::guest_map::test_support::whole_table;
    use crate::memory::test_support::memory;

    #[test]
    fn rounds_have_numbers_of_their_own() {
        let memory = Arc::new(memory(&[8]));
        let mut hints = Hints::default();
        assert_eq!(hints.command(), STOP);
        assert!(hints.begin(&memory).is_some());
        assert_eq!(hints.command(), FIRST);
        hints.end();
        assert_eq!(hints.command(), DONE);
        assert!(hints.begin(&memory).is_some());
        assert_eq!(hints.command(), FIRST + 1);
        hints.last = u32::MAX;
        assert!(hints.begin(&memory).is_some());
        assert_eq!(hints.command(), FIRST, "after the last number");
    }

    #[test]
    fn only_whole_pages_of_the_round_that_was_asked_for_are_free() {
        let blocks = Arc::new(memory(&[8]));
        let mut map = GuestMap::default();
        map.update(&whole_table(&blocks, 0), &blocks, true);
        let view = DeviceMemory::new(&blocks, &map);
        let mut hints = Hints::default();
        let round = hints.begin(&blocks).unwrap();
        hints.add(&view, 0, PAGE_SIZE);
        assert_eq!(hints.pages(), 0, "the driver has not answered");
        hints.set_round(&FIRST.to_le_bytes());
        hints.add(&view, 1, 3 * PAGE_SIZE);
        assert_eq!(round.word(0, 0), 0b110);
        // Addresses at the end of the address space.
        hints.add(&view, u64::MAX, u64::MAX);
        hints.add(&view, u64::MAX - PAGE_SIZE, u64::MAX);
        hints.set_round(&(FIRST - 1).to_le_bytes());
        hints.add(&view, 5 * PAGE_SIZE, PAGE_SIZE);
        assert_eq!(hints.pages(), 2, "a stale round");
    }
}
