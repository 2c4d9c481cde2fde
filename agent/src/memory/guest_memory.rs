// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All blocks of a guest, and who is told of their discards.

use super::backing::BackingKind;
use super::block::{Block, GuestLog};
use super::copy_before_write::CopyBeforeWrite;
use super::current::CurrentAgent;
use super::error::MemoryError;
use super::fence::{MAX_READERS, Readers};
use super::marking::Marking;
use super::missing_pages::MissingPages;
use super::recorded_discards::RecordedDiscards;
use crate::lock::lock;
use pageferry_protocol::memory::{BlockTable, PageRange};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Is told which pages discards have freed.
pub trait DiscardObserver: std::fmt::Debug + Send + Sync {
    /// The pages `range` of the block at index `at` were freed. The discard, or the populate that
    /// follows it, is not acknowledged yet.
    fn on_freed(&self, at: usize, range: PageRange);
}

/// The guest's memory, as the VMM has set it up last. A job keeps the set with which it started,
/// and the set does not change while a job has it.
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
    /// The words that workers are reading.
    pub readers: Readers,
    /// Held while a discard or a populate sets its marks, and at the instant of a snapshot. A
    /// fix-up also holds it while it finds out whether a discarded page was written since, and
    /// marks it as stray: otherwise it could mark a page as stray that is discarded again in
    /// between.
    pub marking: Marking<CopyBeforeWrite>,
    order: Arc<ChangeOrder>,
    /// See [`GuestMemory::changes`].
    changes: AtomicU64,
    /// Is told which pages discards have freed.
    discard_observer: Mutex<Option<Arc<dyn DiscardObserver>>>,
    /// See [`super::recorded_discards`].
    recorded: Mutex<Option<Arc<RecordedDiscards>>>,
    /// The missing pages, while the guest runs without them.
    missing_pages: Mutex<Option<Arc<MissingPages>>>,
}

/// The order of those who change the memory: the VMM, the devices and the jobs. All sets of a
/// session share it, because a device may still have the set before the current one.
#[derive(Debug, Default)]
struct ChangeOrder {
    /// See [`GuestMemory::populating`].
    populating: Mutex<()>,
    /// See [`GuestMemory::placing`].
    placing: RwLock<()>,
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
            order: Arc::default(),
            changes: AtomicU64::new(0),
            discard_observer: Mutex::default(),
            recorded: Mutex::default(),
            missing_pages: Mutex::default(),
        }
    }

    /// A populate, and a device, hold this from before they check whether a job refuses them until
    /// their marks are set. A job that starts to refuse them locks it once, and so waits for the
    /// last of them. So does a request that takes memory away.
    pub fn populating(&self) -> MutexGuard<'_, ()> {
        lock(&self.order.populating)
    }

    /// True if nobody holds [`GuestMemory::populating`].
    #[cfg(test)]
    pub fn populating_is_free(&self) -> bool {
        self.order.populating.try_lock().is_ok()
    }

    /// This set takes the place of `before` in a session: the same agent acts for both, and they
    /// share the order of changes.
    #[must_use]
    pub fn following(mut self, before: &Self) -> Self {
        self.current = before.current.clone();
        self.order = before.order.clone();
        self
    }

    /// The same set, for a VMM that says in `current` which agent acts for it.
    #[must_use]
    pub fn owned_by(mut self, current: Arc<CurrentAgent>) -> Self {
        self.current = current;
        self
    }

    /// The missing pages, if the guest runs without them.
    pub fn missing_pages(&self) -> Option<Arc<MissingPages>> {
        lock(&self.missing_pages).clone()
    }

    /// From now on discards drop pages of `missing_pages`. `None` when no page is missing any more.
    pub fn set_missing_pages(&self, missing_pages: Option<Arc<MissingPages>>) {
        *lock(&self.missing_pages) = missing_pages;
    }

    /// Sets the observer of what discards have freed.
    pub fn set_discard_observer(&self, observer: Option<Arc<dyn DiscardObserver>>) {
        *lock(&self.discard_observer) = observer;
    }

    /// The observer of what discards have freed.
    pub(super) fn discard_observer(&self) -> Option<Arc<dyn DiscardObserver>> {
        lock(&self.discard_observer).clone()
    }

    /// Sets the record of discards. Call it with `marking` held.
    pub(super) fn set_recorded(&self, recorded: Option<Arc<RecordedDiscards>>) {
        *lock(&self.recorded) = recorded;
    }

    /// Removes this record, unless another one has taken its place.
    pub(super) fn clear_recorded(&self, recorded: &Arc<RecordedDiscards>) {
        lock(&self.recorded).take_if(|current| Arc::ptr_eq(current, recorded));
    }

    /// The record in which discards note their pages.
    pub(super) fn recorded(&self) -> Option<Arc<RecordedDiscards>> {
        lock(&self.recorded).clone()
    }

    /// Hold this while content from a peer is placed, from before the write until the pages are
    /// marked. No page is discarded or freed in between. So at the end the page either has the
    /// content, or is given back.
    pub fn placing(&self) -> RwLockReadGuard<'_, ()> {
        self.order.placing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while pages are discarded, freed or populated, or a device writes: no placing is
    /// between its write and its marks. The VMM and the devices come one after another.
    pub fn giving_back(&self) -> RwLockWriteGuard<'_, ()> {
        self.order.placing.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blocks in the order of their GPA, as in the table. The indexes of blocks in the fence
    /// and in images follow this order, and so do the workers' chunks.
    pub fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    /// Held while a discard or populate sets its marks.
    pub(super) fn change(&self) -> Change<'_> {
        // Before the first mark: a thread that sees a mark also sees this.
        self.changes.fetch_add(1, Ordering::AcqRel);
        Change { memory: self }
    }

    /// The counter of discards and populates. It is odd while one of them sets marks. A thread that
    /// has read it before it walked the bitmaps need not walk them again while
    /// [`GuestMemory::is_unchanged`] is true.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// True if no discard or populate has set a mark since [`GuestMemory::changes`] returned
    /// `since`.
    pub fn is_unchanged(&self, since: u64) -> bool {
        since.is_multiple_of(2) && self.changes() == since
    }

    /// Checks that a guest can come into this memory, page by page.
    ///
    /// # Errors
    /// Which block it cannot come into.
    pub fn check_writable(&self) -> Result<(), MemoryError> {
        if let Some(id) = self.clone_block() {
            return Err(MemoryError::Clone { id });
        }
        match self.blocks.iter().find(|block| !block.backing.is_writable()) {
            Some(block) => Err(MemoryError::Sealed { id: block.geometry.id }),
            None => Ok(()),
        }
    }

    /// The first block that is a clone's.
    pub fn clone_block(&self) -> Option<u32> {
        let mut blocks = self.blocks.iter();
        let clone = blocks.find(|block| block.backing.kind() == BackingKind::Clone);
        clone.map(|block| block.geometry.id)
    }

    /// The geometries of the blocks.
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

/// A discard or populate that sets its marks. Ends on drop. Only one exists at a time.
#[derive(Debug)]
pub(super) struct Change<'a> {
    memory: &'a GuestMemory,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.memory.changes.fetch_add(1, Ordering::AcqRel);
    }
}
