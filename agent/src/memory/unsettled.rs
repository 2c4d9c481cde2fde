// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Large pages of which not all small pages may arrive.

use super::backing::{Backing, BackingError};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};

/// Large pages of a block that were allocated before all of their pages have arrived.
#[derive(Debug)]
pub struct Unsettled {
    numbers: MappedBitmap,
    /// Bytes of a large page.
    size: u64,
    /// The offset of the block's start in its first large page, in bytes.
    into_first: u64,
}

impl Unsettled {
    /// Large pages are counted from the one in which the block starts.
    pub fn new(numbers: MappedBitmap, size: u64, into_first: u64) -> Self {
        Self { numbers, size, into_first }
    }

    /// True if the large page with this number is among them.
    pub fn contains(&self, number: u64) -> bool {
        self.numbers.contains(number)
    }

    /// Adds a large page.
    pub fn add(&self, number: u64) {
        self.numbers.set(PageRange::new(number, 1));
    }

    /// The number of the large page with this byte of the block.
    pub fn number_of(&self, byte: u64) -> u64 {
        (self.into_first + byte) / self.size
    }

    /// The byte of the block at which the large page with this number ends. It may lie after the
    /// block's end.
    pub fn end_of(&self, number: u64) -> u64 {
        (number + 1) * self.size - self.into_first
    }

    /// Punches the pages that hold nothing: those that are not `filled`, and those that are in one
    /// of `gone`. Then no large page is unsettled. Returns what was punched. No thread may place
    /// during this call.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, backing: &Backing, filled: &MappedBitmap, gone: &[&MappedBitmap],
    ) -> Result<Vec<PageRange>, BackingError> {
        let (mut numbers, mut punched) = (Vec::new(), Vec::new());
        self.numbers.take(self.numbers.all(), |word, bits| {
            numbers
                .extend(runs_of_word(word * WORD_BITS, bits).flat_map(|run| run.first..run.end()));
        });
        for number in numbers {
            let count = self.size / PAGE_SIZE;
            let mut rest = PageRange::new(self.end_of(number) / PAGE_SIZE - count, count);
            for run in gone.iter().flat_map(|gone| gone.runs(rest)) {
                backing.punch(run)?;
                punched.push(run);
            }
            while let Some(first) = filled.next_clear(rest) {
                let after = PageRange::new(first, rest.end() - first);
                let next = filled.next_set(after).unwrap_or(rest.end());
                let run = PageRange::new(first, next - first);
                backing.punch(run)?;
                punched.push(run);
                rest = PageRange::new(next, rest.end() - next);
            }
        }
        Ok(punched)
    }

    /// How many there are.
    #[cfg(test)]
    pub fn count(&self) -> u64 {
        self.numbers.count(self.numbers.all())
    }
}
