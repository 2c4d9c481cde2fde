// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Data runs: finds the pages that may be allocated, at a cost that follows what is found.
//!
//! The kernel looks for the end of a run page by page, and it does not stop at the end of the
//! caller's range. In a large run each such question takes milliseconds per GiB. So the walk looks
//! one stride ahead instead. If the page there is data, all pages up to it are reported as data,
//! including small holes between them, which read as zero. If it is not data, the end of the run is
//! near, and the kernel is asked for it.

use super::backing::{Backing, BackingError, BackingKind};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};

/// Pages of the shortest stride in a dense part: 256 KiB.
const MIN_STRIDE: u64 = 64;
/// Pages of the longest stride: 4 MiB.
const MAX_STRIDE: u64 = 1024;

/// An iterator over the runs of pages in a range that may be allocated.
#[derive(Debug)]
pub struct DataRuns<'a> {
    backing: &'a Backing,
    rest: PageRange,
    stride: u64,
    /// The first page of `rest` is known to be data.
    dense: bool,
}

impl<'a> DataRuns<'a> {
    /// Starts a walk over `range`.
    pub(super) fn new(backing: &'a Backing, range: PageRange) -> Self {
        Self { backing, rest: range, stride: MIN_STRIDE, dense: false }
    }

    fn find(&mut self) -> Result<Option<PageRange>, BackingError> {
        let first =
            if self.dense { Some(self.rest.first) } else { self.backing.first_data(self.rest)? };
        let end = self.rest.end();
        let Some(first) = first.filter(|first| *first < end) else { return Ok(None) };
        // This page may lie after the end of the range and of the file. The question only limits
        // how far the kernel has to look.
        let beyond = first + self.stride;
        self.dense = self.backing.kind() == BackingKind::Hugetlb
            || self.backing.first_data(PageRange::new(beyond, 1))? == Some(beyond);
        let step = PageRange::new(first, self.stride.min(end - first));
        let last = if self.dense { step.end() } else { self.backing.first_hole(step)? };
        self.stride = if self.dense { (self.stride * 2).min(MAX_STRIDE) } else { MIN_STRIDE };
        // At least one page, even if it was punched a moment ago, so that the walk makes progress.
        let last = last.max(first + 1);
        self.rest = PageRange::new(last, end - last);
        Ok(Some(PageRange::new(first, last - first)))
    }
}

impl Backing {
    /// Those of the pages `pages` of word `word` that may be allocated. Asks the kernel once for
    /// each run, and once more for each allocated page, so use it for a few pages that are likely
    /// to be holes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn allocated(&self, word: u64, pages: u64) -> Result<u64, BackingError> {
        if self.kind() == BackingKind::Hugetlb {
            return Ok(pages);
        }
        let mut allocated = 0;
        for run in runs_of_word(word * WORD_BITS, pages) {
            let mut rest = run;
            while let Some(page) = self.first_data(rest)? {
                allocated |= 1 << (page - word * WORD_BITS);
                rest = PageRange::new(page + 1, run.end() - page - 1);
            }
        }
        Ok(allocated)
    }

    /// The runs of allocated pages in `range`, without the small holes between them. The kernel is
    /// asked twice for each run of a large range, and once for each allocated page of a small one.
    pub fn exact_data_runs(
        &self, range: PageRange,
    ) -> impl Iterator<Item = Result<PageRange, BackingError>> + '_ {
        let mut rest = range;
        let mut find = move || {
            let Some(first) = self.first_data(rest)? else { return Ok(None) };
            let here = PageRange::new(first, rest.end() - first);
            // In a small range, the end of the run may be far beyond it.
            let step = if here.count <= MAX_STRIDE { first + 1 } else { self.first_hole(here)? };
            // The page may have been punched since the first question.
            let end = step.max(first + 1);
            rest = PageRange::new(end, rest.end() - end);
            Ok(Some(PageRange::new(first, end - first)))
        };
        std::iter::from_fn(move || find().transpose())
    }
}

/// A run may contain small holes, and may continue in the next run.
impl Iterator for DataRuns<'_> {
    type Item = Result<PageRange, BackingError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.find().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::PAGE_SIZE;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Another thread allocates and punches the page all the time: it may be data when the walk
    /// asks for the start of the run, and a hole when it asks for the end.
    #[test]
    fn run_has_a_page_even_if_it_is_punched_during_the_walk() {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, PAGE_SIZE).unwrap();
        let backing = Backing::new(fd, 0, PAGE_SIZE).unwrap();
        let page = PageRange::new(0, 1);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    backing.write(0, &[1]).unwrap();
                    backing.punch(page).unwrap();
                }
            });
            let mut found = (0..20_000).flat_map(|_| backing.data_runs(page)).map(Result::unwrap);
            let empty = found.find(PageRange::is_empty);
            over.store(true, Ordering::Relaxed);
            assert_eq!(empty, None);
        });
    }

    proptest! {
        #[test]
        fn walk_finds_all_data_and_few_holes(
            extents in prop::collection::vec((0u64..4000, prop_oneof![1u64..5, 1u64..2000]), 0..8),
            first in 0u64..4000, count in 0u64..4000,
        ) {
            let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, (4096 + 16) * PAGE_SIZE).unwrap();
            let backing = Backing::new(fd, 16 * PAGE_SIZE, 4096 * PAGE_SIZE).unwrap();
            let range = PageRange::new(first, count.min(4096 - first));
            let mut allocated = BTreeSet::new();
            for (page, count) in extents {
                for page in page..(page + count).min(4096) {
                    backing.write(page * PAGE_SIZE, &[1]).unwrap();
                    allocated.insert(page);
                }
            }
            let exact = backing.exact_data_runs(range).map(Result::unwrap);
            let exact: Vec<u64> = exact.flat_map(|run| run.first..run.end()).collect();
            let wanted: Vec<u64> = allocated.range(range.first..range.end()).copied().collect();
            prop_assert_eq!(exact, wanted);
            let mut at = range.first;
            let mut found = BTreeSet::new();
            for run in backing.data_runs(range) {
                let run = run.unwrap();
                let in_order = run.first >= at && run.end() <= range.end();
                prop_assert!(in_order && !run.is_empty(), "{:?} after {}", run, at);
                at = run.end();
                found.extend(run.first..run.end());
            }
            let mut wanted = allocated.range(range.first..range.end());
            prop_assert!(wanted.all(|page| found.contains(page)));
            // A hole is only taken for data if there is data within a step on both sides.
            for hole in found.difference(&allocated) {
                let before = allocated.range(hole.saturating_sub(MAX_STRIDE)..*hole);
                let after = allocated.range(*hole..hole + MAX_STRIDE + 1);
                prop_assert!(before.count() > 0 && after.count() > 0, "hole {}", hole);
            }
        }
    }
}
