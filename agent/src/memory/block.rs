//! A block with its bitmaps, and the set of them.

use super::backing::{Backing, BackingError};
use super::bus_guard::GuardedRange;
use super::copy_before_write::CopyBeforeWrite;
use super::current::CurrentAgent;
use super::fence::{MAX_READERS, Readers};
use super::marking::Marking;
use super::missing_pages::MissingPages;
use super::recorded_discards::RecordedDiscards;
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PageRange};
use pageferry_protocol::shm::{DirtyLog, MappedBitmap, MappingError};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A block of guest memory.
#[derive(Debug)]
pub struct Block {
    // Before the bitmap, so that it is dropped before it.
    guard: Option<GuardedRange>,
    /// Where it lies in the guest.
    pub geometry: BlockGeometry,
    /// The file that holds it.
    pub backing: Backing,
    /// Where the VMM has it mapped; 0 if nowhere.
    pub vmm_address: u64,
    /// One bit per discarded page. Shared with the VMM, which keeps it if this process dies.
    pub discarded: MappedBitmap,
    /// Discarded pages whose backing does not tell a stray write from what was there before: those
    /// that were discarded without being punched, since the last sync. See
    /// [`crate::outgoing::fixup`].
    pub unsettled: MappedBitmap,
    /// Discarded pages that the guest wrote into after the discard, as a sync found: they migrate
    /// all the same.
    pub stray: MappedBitmap,
    /// Pages that were freed, and that nobody has found written since. See [`super::freed`].
    pub(super) freed: MappedBitmap,
}

/// Why a block cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The memory.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The bitmap of discarded pages, or one of our own.
    #[error("discard bitmap")]
    Bitmap(#[from] MappingError),
}

impl Block {
    /// A block whose discard bitmap is `discarded`; `None` for a VMM that has none.
    ///
    /// # Errors
    /// If there is no memory for its bitmaps.
    pub fn new(
        geometry: BlockGeometry, backing: Backing, vmm_address: u64,
        discarded: Option<MappedBitmap>,
    ) -> Result<Self, BlockError> {
        let pages = geometry.pages();
        let guard = discarded.as_ref().map(|bitmap| GuardedRange::of(bitmap.storage()));
        let discarded = match discarded {
            Some(bitmap) => bitmap,
            None => MappedBitmap::private(pages)?,
        };
        let unsettled = MappedBitmap::private(pages)?;
        let stray = MappedBitmap::private(pages)?;
        let freed = MappedBitmap::private(pages)?;
        Ok(Self { guard, geometry, backing, vmm_address, discarded, unsettled, stray, freed })
    }

    /// All pages of the block.
    pub fn all(&self) -> PageRange {
        PageRange::new(0, self.geometry.pages())
    }

    /// What discards and populates are rounded to, in bytes: no less than a host page. A part of
    /// one cannot be freed, and a tracker that tells host pages could not tell a write beside it
    /// from a stray one into it.
    pub fn discard_unit(&self) -> u64 {
        self.geometry.granularity.max(self.backing.host_page_size())
    }

    /// The block's pages as guest physical pages: its part of the dirty log.
    pub fn log_pages(&self) -> PageRange {
        PageRange::new(self.geometry.first_log_page(), self.geometry.pages())
    }

    /// True if the file under the discard bitmap was truncated: what is discarded is then unknown.
    pub fn lost_bitmap(&self) -> bool {
        self.guard.as_ref().is_some_and(GuardedRange::was_lost)
    }
}

/// The dirty log, guarded against a file that shrinks.
#[derive(Debug)]
pub struct GuestLog {
    // Before the log, so that it is dropped before it.
    guard: GuardedRange,
    /// The log.
    pub log: DirtyLog,
}

impl GuestLog {
    /// Guards `log`.
    pub fn new(log: DirtyLog) -> Self {
        let guard = GuardedRange::of(log.bits().storage());
        Self { guard, log }
    }

