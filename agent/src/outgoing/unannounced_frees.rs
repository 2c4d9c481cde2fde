// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that the VMM freed without a request after it was sent: it must take no room at the
//! destination ([`never-populate`](crate::invariants#never-populate)).
//!
//! A VMM that declares [`Trackers::UNANNOUNCED_FREES`](Declared::UNANNOUNCED_FREES) punches its
//! memory by itself. No tracker reports that: the kernel keeps the write protection of a punched
//! page (`zap_install_uffd_wp_if_needed()` in mm/memory.c), so for a scan it is not written.
//!
//! So a migration of such a VMM notes the pages that it sends with content. When the passes are
//! over, and the guest still runs, it asks the file which of them are holes now. These pages become
//! dirty, and one more pass sends them as zero. This happens once for each migration: the kernel
//! needs about 100 ns for each page that was sent. What is freed later, in the last pass or the
//! pause, stays allocated at the destination until the guest uses it or gives it back again.

use super::migration::Migration;
use crate::job::JobError;
use crate::memory::{Block, GuestMemory, MemoryError};
use crate::tracking::{DirtyPages, TrackerChoice};
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::{MappedBitmap, MappingError};

/// The pages that were sent with content, if the VMM frees memory without a request.
#[derive(Debug)]
pub struct UnannouncedFrees {
    sent: Option<DirtyPages>,
}

impl UnannouncedFrees {
    /// No page was sent.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn new(memory: &GuestMemory, choice: &TrackerChoice) -> Result<Self, MappingError> {
        let wanted = choice.declared.contains(Declared::UNANNOUNCED_FREES);
        Ok(Self { sent: wanted.then(|| DirtyPages::none(memory)).transpose()? })
    }

    /// Where to note the pages that are sent with content. `None` if nobody will ask.
    pub fn sent(&self) -> Option<&DirtyPages> {
        self.sent.as_ref()
    }
}

impl Migration {
    /// Makes the pages dirty that were sent and are holes now. Returns their number, and 0 from the
    /// second call on.
    pub(super) fn find_unannounced_frees(&mut self) -> Result<u64, JobError> {
        let Some(sent) = self.unannounced_frees.sent.take() else { return Ok(0) };
        let memory = self.job.memory.clone();
        let mut freed = 0;
        for (at, block) in memory.blocks().iter().enumerate() {
            for run in sent.block(at).runs(block.all()) {
                self.job.check()?;
                freed += mark_holes(block, run, self.dirty.pages.block(at))?;
            }
        }
        self.expect_pages(self.dirty.pages.count());
        Ok(freed)
    }
}

/// Makes those of the pages `range` dirty that are holes. Returns their number.
///
/// They become known holes, too, so they are not read, unless the guest has written to one by then.
fn mark_holes(block: &Block, range: PageRange, dirty: &MappedBitmap) -> Result<u64, JobError> {
    if !block.backing.tells_holes() {
        return Ok(0);
    }
    let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
    let (mut first, mut found) = (range.first, 0);
    let mut mark = |hole: PageRange| {
        if !hole.is_empty() {
            block.hint_freed(hole);
            dirty.set(hole);
            found += hole.count;
        }
    };
    for data in block.backing.exact_data_runs(range) {
        let data = data.map_err(failed)?;
        mark(PageRange::new(first, data.first - first));
        first = data.end();
    }
    mark(PageRange::new(first, range.end() - first));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use pageferry_protocol::memory::PAGE_SIZE;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn holes_of_what_was_sent_become_dirty(
            written in prop::collection::btree_set(0u64..200, 0..200),
            (first, count) in (0u64..150, 1u64..50),
        ) {
            let memory = memory(&[200]);
            let block = &memory.blocks()[0];
            for page in &written {
                block.backing.write(page * PAGE_SIZE, &[1]).unwrap();
            }
            let dirty = MappedBitmap::private(200).unwrap();
            let found = mark_holes(block, PageRange::new(first, count), &dirty).unwrap();
            let wanted: BTreeSet<u64> =
                (first..first + count).filter(|page| !written.contains(page)).collect();
            let marked: BTreeSet<u64> =
                dirty.runs(dirty.all()).flat_map(|run| run.first..run.end()).collect();
            prop_assert_eq!(found, wanted.len() as u64);
            prop_assert_eq!(marked, wanted);
        }
    }
}
