// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Large pages of which not all small pages may arrive.

use super::backing::{Backing, BackingError};
use super::guest_memory::GuestMemory;
use super::zero::is_zero;
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

    /// Adds the large pages with a part of `range` that `which` is true for.
    pub fn add_of(&self, range: PageRange, which: impl Fn(u64) -> bool) {
        if !range.is_empty() {
            let last = self.number_of(range.end() * PAGE_SIZE - 1);
            let numbers = self.number_of(range.offset())..=last;
            numbers.filter(|number| which(*number)).for_each(|number| self.add(number));
        }
    }

    /// Punches the pages that hold nothing: those that are not `filled`, and those that are in one
    /// of `gone`. Then no large page is unsettled. No thread may place during this call.
    ///
    /// The kernel frees a part of a large page by splitting it. It cannot while somebody else has a
    /// reference to the page, such as a transfer to a disk: then it writes zeroes and keeps the
    /// memory. Such a large page is replaced by small ones, which `place` writes: whole pages to a
    /// byte of the block. Returns the numbers of those.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, memory: &GuestMemory, backing: &Backing, filled: &MappedBitmap,
        gone: &[&MappedBitmap], place: impl Fn(u64, &[u8]) -> Result<(), BackingError>,
    ) -> Result<Vec<u64>, BackingError> {
        let (mut numbers, mut replaced) = (Vec::new(), Vec::new());
        self.numbers.take(self.numbers.all(), |word, bits| {
            numbers
                .extend(runs_of_word(word * WORD_BITS, bits).flat_map(|run| run.first..run.end()));
        });
        for number in numbers {
            // While one thread frees a part of a large page, the kernel has a reference to it, and
            // another thread cannot free a part. So the VMM gives nothing back meanwhile. What it
            // gives back later is freed, since no other thread is at this page any more.
            let _giving_back = memory.giving_back();
            let all = self.pages_of(number, backing);
            let mut is_kept = false;
            let mut punch = |run| -> Result<(), BackingError> {
                backing.punch(run)?;
                is_kept = is_kept || backing.first_data(run)?.is_some();
                Ok(())
            };
            gone.iter().flat_map(|gone| gone.runs(all)).try_for_each(&mut punch)?;
            let mut rest = all;
            while let Some(first) = filled.next_clear(rest) {
                let after = PageRange::new(first, rest.end() - first);
                let next = filled.next_set(after).unwrap_or(rest.end());
                punch(PageRange::new(first, next - first))?;
                rest = PageRange::new(next, rest.end() - next);
            }
            if is_kept {
                replace(backing, all, filled, &place)?;
                replaced.push(number);
            }
        }
        Ok(replaced)
    }

    /// The pages of a large page that the block has.
    fn pages_of(&self, number: u64, backing: &Backing) -> PageRange {
        let end = self.end_of(number);
        let first = end.saturating_sub(self.size) / PAGE_SIZE;
        PageRange::new(first, end.min(backing.length()) / PAGE_SIZE - first)
    }

    /// How many there are.
    #[cfg(test)]
    pub fn count(&self) -> u64 {
        self.numbers.count(self.numbers.all())
    }
}

/// Writes the pages of a large page to new memory, but those that are zero.
fn replace(
    backing: &Backing, all: PageRange, filled: &MappedBitmap,
    place: impl Fn(u64, &[u8]) -> Result<(), BackingError>,
) -> Result<(), BackingError> {
    let mut content = vec![0; all.bytes() as usize];
    backing.read(all.offset(), &mut content)?;
    // All of it goes, whoever has a reference.
    backing.punch(all)?;
    for page in filled.runs(all).flat_map(|run| run.first..run.end()) {
        let start = ((page - all.first) * PAGE_SIZE) as usize;
        let bytes = &content[start..start + PAGE_SIZE as usize];
        // Freed since it was filled, or as good as that.
        if !is_zero(bytes) {
            place(page * PAGE_SIZE, bytes)?;
        }
    }
    Ok(())
}
