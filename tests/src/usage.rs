// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages may be written now, and what was written to them.
//!
//! Neither the guest nor a device writes to memory that the guest gave to the balloon. So every
//! write goes through [`Writer::touch`], which holds the fence for reading. The balloon takes pages
//! while it holds the fence for writing. When it then tells the agent of the discard, no writer can
//! still write to those pages.
//!
//! Every writer has a [`Ledger`]: a word of its own in every page, and the value that this word
//! must have. When a page is given up, all ledgers forget it, because its content is stale.

use crate::Error;
use crate::memory::TestMemory;
use pageferry_client::StatePiece;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::{MappedBitmap, MappedWords};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use vm_memory::{Bytes, GuestAddress};

/// Number of writers for which a page has room. Each has one word.
pub const SLOTS: u64 = PAGE_SIZE / 8;

/// The pages in use, and the ledgers of all writers.
#[derive(Debug)]
pub struct Usage {
    memory: Arc<TestMemory>,
    /// By block id: the pages that may be written.
    usable: BTreeMap<u32, MappedBitmap>,
    /// A writer holds it for reading while it looks up a page and writes it. The balloon holds it
    /// for writing while it takes pages.
    fence: RwLock<()>,
    ledgers: Mutex<Vec<Arc<Ledger>>>,
    /// Whether the VMM is paused. Then its state, which contains the pages in use, may already be
    /// saved.
    frozen: Mutex<bool>,
}

/// What one writer wrote: how often it wrote to each page. That count is also the value of its word
/// in the page.
#[derive(Debug)]
pub struct Ledger {
    name: String,
    slot: u64,
    /// By block id.
    counts: BTreeMap<u32, Counts>,
}

/// The counts of one block. Both fields take memory only for pages that were written.
#[derive(Debug)]
struct Counts {
    /// The pages whose word is known.
    known: MappedBitmap,
    words: MappedWords,
}

impl Counts {
    fn new(pages: u64) -> Result<Self, Error> {
        let known =
            MappedBitmap::private(pages).map_err(|error| Error::Memory(error.to_string()))?;
        let words =
            MappedWords::anonymous(pages).map_err(|error| Error::Memory(error.to_string()))?;
        Ok(Self { known, words })
    }

    /// The count of a page, or 0 if it is not known. `None` if there is no such page.
    fn get(&self, page: u64) -> Option<u64> {
        let word = self.words.get(usize::try_from(page).ok()?)?;
        Some(if self.known.contains(page) { word.load(Ordering::Relaxed) } else { 0 })
    }

    /// Sets the count of a page. False if there is no such page.
    fn set(&self, page: u64, count: u64) -> bool {
        let word = usize::try_from(page).ok().and_then(|page| self.words.get(page));
        if let Some(word) = word {
            word.store(count, Ordering::Relaxed);
            self.known.set(PageRange::new(page, 1));
        }
        word.is_some()
    }
}

/// How a writer reaches memory, and what reports its writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Stores through the mapping, like a vCPU. A tracker must find these writes.
    Mapping,
    /// Stores through the mapping, and marks the dirty log itself, because there is no other
    /// tracker.
    MappingAndLog,
    /// Writes through vm-memory, like an emulated device. Its bitmap marks the dirty log.
    VmMemory,
}

/// Writes one word per page, and keeps the ledger.
#[derive(Debug, Clone)]
pub struct Writer {
    usage: Arc<Usage>,
    ledger: Arc<Ledger>,
    path: Path,
}

impl Usage {
    /// All pages of `memory` may be written, except those of blocks that start discarded.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn new(memory: Arc<TestMemory>) -> Result<Arc<Self>, Error> {
        let mut usable = BTreeMap::new();
        for block in memory.blocks() {
            let bitmap = MappedBitmap::private(block.pages())
                .map_err(|error| Error::Memory(error.to_string()))?;
            if !block.layout().discarded {
                bitmap.set(bitmap.all());
            }
            usable.insert(block.id(), bitmap);
        }
        Ok(Arc::new(Self {
            memory,
            usable,
            fence: RwLock::new(()),
            ledgers: Mutex::default(),
            frozen: Mutex::default(),
        }))
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<TestMemory> {
        &self.memory
    }

    fn ledgers(&self) -> MutexGuard<'_, Vec<Arc<Ledger>>> {
        self.ledgers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of a block that may be written.
    ///
    /// # Errors
    /// If there is no such block.
    pub fn usable(&self, block: u32) -> Result<&MappedBitmap, Error> {
        self.usable.get(&block).ok_or(Error::NoBlock(block))
    }

