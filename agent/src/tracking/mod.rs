//! Who says which pages are dirty.
//!
//! - [`pagemap`]: write-protect scanning of the VMM's mapping, from this process;
//! - this file: the three trackers of the design behind one trait, and how they are asked together.
//!
//! The order of a sync matters: the hooks put KVM's bits into the shared log, so the log is drained
//! after them.

pub mod pagemap;

use crate::hooks::{HookError, Hooks};
use crate::job::Deadline;
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

    /// Adds those of `other`, which is of the same memory.
    pub fn merge(&self, other: &Self) {
        for (own, other) in self.blocks.iter().zip(&other.blocks) {
            for (word, bits) in other.nonzero_words(other.all()) {
                own.or_word(word, bits);
            }
        }
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(|bitmap| bitmap.count(bitmap.all())).sum()
    }
}

/// Why the dirty pages are not known.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// A hook of the VMM's tracker failed.
    #[error("the VMM's tracker")]
    Hook(#[from] HookError),
    /// The scan of a block failed.
    #[error("write-protect scan of block {id}")]
    Scan {
        /// The block.
        id: u32,
        /// What failed.
        #[source]
        source: pagemap::PagemapError,
    },
    /// A block is not mapped by the VMM, so it cannot be scanned.
    #[error("block {id} has no vmm_address, which write-protect scanning needs")]
    NotMapped {
        /// The block.
        id: u32,
    },
    /// There is no log.
    #[error("there is no dirty log: the VMM must set one (SET_LOG_BASE) before it migrates")]
    NoLog,
    /// The log ends before the guest's memory.
    #[error("the dirty log covers {covered:#x} pages, block {id} ends at guest page {end:#x}")]
    ShortLog {
        /// Pages that the log covers.
        covered: u64,
        /// The block.
        id: u32,
        /// First guest page after the block.
        end: u64,
    },
    /// The VMM has another agent, or none: the log and the protection are not this one's any more.
    #[error(transparent)]
    Replaced(#[from] Replaced),
    /// The file under the log, or under a discard bitmap, was truncated.
    #[error("the file under the {what} was truncated: what is {state} is unknown")]
    Lost {
        /// What was lost.
        what: &'static str,
        /// What is unknown now.
        state: &'static str,
    },
}

/// To be called before anything is done by what a walk over discard bitmaps found.
///
/// # Errors
/// If one of them was cut off.
pub fn check_discards(memory: &GuestMemory) -> Result<(), TrackingError> {
    if memory.blocks().iter().any(|block| block.lost_bitmap()) {
        return Err(TrackingError::Lost { what: "discard bitmap", state: "discarded" });
    }
    Ok(())
}

/// Something that reports dirty pages.
pub trait Tracker: Send {
    /// Starts to report the writes from now on.
    ///
    /// # Errors
    /// If it cannot.
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError>;

    /// Sets in `dirty` all pages written since the last time, and starts over.
    ///
    /// # Errors
    /// If it cannot; the job must not trust `dirty` any more.
    fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError>;

    /// Stops to report. Called on failure, too, and possibly without a start.
    fn stop(&mut self);

    /// From now on a background snapshot uses the VMM's mappings, and a tracker that needs them for
    /// itself sees nothing. Until it sees again, and at the first sync after that, it must report
    /// every page.
    fn suspend(&mut self) {}

    /// The mappings are free again.
    fn resume(&mut self) {}
}

/// Which trackers the VMM has declared, beside the shared log.
#[derive(Debug, Clone, Default)]
pub struct TrackerChoice {
    /// All of them; the empty set if it has not said yet who reports the guest's writes.
    pub declared: Declared,
    /// The pagemap that write-protect scanning goes by.
    pub pagemap: Option<Arc<Pagemap>>,
}

/// All trackers of a job.
pub struct Trackers {
    trackers: Vec<Box<dyn Tracker>>,
    lazy: Option<LazyClear>,
    /// What the scanning tracker scans.
    pagemap: Option<Arc<Pagemap>>,
}

impl Trackers {
    /// The trackers that `choice` names, and the shared log.
    /// A hook may take `timeout`, and no longer than until `stop`.
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

    /// One of a test, and no log.
    #[cfg(test)]
    pub(crate) fn one(tracker: impl Tracker + 'static) -> Self {
        Self { trackers: vec![Box::new(tracker)], lazy: None, pagemap: None }
    }

    /// Starts all of them.
    ///
    /// # Errors
    /// If one cannot start; call [`Trackers::stop`] even so.
    pub fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        memory.current.check()?;
        self.trackers.iter_mut().try_for_each(|tracker| tracker.start(memory))
    }

    /// Asks all of them.
    ///
    /// # Errors
    /// If one cannot tell.
    pub fn sync(&mut self, memory: &GuestMemory, dirty: &DirtyPages) -> Result<(), TrackingError> {
        self.trackers.iter_mut().try_for_each(|tracker| tracker.sync(memory, dirty))?;
        check_discards(memory)
    }

    /// Stops all of them.
    pub fn stop(&mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.stop());
    }

    /// A background snapshot is about to use the VMM's mappings: see [`Tracker::suspend`].
    pub fn suspend(&mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.suspend());
    }

    /// It does not any more.
    pub fn resume(&mut self) {
        self.trackers.iter_mut().for_each(|tracker| tracker.resume());
    }

    /// Those of the pages `pages` of word `word` of which a report may mean a neighbour:
    /// write-protect scanning counts all of a transparent huge page as written if any of it was.
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

    /// What must be cleared before pages are read, if a tracker's sync does not clear by itself.
    pub fn lazy_clear(&self) -> Option<&LazyClear> {
        self.lazy.as_ref()
    }
}

