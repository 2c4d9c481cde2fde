// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty tracking: which pages the guest has written.
//!
//! - [`checkpoint`]: what is known about changes since the last image;
//! - [`pagemap`]: write-protect scanning of the VMM's mapping, from this process;
//! - this file: the three trackers behind one trait, and how a job asks them together.
//!
//! The order within a sync matters: the hooks of the VMM put KVM's bits into the shared log, so the
//! log is drained last.

pub mod checkpoint;
pub mod pagemap;

use crate::hooks::{HookError, Hooks};
use crate::job::Deadline;
use crate::memory::host_page_set::words_of;
use crate::memory::{Block, GuestMemory};
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::{Hook, MAX_CLEAR_PAGES};
use pageferry_protocol::memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use pageferry_protocol::shm::fence::Replaced;
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use pagemap::Pagemap;
use std::sync::Arc;
use std::time::Duration;

/// The dirty pages of all blocks, in the order of the memory's blocks.
#[derive(Debug, Default)]
pub struct DirtyPages {
    blocks: Vec<MappedBitmap>,
}

impl DirtyPages {
    /// No dirty page in any block of `memory`.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn none(memory: &GuestMemory) -> Result<Self, MappingError> {
        let bitmap = |block: &Arc<Block>| MappedBitmap::private(block.geometry.pages());
        Ok(Self { blocks: memory.blocks().iter().map(bitmap).collect::<Result<_, _>>()? })
    }

    /// The bitmap of the block at `index`.
    pub fn block(&self, index: usize) -> &MappedBitmap {
        &self.blocks[index]
    }

    /// The bitmaps of all blocks.
    pub fn all(&self) -> &[MappedBitmap] {
        &self.blocks
    }

    /// Adds the dirty pages of `other`, which belongs to the same memory.
    pub fn merge(&self, other: &Self) {
        for (own, other) in self.blocks.iter().zip(&other.blocks) {
            for (word, bits) in other.nonzero_words(other.all()) {
                own.or_word(word, bits);
            }
        }
    }

    /// The number of dirty pages.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(|bitmap| bitmap.count(bitmap.all())).sum()
    }
}