    /// A writer with its own word in every page. `name` is the name of its ledger in the VMM's
    /// state.
    ///
    /// # Errors
    /// If the pages have no room for more writers.
    pub fn writer(self: &Arc<Self>, name: &str, path: Path) -> Result<Writer, Error> {
        let mut ledgers = self.ledgers();
        let slot = ledgers.len() as u64;
        if slot >= SLOTS {
            return Err(Error::Argument(format!("a page has room for {SLOTS} writers")));
        }
        let mut counts = BTreeMap::new();
        for block in self.memory.blocks() {
            counts.insert(block.id(), Counts::new(block.pages())?);
        }
        let ledger = Arc::new(Ledger { name: name.to_owned(), slot, counts });
        ledgers.push(ledger.clone());
        Ok(Writer { usage: self.clone(), ledger, path })
    }

    /// Changes which pages are in use. Returns `None` if the VMM is paused, because a balloon does
    /// not inflate then. A pause waits for a change that has begun.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn while_running<T>(
        &self, change: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        if *frozen { Ok(None) } else { change().map(Some) }
    }

    /// Says whether the VMM is paused.
    pub fn freeze(&self, frozen: bool) {
        *self.frozen.lock().unwrap_or_else(PoisonError::into_inner) = frozen;
    }

    /// When this returns, no writer writes to `pages` any more. The caller then discards them.
    ///
    /// # Errors
    /// If there is no such block.
    pub fn give_up(&self, block: u32, pages: PageRange) -> Result<(), Error> {
        let usable = self.usable(block)?;
        let _fence = self.fence.write().unwrap_or_else(PoisonError::into_inner);
        usable.clear(pages);
        for ledger in self.ledgers().iter() {
            ledger.forget(block, pages);
        }
        Ok(())
    }

    /// `pages` may be written again. Call this after the populate was acknowledged.
    ///
    /// # Errors
    /// If there is no such block.
    pub fn take_back(&self, block: u32, pages: PageRange) -> Result<(), Error> {
        self.usable(block)?.set(pages);
        Ok(())
    }

    /// The pages in use and all ledgers, as pieces of the VMM's state. No writer may write
    /// meanwhile.
    pub fn save(&self) -> Vec<StatePiece> {
        let unusable = self.usable.iter().flat_map(|(block, bitmap)| {
            clear_runs(bitmap).flat_map(move |run| [u64::from(*block), run.first, run.count])
        });
        let bytes = unusable.flat_map(u64::to_le_bytes).collect();
        let mut pieces = vec![StatePiece { name: "pages not in use".into(), bytes }];
        pieces.extend(self.ledgers().iter().map(|ledger| ledger.save()));
        pieces
    }

    /// Loads the pieces of [`Usage::save`], and ignores pieces with other names.
    ///
    /// # Errors
    /// If a piece is malformed, or names a block that is not here.
    pub fn load(&self, state: &[StatePiece]) -> Result<(), Error> {
        for piece in state {
            if piece.name == "pages not in use" {
                // Most pages are in use on both sides. A large bitmap that is right already is only
                // read.
                for bitmap in self.usable.values() {
                    for run in clear_runs(bitmap) {
                        bitmap.set(run);
                    }
                }
                for [block, first, count] in triples(piece)? {
                    self.usable(block_id(piece, block)?)?.clear(PageRange::new(first, count));
                }
            }
            if let Some(ledger) =
                self.ledgers().iter().find(|ledger| piece.name == ledger.piece_name())
            {
                ledger.load(piece)?;
            }
        }
        Ok(())
    }

    /// Compares every ledger with memory, which it reads with `pread`. No writer may write
    /// meanwhile. Returns the number of words that were compared.
    ///
    /// # Errors
    /// The first word that is wrong.
    pub fn check(&self) -> Result<u64, Error> {
        let ledgers = self.ledgers().clone();
        ledgers.iter().map(|ledger| ledger.check(&self.memory)).sum()
    }
}

impl Ledger {
    fn piece_name(&self) -> String {
        format!("ledger {}", self.name)
    }

    fn counts(&self, block: u32) -> Result<&Counts, Error> {
        self.counts.get(&block).ok_or(Error::NoBlock(block))
    }

    fn forget(&self, block: u32, pages: PageRange) {
        if let Some(counts) = self.counts.get(&block) {
            counts.known.clear(pages);
        }
    }

