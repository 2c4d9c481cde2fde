// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write-protect scanning of the VMM's mappings as a tracker. [`super::pagemap`] has the scan.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::pagemap::Pagemap;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::memory::GuestMemory;
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::memory::{PAGE_SHIFT, PageRange};
use std::sync::Arc;
use std::time::Duration;

/// Write-protect scanning. Each sync reports the pages of the VMM's mapping that were written, and
/// protects them again.
///
/// The VMM registers its mappings when this tracker starts. A mapping can be registered with only
/// one userfaultfd, so a background snapshot takes the mappings over while it runs. A scan sees no
/// write of that time, so all pages count as written.
pub(super) struct ScanTracker {
    hooks: Arc<Hooks>,
    timeout: Duration,
    pagemap: Arc<Pagemap>,
    started: bool,
    /// A snapshot uses the mappings now.
    suspended: bool,
    /// A snapshot has used the mappings since the last complete sync.
    missed: bool,
}

impl ScanTracker {
    pub(super) fn new(hooks: Arc<Hooks>, timeout: Duration, pagemap: Arc<Pagemap>) -> Self {
        Self { hooks, timeout, pagemap, started: false, suspended: false, missed: false }
    }

    fn scan(
        &self, memory: &GuestMemory, found: impl Fn(usize, PageRange),
    ) -> Result<(), TrackingError> {
        for (index, block) in memory.blocks().iter().enumerate() {
            let id = block.geometry.id;
            let base = block.vmm_address;
            if base == 0 {
                return Err(TrackingError::NotMapped { id });
            }
            // Once this agent has protected pages again, no other agent can find their writes.
            memory.current.check()?;
            let scanned = self.pagemap.scan(base, block.geometry.length, |start, end| {
                let first = start.saturating_sub(base) >> PAGE_SHIFT;
                let last = end.saturating_sub(base) >> PAGE_SHIFT;
                found(index, PageRange::new(first, last.saturating_sub(first)));
            });
            scanned.map_err(|source| TrackingError::Scan { id, source })?;
        }
        Ok(())
    }
}

impl Tracker for ScanTracker {
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        // Set before the answer is known: a start that timed out may still happen.
        self.started = true;
        self.hooks.ask(&Hook::StartTracking { sources: Declared::WRITE_PROTECT }, self.timeout)?;
        // Protects what is mapped. The reported pages are older than the start.
        self.scan(memory, |_, _| {})
    }

    fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError> {
        if self.missed {
            for (index, block) in memory.blocks().iter().enumerate() {
                dirty.block(index).set(block.all());
            }
        }
        if self.suspended {
            return Ok(());
        }
        self.scan(memory, |index, range| {
            dirty.block(index).set(range);
        })?;
        self.missed = false;
        Ok(())
    }

    fn stop(&mut self) {
        let hook = Hook::StopTracking { sources: Declared::WRITE_PROTECT };
        if std::mem::take(&mut self.started)
            && let Err(error) = self.hooks.undo(&hook, self.timeout)
        {
            log::warn!("cannot unregister the VMM's mappings: {}", crate::error::chain(&error));
        }
    }

    fn suspend(&mut self) {
        self.suspended = true;
        self.missed = true;
    }

    fn has_missed_writes(&self) -> bool {
        self.missed
    }

    fn resume(&mut self) {
        self.suspended = false;
    }
}
