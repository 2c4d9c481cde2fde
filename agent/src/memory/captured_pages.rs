// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that were captured because the guest was about to write to them, and that are not in the
//! image yet.
//!
//! Most of them leave with the pages around them. The memory is divided into *pieces*, aligned
//! ranges that a worker saves at once. The worker that reads the rest of a piece adds the captured
//! pages to it, so the whole piece is one write. If the room becomes scarce before that, the
//! captured pages leave in batches of their own, in the order of the file.
//!
//! The room is bounded in bytes. Memory is allocated when a page needs it, and not before. If there
//! is no room, the thread that captures waits, and the guest waits with it.

use super::error::MemoryError;
use crate::lock::lock;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappingError;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How many pieces with captured pages are compared when a worker looks for the fullest.
const COMPARED: usize = 64;
/// Room is scarce if less than one part in so many is free.
const SCARCE: usize = 8;

/// A piece: the index of its block, and its number within the block.
pub type Piece = (usize, u64);

/// A captured host page and its bytes.
#[derive(Debug)]
pub struct CapturedPage {
    /// The index of its block.
    pub at: usize,
    /// Its pages.
    pub pages: PageRange,
    /// Their bytes.
    pub bytes: Box<[u8]>,
}

/// The captured pages of one snapshot.
#[derive(Debug)]
pub struct CapturedPages {
    /// The room in bytes.
    limit: usize,
    /// Pages of a piece.
    piece: u64,
    state: Mutex<State>,
    /// Room was given back to a thread that waits for it.
    room: Condvar,
    /// Room has become scarce, or no pages leave in batches any more.
    scarce: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The captured pages of each piece that has some.
    pieces: BTreeMap<Piece, Vec<CapturedPage>>,
    /// Bytes of the buffers that hold a page, or are about to.
    used: usize,
    /// Buffers that hold nothing. All have one size.
    spare: Vec<Box<[u8]>>,
    /// A thread waits for room.
    waiting: bool,
    /// The piece of the last page that was captured.
    last: Piece,
    /// The last piece whose pages left in a batch.
    left: Piece,
    /// No pages leave in batches any more.
    closed: bool,
}

impl State {
    #[cfg(test)]
    fn spare_bytes(&self) -> usize {
        self.spare.first().map_or(0, |bytes| bytes.len() * self.spare.len())
    }

    /// A buffer of `size` bytes; `None` if there is no room.
    fn buffer(&mut self, size: usize, limit: usize) -> Result<Option<Box<[u8]>>, MemoryError> {
        if self.used + size > limit {
            return Ok(None);
        }
        // Spare buffers of another size must not take the room.
        if self.spare.last().is_some_and(|bytes| bytes.len() != size) {
            self.spare.clear();
        }
        let bytes = self.spare.pop().map_or_else(|| allocate(size), Ok)?;
        self.used += size;
        Ok(Some(bytes))
    }

    fn give_back(&mut self, bytes: Box<[u8]>) {
        self.used -= bytes.len();
        if self.spare.last().is_none_or(|other| other.len() == bytes.len()) {
            self.spare.push(bytes);
        }
    }
}

fn allocate(size: usize) -> Result<Box<[u8]>, MemoryError> {
    let mut bytes = Vec::new();
    let failed = |_| MappingError::Kernel { length: size as u64, source: Errno::NOMEM };
    bytes.try_reserve_exact(size).map_err(failed)?;
    bytes.resize(size, 0);
    Ok(bytes.into_boxed_slice())
}

/// Room for one host page. Given back on drop, unless it holds a page by then.
#[derive(Debug)]
pub struct Room<'a> {
    of: &'a CapturedPages,
    bytes: Box<[u8]>,
}

impl Room<'_> {
    /// The buffer.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Keeps the captured pages `pages` of the block at index `at`, whose bytes are in the buffer.
    pub fn keep(mut self, at: usize, pages: PageRange) {
        let bytes = std::mem::take(&mut self.bytes);
        self.of.add(CapturedPage { at, pages, bytes });
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.of.give_back([std::mem::take(&mut self.bytes)]);
    }
}

/// Captured pages that leave, in the order of the file. Their room is given back on drop.
#[derive(Debug)]
pub struct Leaving<'a> {
    of: &'a CapturedPages,
    pages: Vec<CapturedPage>,
}

impl Leaving<'_> {
    /// The pages.
    pub fn pages(&self) -> &[CapturedPage] {
        &self.pages
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.of.give_back(self.pages.drain(..).map(|page| page.bytes));
    }
}

