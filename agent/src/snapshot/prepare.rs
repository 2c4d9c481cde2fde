// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Preparation of a snapshot: what is done before the instant, so that the guest is paused for a
//! shorter time.
//!
//! To ask a file which pages are allocated takes two system calls for every 4 MiB of data, and
//! several for every hole. So all of this is asked while the guest runs. At the instant only the
//! holes are asked about once more, with one call for each that is still a hole. Pages that were
//! allocated are assumed to be so still. If the VMM has punched one by itself, it reads as zero,
//! and if one was discarded or freed, the agent knows that.
//!
//! The bitmaps that are filled at the instant also get their memory here.

use crate::job::{Job, JobError};
use crate::memory::MemoryError;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::{Block, GuestMemory};
use crate::tracking::DirtyPages;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::Arc;

/// What is prepared for the instant.
#[derive(Debug)]
pub struct Prepared {
    memory: Arc<GuestMemory>,
    /// Small holes between allocated pages count as holes. If the VMM frees memory without a
    /// request, a hole that is found later must be one that was freed after the instant.
    exact: bool,
    /// Pages that were allocated when the file was asked last.
    allocated: DirtyPages,
    /// The pages that are discarded at the instant. Empty until then.
    pub discarded: DirtyPages,
    /// For the pages that are written after the instant. Empty.
    pub later: DirtyPages,
    /// The pages to capture. Empty until the instant.
    pub pending: Arc<HostPageSet>,
}

impl Prepared {
    /// An empty preparation. If the guest runs while it is saved, the unit of a capture is its host
    /// page.
    pub fn new(job: &Job, runs_on: bool, unannounced_frees: bool) -> Result<Self, JobError> {
        let memory = job.memory.clone();
        let host_page =
            |block: &Arc<Block>| if runs_on { block.backing.host_page_size() } else { PAGE_SIZE };
        let host_pages: Vec<u64> = memory.blocks().iter().map(host_page).collect();
        let pending = Arc::new(HostPageSet::empty(memory.blocks(), &host_pages)?);
        let none = || DirtyPages::none(&memory);
        let (allocated, discarded, later) = (none()?, none()?, none()?);
        let exact = runs_on && unannounced_frees;
        Ok(Self { memory, exact, allocated, discarded, later, pending })
    }

    /// Asks which pages of the block at index `at` were allocated since the last call. Then calls
    /// `found` with each word of pages to save: allocated, not discarded, and, for an increment,
    /// changed.
    pub fn pages_to_save(
        &self, at: usize, changed: Option<&DirtyPages>, mut found: impl FnMut(u64, u64),
    ) -> Result<(), JobError> {
        self.find_allocated(at)?;
        let (block, allocated) = (&self.memory.blocks()[at], self.allocated.block(at));
        let mut discards = block.discarded.nonzero_words(block.all()).peekable();
        for (word, allocated) in allocated.nonzero_words(allocated.all()) {
            while discards.next_if(|(discarded, _)| *discarded < word).is_some() {}
            let discarded = discards
                .peek()
                .filter(|(discarded, _)| *discarded == word)
                .map_or(0, |(_, bits)| *bits);
            let wanted = changed.map_or(u64::MAX, |changed| changed.block(at).word(word));
            let bits = allocated & wanted & !discarded;
            if bits != 0 {
                found(word, bits);
            }
        }
        Ok(())
    }

    fn find_allocated(&self, at: usize) -> Result<(), MemoryError> {
        let (block, allocated) = (&self.memory.blocks()[at], self.allocated.block(at));
        let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
        let end = block.all().end();
        let rest = |first: u64| PageRange::new(first, end - first);
        let mut next = 0;
        while let Some(first) = allocated.next_clear(rest(next)) {
            next = allocated.next_set(rest(first)).unwrap_or(end);
            let gap = PageRange::new(first, next - first);
            let set = |run: Result<_, _>| run.map(|run| _ = allocated.set(run)).map_err(failed);
            if self.exact {
                block.backing.exact_data_runs(gap).try_for_each(set)?;
            } else {
                block.backing.data_runs(gap).try_for_each(set)?;
            }
        }
        block.take_known_holes(allocated).map_err(failed)
    }

    /// Makes the kernel allocate the memory that the bitmaps need for the pages known now.
    pub fn preallocate_bitmaps(&self, changed: Option<&DirtyPages>) -> Result<(), JobError> {
        for at in 0..self.memory.blocks().len() {
            self.pages_to_save(at, changed, |word, pages| self.pending.add_pages(at, word, pages))?;
            let all = self.pending.block(at).bits().all();
            self.pending.take_range(at, all, |_, _| ());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::{job, memory};

    #[test]
    fn allocated_changed_and_undiscarded_pages_are_saved() {
        let job = job(memory(&[64, 192]));
        let prepared = Prepared::new(&job, false, false).unwrap();
        let block = &job.memory.blocks()[1];
        let write = |page: u64| block.backing.write(page * PAGE_SIZE, &[1]).unwrap();
        let pages_to_save = |changed| {
            let mut found = Vec::new();
            prepared.pages_to_save(1, changed, |word, bits| found.push((word, bits))).unwrap();
            found
        };
        assert_eq!(pages_to_save(None), []);
        [3, 4, 70, 71].into_iter().for_each(write);
        block.discarded.set(PageRange::new(71, 5));
        assert_eq!(pages_to_save(None), [(0, 0b1_1000), (1, 1 << 6)]);
        // The guest writes while it runs.
        [5, 130].into_iter().for_each(write);
        assert_eq!(pages_to_save(None), [(0, 0b11_1000), (1, 1 << 6), (2, 1 << 2)]);
        let changed = DirtyPages::none(&job.memory).unwrap();
        changed.block(1).set(PageRange::new(4, 100));
        assert_eq!(pages_to_save(Some(&changed)), [(0, 0b11_0000), (1, 1 << 6)]);
    }

    #[test]
    fn small_holes_count_if_the_vmm_frees_memory_by_itself() {
        let job = job(memory(&[64]));
        let block = &job.memory.blocks()[0];
        block.backing.write(0, &vec![1; 64 * PAGE_SIZE as usize]).unwrap();
        let hole = |page| block.backing.punch(PageRange::new(page, 1)).unwrap();
        hole(7);
        let prepared = Prepared::new(&job, true, true).unwrap();
        let pages_to_save = || {
            let mut found = 0;
            prepared.pages_to_save(0, None, |_, bits| found |= bits).unwrap();
            found
        };
        assert_eq!(pages_to_save(), !(1 << 7));
        hole(9);
        block.hint_freed(PageRange::new(9, 1));
        assert_eq!(pages_to_save(), !(1 << 7 | 1 << 9));
    }
}