/// Why it is not known which pages are dirty.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// A hook of the VMM's tracker failed.
    #[error("the VMM's tracker failed")]
    Hook(#[from] HookError),
    /// The scan of a block failed.
    #[error("the write-protect scan of block {id} failed")]
    Scan {
        /// The block.
        id: u32,
        /// The cause.
        #[source]
        source: pagemap::PagemapError,
    },
    /// A block is not mapped by the VMM, so it cannot be scanned.
    #[error("block {id} has no vmm_address, which write-protect scanning needs")]
    NotMapped {
        /// The block.
        id: u32,
    },
    /// The VMM has not set a dirty log.
    #[error("there is no dirty log: the VMM must set one (SET_LOG_BASE) before it migrates")]
    NoLog,
    /// The log ends before the guest's memory.
    #[error("the dirty log covers {covered:#x} pages, but block {id} ends at guest page {end:#x}")]
    ShortLog {
        /// Pages that the log covers.
        covered: u64,
        /// The block.
        id: u32,
        /// First guest page after the block.
        end: u64,
    },
    /// The VMM has given this agent up, so the log and the protection belong to another agent, or
    /// to none.
    #[error(transparent)]
    Replaced(#[from] Replaced),
    /// The file under the log, or under a discard bitmap, was truncated.
    #[error("the file under the {what} was truncated: it is unknown which pages are {state}")]
    Lost {
        /// The file that was truncated.
        what: &'static str,
        /// The set of pages that is now unknown.
        state: &'static str,
    },
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

/// A source of dirty pages.
pub trait Tracker: Send {
    /// Starts to report writes.
    ///
    /// # Errors
    /// If the tracker cannot start.
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError>;

    /// Sets all pages in `dirty` that were written since the last sync, or since the start.
    ///
    /// # Errors
    /// If the tracker cannot report. The job must not trust `dirty` any more.
    fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError>;

    /// Stops to report. Also called after a failure, and possibly without a start.
    fn stop(&mut self);

    /// A background snapshot uses the VMM's mappings from now on. A tracker that needs them sees no
    /// writes until [`Tracker::resume`], so it must report every page at each sync until then, and
    /// at the first sync after it.
    fn suspend(&mut self) {}

    /// The snapshot does not use the mappings any more.
    fn resume(&mut self) {}
}

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
            trackers.push(Box::new(HookTracker {
                hooks: hooks.clone(),
                timeout,
                stop: stop.clone(),
                started: false,
            }));
        }
        if let Some(pagemap) = &choice.pagemap {
            let (hooks, pagemap) = (hooks.clone(), pagemap.clone());
            trackers.push(Box::new(ScanTracker::new(hooks, timeout, pagemap)));
        }
        trackers.push(Box::new(LogTracker));
        let lazy =
            by_hooks.then(|| LazyClear { hooks: hooks.clone(), timeout, stop: stop.clone() });
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

    /// Syncs all trackers into `dirty`.
    ///
    /// # Errors
    /// If one cannot report, or a discard bitmap was lost.
    pub fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError> {
        self.trackers.iter_mut().try_for_each(|tracker| tracker.sync(memory, dirty))?;
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

    fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError> {
        let log = memory.log.as_ref().ok_or(TrackingError::NoLog)?;
        for (index, block) in memory.blocks().iter().enumerate() {
            // Once this agent has taken bits, no other agent can find them.
            memory.current.check()?;
            log.log.drain_into(block.log_pages(), dirty.block(index));
        }
        if log.was_lost() {
            return Err(TrackingError::Lost { what: "dirty log", state: "dirty" });
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

/// The VMM's own tracker, such as KVM's dirty log. A sync clears nothing there. See [`LazyClear`].
struct HookTracker {
    hooks: Arc<Hooks>,
    timeout: Duration,
    stop: Deadline,
    started: bool,
}

impl Tracker for HookTracker {
    fn start(&mut self, _memory: &GuestMemory) -> Result<(), TrackingError> {
        // Set before the answer is known: a start that timed out may still happen.
        self.started = true;
        Ok(self.hooks.ask(&Hook::StartTracking { sources: Declared::HOOKS }, self.timeout)?)
    }

    fn sync(&mut self, _memory: &GuestMemory, _dirty: &DirtyPages) -> Result<(), TrackingError> {
        Ok(self.hooks.ask(&Hook::SyncTracker, self.stop.cap_timeout(self.timeout))?)
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.started)
            && let Err(error) =
                self.hooks.undo(&Hook::StopTracking { sources: Declared::HOOKS }, self.timeout)
        {
            log::warn!("cannot stop the VMM's tracker: {}", crate::error::chain(&error));
        }
    }
}

/// Write-protect scanning. Each sync reports the pages of the VMM's mapping that were written, and
/// protects them again.
///
/// The VMM registers its mappings when this tracker starts. A mapping can be registered with only
/// one userfaultfd, so a background snapshot takes the mappings over while it runs. A scan sees no
/// write of that time, so all pages count as written.
struct ScanTracker {
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
    fn new(hooks: Arc<Hooks>, timeout: Duration, pagemap: Arc<Pagemap>) -> Self {
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

    fn resume(&mut self) {
        self.suspended = false;
    }
}

/// Clears pages in a tracker whose sync does not clear them. A worker calls this for a chunk right
/// before it reads there for the first time (`clear-then-read`).
///
/// Exactly the given pages are cleared and no others, so no write to a neighbour is lost
/// (`round-safely`).
#[derive(Debug)]
pub struct LazyClear {
    hooks: Arc<Hooks>,
    timeout: Duration,
    stop: Deadline,
}

impl LazyClear {
    /// Clears those pages of `range` that are set in `bitmap`, in the block with this id. `range`
    /// begins at a multiple of 64.
    ///
    /// # Errors
    /// If the VMM does not clear them.
    pub fn clear(&self, id: u32, bitmap: &MappedBitmap, range: PageRange) -> Result<(), HookError> {
        let mut rest = range;
        // Skips clear words at both ends, so that a sparse chunk costs little.
        while let Some(first) = bitmap.next_set(rest) {
            let first = first / WORD_BITS * WORD_BITS;
            let part = PageRange::new(first, (range.end() - first).min(MAX_CLEAR_PAGES));
            let mut bitmap: Vec<u64> = words_of(part).map(|(word, _)| bitmap.word(word)).collect();
            bitmap.truncate(bitmap.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
            let timeout = self.stop.cap_timeout(self.timeout);
            self.hooks.ask(&Hook::ClearTracker { block: id, first, bitmap }, timeout)?;
            rest = PageRange::new(part.end(), range.end().saturating_sub(part.end()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use crate::memory::test_support::{memfd, memory};
    use pageferry_protocol::control::FrameSocket;
    use pageferry_protocol::control::frame::{FLAG_REPLY, Frame};
    use pageferry_protocol::control::hook_reply::encode_hook_reply;
    use pageferry_protocol::memory::BlockGeometry;
    use std::collections::BTreeSet;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    /// The hooks that `ask` sends to a VMM that agrees to everything.
    fn asked(ask: impl FnOnce(&Arc<Hooks>)) -> Vec<Hook> {
        let far = || Instant::now() + Duration::from_secs(60);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let vmm = std::thread::spawn(move || {
            let mut socket = FrameSocket::from(OwnedFd::from(theirs));
            let mut asked = Vec::new();
            while let Ok(Frame { request, body, .. }) = socket.recv(far()) {
                let (sequence, hook) = Hook::decode(request, &body).unwrap().unwrap();
                asked.push(hook);
                let reply = encode_hook_reply(sequence, &Ok(()));
                socket.send_parts(request, FLAG_REPLY, &reply, &[], far()).unwrap();
            }
            asked
        });
        let hooks = Arc::new(Hooks::new(Some(ours.into())));
        ask(&hooks);
        drop(hooks);
        vmm.join().unwrap()
    }

    /// What a clear asks the VMM: the pages, and the first page and the number of words of each
    /// hook.
    fn cleared(bitmap: &MappedBitmap, range: PageRange) -> (BTreeSet<u64>, Vec<(u64, usize)>) {
        let asked = asked(|hooks| {
            let (timeout, stop) = (Duration::from_secs(60), Deadline::default());
            let clear = LazyClear { hooks: hooks.clone(), timeout, stop };
            clear.clear(5, bitmap, range).unwrap();
        });
        let (mut pages, mut hooks) = (BTreeSet::new(), Vec::new());
        for hook in asked {
            let Hook::ClearTracker { block: 5, first, bitmap } = hook else { panic!("{hook:?}") };
            let set = |bit: &u64| bitmap[(bit / WORD_BITS) as usize] >> (bit % WORD_BITS) & 1 == 1;
            pages.extend((0..bitmap.len() as u64 * WORD_BITS).filter(set).map(|bit| first + bit));
            hooks.push((first, bitmap.len()));
        }
        (pages, hooks)
    }

    #[test]
    fn hook_tracker_starts_syncs_and_stops_once() {
        let memory = memory(&[64]);
        let dirty = DirtyPages::none(&memory).unwrap();
        let asked = asked(|hooks| {
            let (timeout, stop) = (Duration::from_secs(60), Deadline::default());
            let mut tracker = HookTracker { hooks: hooks.clone(), timeout, stop, started: false };
            // The tracker is not on yet.
            tracker.stop();
            tracker.start(&memory).unwrap();
            (0..2).for_each(|_| tracker.sync(&memory, &dirty).unwrap());
            (0..2).for_each(|_| tracker.stop());
        });
        let sources = Declared::HOOKS;
        let expected = [
            Hook::StartTracking { sources },
            Hook::SyncTracker,
            Hook::SyncTracker,
            Hook::StopTracking { sources },
        ];
        assert_eq!(asked, expected);
    }

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

    /// No page is cleared that is not set in the bitmap (`round-safely`), and no page that is set
    /// is left out (`clear-then-read`).
    #[test]
    fn lazy_clear_clears_exactly_the_set_pages() {
        let pages = 3 * MAX_CLEAR_PAGES + 200;
        let all = PageRange::new(0, pages);
        let sparse = [
            0,
            63,
            64,
            130,
            MAX_CLEAR_PAGES - 1,
            MAX_CLEAR_PAGES,
            2 * MAX_CLEAR_PAGES + 5,
            pages - 1,
        ];
        let ranges = [
            all,
            PageRange::new(64, 64),
            PageRange::new(64, MAX_CLEAR_PAGES),
            PageRange::new(128, 2 * MAX_CLEAR_PAGES),
            PageRange::new(MAX_CLEAR_PAGES, pages - MAX_CLEAR_PAGES),
            PageRange::new(256, 1024),
        ];
        let bitmap = MappedBitmap::private(pages).unwrap();
        sparse.iter().for_each(|page| _ = bitmap.set(PageRange::new(*page, 1)));
        for range in ranges {
            let (found, hooks) = cleared(&bitmap, range);
            let expected =
                sparse.iter().copied().filter(|page| (range.first..range.end()).contains(page));
            assert_eq!(found, expected.collect(), "{range:?}");
            let too_long =
                hooks.iter().find(|(_, words)| *words as u64 * WORD_BITS > MAX_CLEAR_PAGES);
            assert_eq!(too_long, None, "a VMM accepts no more pages in one hook");
        }
        bitmap.set(all);
        let (found, hooks) = cleared(&bitmap, all);
        assert_eq!(found.len() as u64, pages);
        assert_eq!(hooks.len(), 4, "no more hooks than needed");
    }

    #[test]
    fn lazy_clear_skips_clear_words_at_both_ends() {
        let bitmap = MappedBitmap::private(1 << 16).unwrap();
        bitmap.set(PageRange::new(1000, 1));
        bitmap.set(PageRange::new(1100, 30));
        assert_eq!(cleared(&bitmap, PageRange::new(0, 1 << 16)).1, [(960, 3)]);
        assert_eq!(cleared(&bitmap, PageRange::new(1152, 1 << 15)).1, []);
    }
}