/// The shared log. It is always on: the VMM's devices, and its other vhost-user back-ends, mark it.
pub struct LogTracker;

impl Tracker for LogTracker {
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        let log = memory.log.as_ref().ok_or(TrackingError::NoLog)?;
        let covered = log.log.pages();
        // What is in it is older than the start.
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
            // What is taken here no other agent finds.
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

/// The VMM's own tracker: KVM's dirty log. A sync clears nothing there; see [`LazyClear`].
struct HookTracker {
    hooks: Arc<Hooks>,
    timeout: Duration,
    stop: Deadline,
    started: bool,
}

impl Tracker for HookTracker {
    fn start(&mut self, _memory: &GuestMemory) -> Result<(), TrackingError> {
        // Set before it is known: a start that timed out may still happen.
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
            log::warn!("the VMM's tracker stays on: {}", crate::error::chain(&error));
        }
    }
}

/// Write-protect scanning: each sync reports the written pages of the VMM's mapping and protects
/// them again.
///
/// The VMM registers its mappings when this starts. A mapping can be registered with one
/// userfaultfd only, so a background snapshot takes them over for its time. What is written then is
/// not seen by any scan, so all pages count as written.
struct ScanTracker {
    hooks: Arc<Hooks>,
    timeout: Duration,
    pagemap: Arc<Pagemap>,
    started: bool,
    /// A snapshot has the mappings.
    suspended: bool,
    /// A snapshot had them since the last sync.
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
            // Nor what is protected again here.
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
        // Set before it is known: a start that timed out may still happen.
        self.started = true;
        self.hooks.ask(&Hook::StartTracking { sources: Declared::WRITE_PROTECT }, self.timeout)?;
        // Protects what is mapped; what that reports is older than the start.
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
            log::warn!("the VMM's mappings stay registered: {}", crate::error::chain(&error));
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

/// Clears pages in a tracker whose sync does not (`clear-then-read`): a worker does so for a chunk
/// right before it first reads there.
///
/// Exactly the given pages are cleared and no more, so nothing is lost for their neighbours
/// (`round-safely`).
#[derive(Debug)]
pub struct LazyClear {
    hooks: Arc<Hooks>,
    timeout: Duration,
    stop: Deadline,
}

impl LazyClear {
    /// Clears those pages of `range`, in the block with this id, that are set in `bitmap`. `range`
    /// begins at a multiple of 64.
    ///
    /// # Errors
    /// If the VMM does not.
    pub fn clear(&self, id: u32, bitmap: &MappedBitmap, range: PageRange) -> Result<(), HookError> {
        let mut rest = range;
        // Trim what is not set at either end, so that a sparse chunk costs little.
        while let Some(first) = bitmap.next_set(rest) {
            let first = first / WORD_BITS * WORD_BITS;
            let part = PageRange::new(first, (range.end() - first).min(MAX_CLEAR_PAGES));
            let words = part.first / WORD_BITS..part.end().div_ceil(WORD_BITS);
            let mut bitmap: Vec<u64> = words.map(|word| bitmap.word(word)).collect();
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

    /// What a VMM that agrees to all is asked by `ask`.
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

    /// What a VMM is asked to clear: the pages, and the first and the number of words of each hook.
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
    fn the_tracker_of_a_vmm_is_started_asked_each_time_and_stopped_once() {
        let memory = memory(&[64]);
        let dirty = DirtyPages::none(&memory).unwrap();
        let asked = asked(|hooks| {
            let (timeout, stop) = (Duration::from_secs(60), Deadline::default());
            let mut tracker = HookTracker { hooks: hooks.clone(), timeout, stop, started: false };
            // It is not on.
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

    /// Only small pages may be mapped as a transparent huge page.
    #[test]
    fn of_host_pages_that_are_huge_by_themselves_no_report_is_vague() {
        let Some(pagemap) = Pagemap::own() else { return };
        let pagemap = Some(Arc::new(pagemap));
        let trackers = Trackers { trackers: Vec::new(), lazy: None, pagemap };
        let block = |huge: bool| {
            let length = 512 * PAGE_SIZE;
            let backing = Backing::new(memfd(length), 0, length).unwrap();
            let backing = if huge { backing.with_huge_pages(length) } else { backing };
            let (name, granularity) = ("ram".to_owned(), PAGE_SIZE);
            let geometry = BlockGeometry { id: 3, name, gpa: 0, length, granularity };
            // Where no process has anything: whoever asks about it fails.
            Block::new(geometry, backing, 1 << 63, None).unwrap()
        };
        assert_eq!(trackers.imprecise(&block(true), 1, u64::MAX).unwrap(), 0);
        assert_eq!(trackers.imprecise(&block(false), 1, 0).unwrap(), 0);
        let asked = trackers.imprecise(&block(false), 1, 1).unwrap_err();
        assert!(matches!(asked, TrackingError::Scan { id: 3, .. }), "{asked}");
    }

    /// `round-safely`: no page is cleared that is not given, and `clear-then-read`: none is left
    /// out.
    #[test]
    fn a_lazy_clear_asks_for_the_pages_that_are_set_and_no_others() {
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
            assert_eq!(too_long, None, "a VMM takes no more at once");
        }
        bitmap.set(all);
        let (found, hooks) = cleared(&bitmap, all);
        assert_eq!(found.len() as u64, pages);
        assert_eq!(hooks.len(), 4, "as few hooks as that takes");
    }

    #[test]
    fn a_lazy_clear_sends_no_more_than_what_lies_between_the_first_and_the_last_page() {
        let bitmap = MappedBitmap::private(1 << 16).unwrap();
        bitmap.set(PageRange::new(1000, 1));
        bitmap.set(PageRange::new(1100, 30));
        assert_eq!(cleared(&bitmap, PageRange::new(0, 1 << 16)).1, [(960, 3)]);
        assert_eq!(cleared(&bitmap, PageRange::new(1152, 1 << 15)).1, []);
    }
}
