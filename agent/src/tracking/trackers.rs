// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The trackers of a job, and how the job asks them together.
//!
//! The order within a sync matters: the hooks of the VMM put KVM's bits into the shared log, so the
//! log is drained last.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::hook_tracker::{HookTracker, LazyClear};
use super::log_tracker::{LogStart, LogTracker};
use super::scan_tracker::ScanTracker;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::job::Deadline;
use crate::memory::GuestMemory;
use crate::pagemap::Pagemap;
use pageferry_protocol::control::Trackers as Declared;
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
        Self { trackers, lazy }
    }

    /// A single tracker for a test, without the log.
    #[cfg(test)]
    pub(crate) fn one(tracker: impl Tracker + 'static) -> Self {
        Self { trackers: vec![Box::new(tracker)], lazy: None }
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

    /// Those of the pages `pages` of word `word` of the block at index `at` whose report may be due
    /// to a write to a neighbour. See [`Tracker::imprecise`].
    pub fn imprecise(&self, at: usize, word: u64, pages: u64) -> u64 {
        self.trackers.iter().fold(0, |all, tracker| all | tracker.imprecise(at, word, pages))
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