impl CapturedPages {
    /// Room for `limit` bytes of pages. A piece has `piece` pages.
    pub fn new(limit: usize, piece: u64) -> Self {
        Self { limit, piece, state: Mutex::default(), room: Condvar::new(), scarce: Condvar::new() }
    }

    /// Room for a host page of `size` bytes; `None` if there was none for `wait`.
    ///
    /// # Errors
    /// If the host has no memory for it.
    pub fn room(&self, size: usize, wait: Duration) -> Result<Option<Room<'_>>, MemoryError> {
        let mut state = lock(&self.state);
        let mut found = state.buffer(size, self.limit)?;
        if found.is_none() {
            state.waiting = true;
            self.scarce.notify_all();
            let full = |state: &mut State| state.used + size > self.limit;
            let waited = self.room.wait_timeout_while(state, wait, full);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.waiting = false;
            found = state.buffer(size, self.limit)?;
        }
        Ok(found.map(|bytes| Room { of: self, bytes }))
    }

    fn add(&self, page: CapturedPage) {
        let mut state = lock(&self.state);
        let piece = (page.at, page.pages.first / self.piece);
        state.last = piece;
        state.pieces.entry(piece).or_default().push(page);
        if self.is_scarce(&state) {
            drop(state);
            self.scarce.notify_all();
        }
    }

    fn is_scarce(&self, state: &State) -> bool {
        state.waiting || state.used > self.limit - self.limit / SCARCE
    }

    fn give_back(&self, buffers: impl IntoIterator<Item = Box<[u8]>>) {
        let mut state = lock(&self.state);
        buffers
            .into_iter()
            .filter(|bytes| !bytes.is_empty())
            .for_each(|bytes| state.give_back(bytes));
        if state.waiting {
            drop(state);
            self.room.notify_all();
        }
    }

    /// One of the pieces with the most captured pages, of those for which `may` is true. It looks
    /// at a few pieces from that of the last captured page on.
    pub fn fullest(&self, may: impl Fn(&Piece) -> bool) -> Option<Piece> {
        let state = lock(&self.state);
        let (before, after) = (state.pieces.range(..state.last), state.pieces.range(state.last..));
        let few = after.chain(before).filter(|(piece, _)| may(piece)).take(COMPARED);
        few.max_by_key(|(_, pages)| pages.len()).map(|(piece, _)| *piece)
    }

    /// Takes the captured pages of a piece.
    pub fn take(&self, piece: Piece) -> Leaving<'_> {
        let pages = lock(&self.state).pieces.remove(&piece).unwrap_or_default();
        self.leaving(pages)
    }

    /// Takes captured pages of about `bytes` bytes, of the pieces after those that the last call
    /// took.
    pub fn take_batch(&self, bytes: usize) -> Leaving<'_> {
        let mut state = lock(&self.state);
        self.take_from(&mut state, bytes)
    }

    /// The same as soon as room is scarce. `None` after [`CapturedPages::close`].
    pub fn take_scarce(&self, bytes: usize) -> Option<Leaving<'_>> {
        let wait = |state: &mut State| {
            !state.closed && (state.pieces.is_empty() || !self.is_scarce(state))
        };
        let state = self.scarce.wait_while(lock(&self.state), wait);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        (!state.closed).then(|| self.take_from(&mut state, bytes))
    }

    fn take_from(&self, state: &mut State, bytes: usize) -> Leaving<'_> {
        if state.pieces.range(state.left..).next().is_none() {
            state.left = Piece::default();
        }
        let (mut pages, mut taken) = (Vec::new(), 0);
        while let Some((&piece, of_piece)) = state.pieces.range(state.left..).next() {
            let size: usize = of_piece.iter().map(|page| page.bytes.len()).sum();
            if taken > 0 && taken + size > bytes {
                break;
            }
            taken += size;
            state.left = piece;
            pages.extend(state.pieces.remove(&piece).unwrap_or_default());
        }
        self.leaving(pages)
    }

    fn leaving(&self, mut pages: Vec<CapturedPage>) -> Leaving<'_> {
        pages.sort_unstable_by_key(|page| (page.at, page.pages.first));
        Leaving { of: self, pages }
    }

    /// No pages leave in batches any more: [`CapturedPages::take_scarce`] returns `None`.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.scarce.notify_all();
    }
}

#[cfg(test)]
mod tests;