    /// True if the file under the log was truncated: what is dirty is then unknown.
    pub fn was_lost(&self) -> bool {
        self.guard.was_lost()
    }
}

/// Hears of what discards have freed.
pub trait DiscardObserver: std::fmt::Debug + Send + Sync {
    /// The pages `range` of the block at index `at` were freed, and the discard, or the populate
    /// after it, is not acknowledged yet.
    fn on_freed(&self, at: usize, range: PageRange);
}

/// The memory of a guest at one moment. A job holds on to the set it started with, and the set is
/// not changed while one does.
#[derive(Debug)]
pub struct GuestMemory {
    blocks: Vec<Arc<Block>>,
    /// Id and index of each block, sorted by id.
    by_id: Vec<(u32, usize)>,
    table: BlockTable,
    /// The dirty log, if the VMM set one.
    pub log: Option<Arc<GuestLog>>,
    /// Whether this agent may still act on this memory. Shared by all sets of one session.
    pub current: Arc<CurrentAgent>,
    /// Who is reading what.
    pub readers: Readers,
    /// Held while a discard or a populate marks, at the instant of a snapshot, and while a fix-up
    /// looks whether a discarded page was written since and marks it as stray: or it would mark
    /// what was discarded again meanwhile.
    pub marking: Marking<CopyBeforeWrite>,
    /// See [`GuestMemory::populating`].
    populating: Mutex<()>,
    /// See [`GuestMemory::changes`].
    changes: AtomicU64,
    /// Hears of what discards have freed.
    discard_observer: Mutex<Option<Arc<dyn DiscardObserver>>>,
    /// See [`super::recorded_discards`].
    recorded: Mutex<Option<Arc<RecordedDiscards>>>,
    /// See [`GuestMemory::placing`].
    placing: RwLock<()>,
    /// What is still to come, while the guest runs before it is here.
    missing_pages: Mutex<Option<Arc<MissingPages>>>,
}

impl Default for GuestMemory {
    fn default() -> Self {
        Self::new(Vec::new(), BlockTable::new(), None)
    }
}

impl GuestMemory {
    /// The set of `blocks`, whose geometries are those of `table`.
    pub fn new(mut blocks: Vec<Arc<Block>>, table: BlockTable, log: Option<Arc<GuestLog>>) -> Self {
        blocks.sort_by_key(|block| block.geometry.gpa);
        let mut by_id: Vec<(u32, usize)> =
            blocks.iter().map(|block| block.geometry.id).zip(0..).collect();
        by_id.sort_unstable();
        Self {
            blocks,
            by_id,
            table,
            log,
            current: Arc::default(),
            readers: Readers::new(MAX_READERS),
            marking: Marking::default(),
            populating: Mutex::default(),
            changes: AtomicU64::new(0),
            discard_observer: Mutex::default(),
            recorded: Mutex::default(),
            placing: RwLock::default(),
            missing_pages: Mutex::default(),
        }
    }

    /// Held by a populate from before it looks whether a job refuses it until its marks are set. A
    /// job that refuses populates from now on takes it once, and so waits for the last of them.
    pub fn populating(&self) -> MutexGuard<'_, ()> {
        self.populating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same set, of a VMM that says in `current` which agent acts for it.
    #[must_use]
    pub fn owned_by(mut self, current: Arc<CurrentAgent>) -> Self {
        self.current = current;
        self
    }

