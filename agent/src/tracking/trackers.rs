// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The trackers of a job, and how the job asks them together.
//!
//! The order within a sync matters: the hooks of the VMM put KVM's bits into the shared log, so the
//! log is drained last.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::hook_tracker::{HookTracker, LazyClear};
use super::log_tracker::{LogStart, LogTracker};
use super::pagemap::Pagemap;
use super::scan_tracker::ScanTracker;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::job::Deadline;
use crate::memory::{Block, GuestMemory};
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use std::sync::Arc;
use std::time::Duration;

/// The trackers that the VMM has declared, beside the shared log.
#[derive(Debug, Clone, Default)]
pub struct TrackerChoice {
    /// The declared trackers. Empty if the VMM has not yet said what reports the guest's writes.
    pub declared: Declared,
    /// The VMM's pagemap, for write-protect scanning.
    pub pagemap: Option<Arc<Pagemap>>,
}

/// All trackers of a job.
pub struct Trackers {
    trackers: Vec<Box<dyn Tracker>>,
    lazy: Option<LazyClear>,
    /// The pagemap of the scanning tracker.
    pagemap: Option<Arc<Pagemap>>,
}

impl Trackers {
    /// The trackers that `choice` names, and the shared log. A hook gets `timeout`, but not longer
    /// than until `stop`.
    pub fn new(
        choice: &TrackerChoice, hooks: &Arc<Hooks>, timeout: Duration, stop: &Deadline,
    ) -> Self {
        let mut trackers: Vec<Box<dyn Tracker>> = Vec::new();
        let by_hooks = choice.declared.contains(Declared::HOOKS);
        if by_hooks {
            trackers.push(Box::new(HookTracker::new(hooks.clone(), timeout, stop.clone())));
        }
        if let Some(pagemap) = &choice.pagemap {
            let (hooks, pagemap) = (hooks.clone(), pagemap.clone());
            trackers.push(Box::new(ScanTracker::new(hooks, timeout, pagemap)));
        }
        if trackers.is_empty() && choice.declared.is_declared() {
            trackers.push(Box::new(LogStart::new(hooks.clone(), timeout)));
        }
        trackers.push(Box::new(LogTracker));
        let lazy = by_hooks.then(|| LazyClear::new(hooks.clone(), timeout, stop.clone()));
        Self { trackers, lazy, pagemap: choice.pagemap.clone() }
    }

    /// A single tracker for a test, without the log.
    #[cfg(test)]
    pub(crate) fn one(tracker: impl Tracker + 'static) -> Self {
        Self { trackers: vec![Box::new(tracker)], lazy: None, pagemap: None }
    }

    /// Starts all trackers.
    ///
    /// # Errors
    /// If one cannot start. Call [`Trackers::stop`] even then.
    pub fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        memory.current.check()?;
        self.trackers.iter_mut().try_for_each(|tracker| tracker.start(memory))
    }

    /// Syncs all trackers into `dirty`, one after the other. Up to `threads` threads share the work
    /// of each.
    ///
    /// # Errors
    /// If one cannot report, or a discard bitmap was lost.
    pub fn sync(
        &mut self, memory: &GuestMemory, dirty: &DirtyPages, threads: usize,
    ) -> Result<(), TrackingError> {
        self.trackers.iter_mut().try_for_each(|tracker| tracker.sync(memory, dirty, threads))?;
        check_discards(memory)
    }

    /// Stops all trackers.
    pub fn stop(&mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.stop());
    }

    /// A background snapshot is about to use the VMM's mappings. See [`Tracker::suspend`].
    pub fn suspend(&mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.suspend());
    }

    /// True if the next sync reports every page. See [`Tracker::has_missed_writes`].
    pub fn have_missed_writes(&self) -> bool {
        self.trackers.iter().any(|tracker| tracker.has_missed_writes())
    }

    /// The snapshot does not use the mappings any more.
    pub fn resume(&mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.resume());
    }

    /// Those of the pages `pages` of word `word` whose report may be due to a write to a neighbour:
    /// write-protect scanning reports all of a transparent huge page if a part of it was written.
    ///
    /// # Errors
    /// If the scan fails.
    pub fn imprecise(&self, block: &Block, word: u64, pages: u64) -> Result<u64, TrackingError> {
        let Some(pagemap) = self
            .pagemap
            .as_ref()
            .filter(|_| pages != 0 && block.backing.host_page_size() == PAGE_SIZE)
        else {
            return Ok(0);
        };
        let (id, first) = (block.geometry.id, word * WORD_BITS);
        let range = PageRange::new(first, WORD_BITS).intersection(&block.all());
        let start = block.vmm_address + range.offset();
        let mut huge = 0;
        let found = |from: u64, to: u64| {
            let run = PageRange::new((from - start) >> PAGE_SHIFT, (to - from) >> PAGE_SHIFT);
            huge |= word_mask(run.first, run.end());
        };
        pagemap
            .huge(start, range.bytes(), found)
            .map_err(|source| TrackingError::Scan { id, source })?;
        Ok(huge & pages)
    }

    /// The explicit clear, if the sync of a tracker does not clear: pages must be cleared before
    /// they are read.
    pub fn lazy_clear(&self) -> Option<&LazyClear> {
        self.lazy.as_ref()
    }
}

/// Checks that no discard bitmap was lost. Call it after a walk over the bitmaps, and before the
/// result is used.
///
/// # Errors
/// If the file under a bitmap was truncated.
pub fn check_discards(memory: &GuestMemory) -> Result<(), TrackingError> {
    if memory.blocks().iter().any(|block| block.lost_bitmap()) {
        return Err(TrackingError::Lost { what: "discard bitmap", state: "discarded" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use crate::memory::test_support::memfd;
    use pageferry_protocol::memory::BlockGeometry;

    /// Only host pages of 4 KiB can be mapped as a transparent huge page.
    #[test]
    fn reports_of_hugetlbfs_pages_are_precise() {
        let Some(pagemap) = Pagemap::own() else { return };
        let pagemap = Some(Arc::new(pagemap));
        let trackers = Trackers { trackers: Vec::new(), lazy: None, pagemap };
        let block = |huge: bool| {
            let length = 512 * PAGE_SIZE;
            let backing = Backing::new(memfd(length), 0, length).unwrap();
            let backing = if huge { backing.with_huge_pages(length) } else { backing };
            let (name, granularity) = ("ram".to_owned(), PAGE_SIZE);
            let geometry = BlockGeometry { id: 3, name, gpa: 0, length, granularity };
            // At this address no process has a mapping, so a scan fails.
            Block::new(geometry, backing, 1 << 63, None).unwrap()
        };
        assert_eq!(trackers.imprecise(&block(true), 1, u64::MAX).unwrap(), 0);
        assert_eq!(trackers.imprecise(&block(false), 1, 0).unwrap(), 0);
        let asked = trackers.imprecise(&block(false), 1, 1).unwrap_err();
        assert!(matches!(asked, TrackingError::Scan { id: 3, .. }), "{asked}");
    }
}
