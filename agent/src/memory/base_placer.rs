// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Puts pages of an image into the base of its clones.
//!
//! Several agents fill a base. A page appears at once and whole (`UFFDIO_COPY` into a mapping of
//! this agent), and then its bit of the *filled* pages is set, which all agents of the base share.
//! Only the bit says that the base has the page. A VMM that touches its mapping before it is
//! registered makes a page of zeroes in the base. Such a page has no bit, and no guest sees it:
//! until the base is complete, a touch of any page of the base is a fault, which an agent answers
//! with pages that are filled. It writes the content over such a page.
//!
//! If there is no room for a page in the base, the clone gets a page of its own.
//!
//! Before an agent reads much, it locks the piece and looks what the base has already, so that each
//! page is read once.

use super::backing::{Backing, BackingError};
use super::file_placer::FilePlacer;
use super::mapped_areas::MappedAreas;
use crate::piece_locks::PieceLocks;
use pageferry_protocol::control::clones::BaseBlock;
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::{Bitmap, MappedWords, MappingError, bitmap_bytes};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long an agent waits for another one that reads a piece. It may hang: then the piece is read
/// twice.
const PATIENCE: Duration = Duration::from_secs(1);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// A block of a base.
#[derive(Debug)]
pub struct BasePlacer {
    file: Backing,
    placer: FilePlacer,
    filled: Bitmap<MappedWords>,
    locks: Arc<PieceLocks>,
    first_piece: u64,
    /// There was no room for a page, and the log says so.
    is_full: AtomicBool,
}

/// A piece that no other agent reads, or that one has read for too long.
#[derive(Debug)]
pub struct Reading<'a> {
    locks: &'a PieceLocks,
    piece: u64,
    locked: bool,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if self.locked {
            self.locks.unlock(self.piece);
        }
    }
}

impl BasePlacer {
    /// The block `block` of the base `file`, whose bitmap of filled pages is at byte `filled`.
    ///
    /// # Errors
    /// If the file cannot be mapped.
    pub fn new(
        file: OwnedFd, (block, filled): (BaseBlock, u64), areas: &Arc<MappedAreas>,
        locks: &Arc<PieceLocks>,
    ) -> Result<Self, BackingError> {
        let pages = block.length / PAGE_SIZE;
        let filled = MappedWords::shared(file.as_fd(), filled, bitmap_bytes(pages));
        let filled = Bitmap::new(filled.map_err(mapped)?, pages);
        let file = Backing::new(file, block.offset, block.length)?;
        let placer = FilePlacer::new(&file, areas)?;
        let (locks, first_piece) = (locks.clone(), block.offset / EXTENT_SIZE);
        Ok(Self { file, placer, filled, locks, first_piece, is_full: AtomicBool::new(false) })
    }

    /// The pages that the base has.
    pub fn filled(&self) -> &Bitmap<MappedWords> {
        &self.filled
    }

    /// Puts pages into the base, except those that it has. Returns how many of them, from the
    /// first, the base has now: fewer than all if there is no room for more.
    ///
    /// # Errors
    /// The first page that could not be placed for another reason, and the kernel's error.
    pub fn place(&self, run: PageRange, content: &[u8]) -> Result<u64, (u64, Errno)> {
        match self.place_all(run, content) {
            Ok(()) => {
                self.filled.set(run);
                Ok(run.count)
            }
            Err((page, errno @ (Errno::NOMEM | Errno::NOSPC))) => {
                if !self.is_full.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "the file system of the bases is full ({errno}): clones get pages of \
                         their own instead"
                    );
                }
                let placed = PageRange::new(run.first, page - run.first);
                self.filled.set(placed);
                Ok(placed.count)
            }
            Err(failed) => Err(failed),
        }
    }

    fn place_all(&self, run: PageRange, content: &[u8]) -> Result<(), (u64, Errno)> {
        let (mut page, mut rest) = (run.first, content);
        while !rest.is_empty() {
            let Err((byte, errno)) = self.placer.place_new(page * PAGE_SIZE, rest) else { break };
            let here = byte / PAGE_SIZE;
            let skipped = ((here - page) * PAGE_SIZE) as usize;
            if errno != Errno::EXIST {
                return Err((here, errno));
            }
            let bytes = &rest[skipped..skipped + PAGE_SIZE as usize];
            if !self.filled.contains(here) {
                // Or another agent has placed it just now: then this writes what is there.
                let written = self.file.write(here * PAGE_SIZE, bytes);
                written.map_err(|_| (here, Errno::IO))?;
            }
            rest = &rest[skipped + PAGE_SIZE as usize..];
            page = here + 1;
        }
        Ok(())
    }

    /// Waits until no other agent reads the piece of this page, but for a second at most. Ends
    /// early if `has_ended`.
    pub fn read_alone(&self, page: u64, has_ended: impl Fn() -> bool) -> Reading<'_> {
        let piece = self.first_piece + page * PAGE_SIZE / EXTENT_SIZE;
        let until = Instant::now() + PATIENCE;
        let locked = loop {
            match self.locks.try_lock(piece) {
                Ok(true) => break true,
                Ok(false) if Instant::now() < until && !has_ended() => std::thread::sleep(LOOK),
                // To read it twice does no harm.
                Ok(false) | Err(_) => break false,
            }
        };
        Reading { locks: &self.locks, piece, locked }
    }
}

fn mapped(error: MappingError) -> BackingError {
    log::warn!("{}", crate::error::chain(&error));
    BackingError::Kernel { what: "map the bitmap of a base", at: 0, source: Errno::NOMEM }
}