    /// What is still to come, if the guest runs before it is here.
    pub fn missing_pages(&self) -> Option<Arc<MissingPages>> {
        self.missing_pages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on discards drop what is still to come of `missing_pages`; `None` when all is here.
    pub fn set_missing_pages(&self, missing_pages: Option<Arc<MissingPages>>) {
        *self.missing_pages.lock().unwrap_or_else(PoisonError::into_inner) = missing_pages;
    }

    /// Who hears from now on of what discards have freed.
    pub fn set_discard_observer(&self, freed: Option<Arc<dyn DiscardObserver>>) {
        *self.discard_observer.lock().unwrap_or_else(PoisonError::into_inner) = freed;
    }

    /// Who hears of what discards have freed.
    pub(super) fn discard_observer(&self) -> Option<Arc<dyn DiscardObserver>> {
        self.discard_observer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who notes what is given back, from now on. To be called with `marking` held.
    pub(super) fn set_recorded(&self, noted: Option<Arc<RecordedDiscards>>) {
        *self.recorded.lock().unwrap_or_else(PoisonError::into_inner) = noted;
    }

    /// Nobody looks at `noted` any more. Somebody else may listen since.
    pub(super) fn clear_recorded(&self, noted: &Arc<RecordedDiscards>) {
        self.recorded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take_if(|current| Arc::ptr_eq(current, noted));
    }

    /// Where discards note what they mark.
    pub(super) fn recorded(&self) -> Option<Arc<RecordedDiscards>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// To be held while content that a peer sent is put into the files, from before the write until
    /// its pages are marked: no page is discarded or freed in between. The page is either what
    /// came, or given back.
    pub fn placing(&self) -> RwLockReadGuard<'_, ()> {
        self.placing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held while pages are given back: nothing that came is between its write and its marks.
    pub fn giving_back(&self) -> RwLockWriteGuard<'_, ()> {
        self.placing.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blocks, in order of their GPA, as in the table. Their order is that of the workers'
    /// chunks, of the fence, and of images.
    pub fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    /// To be held while a discard or populate sets its marks.
    pub(super) fn change(&self) -> Change<'_> {
        // Before the first mark: who sees one sees this, too.
        self.changes.fetch_add(1, Ordering::AcqRel);
        Change { memory: self }
    }

    /// How far the discards and populates have come: odd while one is under way. Who has walked the
    /// bitmaps and asked before that need not walk again while [`GuestMemory::is_unchanged`].
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// True if no discard or populate has set a mark since [`GuestMemory::changes`] was `since`.
    pub fn is_unchanged(&self, since: u64) -> bool {
        since.is_multiple_of(2) && self.changes() == since
    }

    /// The geometries.
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// The block whose memory is the file at `path`, if there is one.
    pub fn block_of_file(&self, path: &Path) -> Option<u32> {
        let found = rustix::fs::stat(path).ok()?;
        let is_it = |block: &&Arc<Block>| {
            let stat = rustix::fs::fstat(block.backing.fd());
            stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (found.st_dev, found.st_ino))
        };
        self.blocks.iter().find(is_it).map(|block| block.geometry.id)
    }

    /// The block with this id, and its index.
    pub fn find(&self, id: u32) -> Option<(usize, &Block)> {
        let at = self.by_id.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let (_, index) = self.by_id[at];
        Some((index, &self.blocks[index]))
    }
}

/// A discard or populate that is under way; over on drop. They come one at a time.
#[derive(Debug)]
pub(super) struct Change<'a> {
    memory: &'a GuestMemory,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.memory.changes.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memfd;
    use pageferry_protocol::memory::PAGE_SIZE;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_discarded_is_lost_when_the_file_of_its_bitmap_is_cut_off() {
        let length = 8 * PAGE_SIZE * PAGE_SIZE;
        let (ram, bits) = (memfd(length), memfd(PAGE_SIZE));
        let (name, granularity) = ("ram".to_owned(), PAGE_SIZE);
        let geometry = BlockGeometry { id: 1, name, gpa: 0, length, granularity };
        let pages = geometry.pages();
        let bitmap = MappedBitmap::shared(bits.as_fd(), pages).unwrap();
        let backing = Backing::new(ram, 0, length).unwrap();
        let block = Block::new(geometry, backing, 0, Some(bitmap)).unwrap();
        block.discarded.set(block.all());
        assert!(!block.lost_bitmap());
        rustix::fs::ftruncate(&bits, 0).unwrap();
        assert_eq!(block.discarded.count(block.all()), 0);
        assert!(block.lost_bitmap());
    }
}
