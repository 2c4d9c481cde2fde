// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write-protect scanning of the VMM's mappings as a tracker. [`super::pagemap`] has the scan.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::pagemap::Pagemap;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::memory::GuestMemory;
use crate::memory::chunks::Chunks;
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};
use std::sync::Arc;
use std::time::Duration;

/// Pages of a chunk of a scan: 256 MiB. To scan it takes 0.1 ms if nothing was written, and about
/// 2 ms if all was, so it is worth a thread.
const CHUNK_PAGES: u64 = (256 << 20) / PAGE_SIZE;

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

    /// Scans all mappings by up to `threads` threads.
    fn scan(
        &self, memory: &GuestMemory, threads: usize, found: impl Fn(usize, PageRange) + Sync,
    ) -> Result<(), TrackingError> {
        // The kernel cannot protect a part of a host page.
        let chunks = Chunks::new(memory, CHUNK_PAGES).of_whole_host_pages();
        chunks.share(threads, |at, chunk| {
            let block = &memory.blocks()[at];
            let id = block.geometry.id;
            if block.vmm_address == 0 {
                return Err(TrackingError::NotMapped { id });
            }
            // Once this agent has protected pages again, no other agent can find their writes.
            memory.current.check()?;
            let base = block.vmm_address.saturating_add(chunk.offset());
            let scanned = self.pagemap.scan(base, chunk.bytes(), |start, end| {
                let first = start.saturating_sub(base) >> PAGE_SHIFT;
                let last = end.saturating_sub(base) >> PAGE_SHIFT;
                found(at, PageRange::new(chunk.first + first, last.saturating_sub(first)));
            });
            scanned.map_err(|source| TrackingError::Scan { id, source })
        })
    }
}

impl Tracker for ScanTracker {
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        // Set before the answer is known: a start that timed out may still happen.
        self.started = true;
        self.hooks.ask(&Hook::StartTracking { sources: Declared::WRITE_PROTECT }, self.timeout)?;
        // Protects what is mapped. The reported pages are older than the start.
        self.scan(memory, 1, |_, _| {})
    }

    fn sync(
        &mut self, memory: &GuestMemory, dirty: &DirtyPages, threads: usize,
    ) -> Result<(), TrackingError> {
        if self.missed {
            for (index, block) in memory.blocks().iter().enumerate() {
                dirty.block(index).set(block.all());
            }
        }
        if self.suspended {
            return Ok(());
        }
        self.scan(memory, threads, |index, range| {
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
