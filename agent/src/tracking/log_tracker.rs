// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty log that the VMM shares with its back-ends (`SET_LOG_BASE`).

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::memory::GuestMemory;
use crate::memory::chunks::Chunks;
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::Arc;
use std::time::Duration;

/// Pages of a chunk: 16 GiB. To harvest it takes at most a millisecond.
pub(crate) const CHUNK_PAGES: u64 = (16 << 30) / PAGE_SIZE;

/// The shared log. It is always on, because the VMM's devices and its other vhost-user back-ends
/// mark it.
pub struct LogTracker;

impl Tracker for LogTracker {
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        let log = memory.log.as_ref().ok_or(TrackingError::NoLog)?;
        let covered = log.log.pages();
        // Bits that are set now are older than the start.
        memory.blocks().iter().for_each(|block| {
            log.log.bits().clear(block.log_pages());
        });
        match memory.blocks().iter().find(|block| block.log_pages().end() > covered) {
            Some(block) => Err(TrackingError::ShortLog {
                covered,
                id: block.geometry.id,
                end: block.log_pages().end(),
            }),
            None => Ok(()),
        }
    }

    fn sync(
        &mut self, memory: &GuestMemory, dirty: &DirtyPages, threads: usize,
    ) -> Result<(), TrackingError> {
        let log = memory.log.as_ref().ok_or(TrackingError::NoLog)?;
        let log_pages = |at: usize, pages: PageRange| {
            let first = memory.blocks()[at].geometry.first_log_page();
            PageRange::new(first + pages.first, pages.count)
        };
        // A log in which nothing is set has no chunk, and costs next to nothing.
        let chunks = Chunks::new(memory, CHUNK_PAGES).only(|at, pages| {
            let pages_in_log = log_pages(at, pages);
            let found = log.log.bits().next_set(pages_in_log)?;
            Some(found - pages_in_log.first + pages.first)
        });
        memory.current.check()?;
        chunks.share(threads, |at, chunk| {
            // Once this agent has taken bits, no other agent can find them.
            memory.current.check()?;
            log.log.drain_into_part(log_pages(at, chunk), dirty.block(at), chunk.first);
            Ok::<(), TrackingError>(())
        })?;
        if log.was_lost() {
            return Err(TrackingError::Lost { what: "dirty log", state: "dirty" });
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

/// Tells a VMM whose writers all mark the log that a job is about to read memory. The VMM gives
/// back first what it has queued, which is then not read for nothing. The hooks of other trackers
/// do the same.
pub(super) struct LogStart {
    hooks: Arc<Hooks>,
    timeout: Duration,
}

impl LogStart {
    pub(super) fn new(hooks: Arc<Hooks>, timeout: Duration) -> Self {
        Self { hooks, timeout }
    }
}

impl Tracker for LogStart {
    fn start(&mut self, _memory: &GuestMemory) -> Result<(), TrackingError> {
        let hook = Hook::StartTracking { sources: Declared::LOG_IS_COMPLETE };
        Ok(self.hooks.ask(&hook, self.timeout)?)
    }

    fn sync(
        &mut self, _memory: &GuestMemory, _dirty: &DirtyPages, _threads: usize,
    ) -> Result<(), TrackingError> {
        Ok(())
    }

    fn stop(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::block::GuestLog;
    use crate::memory::test_support::{memfd, memory_with_log};
    use pageferry_protocol::shm::DirtyLog;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::os::fd::AsFd;

    proptest! {
        /// The blocks lie side by side, so that two of them share words of the log.
        #[test]
        fn threads_share_a_harvest(
            lengths in prop::collection::vec(1u64..300, 1..5),
            marked in prop::collection::btree_set(0u64..1500, 0..60),
            threads in 1usize..5,
        ) {
            let log = DirtyLog::map(memfd(PAGE_SIZE).as_fd(), 0, PAGE_SIZE).unwrap();
            let log = GuestLog::new(log);
            marked.iter().for_each(|page| log.log.mark(PageRange::new(*page, 1)));
            let memory = memory_with_log(&lengths, log);
            let dirty = DirtyPages::none(&memory).unwrap();
            LogTracker.sync(&memory, &dirty, threads).unwrap();
            let end: u64 = lengths.iter().sum();
            let mut found = BTreeSet::new();
            for (at, block) in memory.blocks().iter().enumerate() {
                let pages = dirty.block(at).runs(block.all()).flat_map(|run| run.first..run.end());
                found.extend(pages.map(|page| block.geometry.first_log_page() + page));
            }
            let expected: BTreeSet<u64> = marked.iter().copied().filter(|page| *page < end).collect();
            prop_assert_eq!(found, expected);
            let rest = memory.log.as_ref().unwrap().log.bits().count(PageRange::new(0, end));
            prop_assert_eq!(rest, 0);
        }
    }
}