    /// Block, page and value of every word that is known.
    fn known(&self) -> impl Iterator<Item = (u32, u64, u64)> + '_ {
        self.counts.iter().flat_map(|(block, counts)| {
            let pages = counts.known.runs(counts.known.all()).flat_map(|run| run.first..run.end());
            pages.map(move |page| (*block, page, counts.get(page).unwrap_or(0)))
        })
    }

    /// The number of words that are known, and of writes to them.
    pub fn totals(&self) -> (u64, u64) {
        self.known().fold((0, 0), |(words, writes), (_, _, count)| (words + 1, writes + count))
    }

    fn save(&self) -> StatePiece {
        let words = self.known().flat_map(|(block, page, count)| [u64::from(block), page, count]);
        StatePiece { name: self.piece_name(), bytes: words.flat_map(u64::to_le_bytes).collect() }
    }

    fn load(&self, piece: &StatePiece) -> Result<(), Error> {
        for counts in self.counts.values() {
            counts.known.clear(counts.known.all());
        }
        for [block, page, value] in triples(piece)? {
            if !self.counts(block_id(piece, block)?)?.set(page, value) {
                let reason = format!("page {page:#x} of block {block} is not here");
                return Err(Error::State { name: piece.name.clone(), reason });
            }
        }
        Ok(())
    }

    fn check(&self, memory: &TestMemory) -> Result<u64, Error> {
        let mut checked = 0;
        for (block, page, count) in self.known() {
            let found = memory.block(block)?.read_word(page * PAGE_SIZE + self.slot * 8)?;
            if found != count {
                let name = &self.name;
                return Err(Error::Mismatch(format!(
                    "block {block}, page {page:#x}: {name} wrote {count} into it, and it holds {found}"
                )));
            }
            checked += 1;
        }
        Ok(checked)
    }
}

impl Writer {
    /// Adds 1 to the writer's word of the page, if the page may be written now. With one ledger,
    /// only one thread may write a given page.
    ///
    /// # Errors
    /// If the page does not exist.
    pub fn touch(&self, block: u32, page: u64) -> Result<bool, Error> {
        let usable = self.usage.usable(block)?;
        let _fence = self.usage.fence.read().unwrap_or_else(PoisonError::into_inner);
        if !usable.contains(page) {
            return Ok(false);
        }
        let counts = self.ledger.counts(block)?;
        let value = counts.get(page).unwrap_or(0) + 1;
        let offset = page * PAGE_SIZE + self.ledger.slot * 8;
        let memory = &self.usage.memory;
        let target = memory.block(block)?;
        match self.path {
            Path::Mapping => target.store(offset, value)?,
            Path::MappingAndLog => {
                target.store(offset, value)?;
                target.mark(PageRange::new(page, 1));
            }
            Path::VmMemory => memory
                .guest()
                .write_slice(&value.to_le_bytes(), GuestAddress(target.layout().gpa + offset))
                .map_err(|error| Error::Memory(error.to_string()))?,
        }
        counts.set(page, value);
        Ok(true)
    }

    /// What it wrote.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The pages in use.
    pub fn usage(&self) -> &Arc<Usage> {
        &self.usage
    }
}

/// The runs of clear pages, in order.
fn clear_runs(bitmap: &MappedBitmap) -> impl Iterator<Item = PageRange> + '_ {
    let pages = bitmap.pages();
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = bitmap.next_clear(PageRange::new(at, pages - at))?;
        at = bitmap.next_set(PageRange::new(first, pages - first)).unwrap_or(pages);
        Some(PageRange::new(first, at - first))
    })
}

fn triples(piece: &StatePiece) -> Result<impl Iterator<Item = [u64; 3]> + '_, Error> {
    let (triples, rest) = piece.bytes.as_chunks::<24>();
    if !rest.is_empty() {
        let reason = format!("{} bytes are no multiple of 24", piece.bytes.len());
        return Err(Error::State { name: piece.name.clone(), reason });
    }
    Ok(triples.iter().map(|bytes| {
        let (words, _) = bytes.as_chunks::<8>();
        [0, 1, 2].map(|index| words.get(index).map_or(0, |word| u64::from_le_bytes(*word)))
    }))
}

fn block_id(piece: &StatePiece, block: u64) -> Result<u32, Error> {
    u32::try_from(block).map_err(|_| Error::State {
        name: piece.name.clone(),
        reason: format!("block {block:#x} is not here"),
    })
}
