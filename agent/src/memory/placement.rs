// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How pages come into the file of a block: through a mapping where the kernel lets us, else by
//! `write`.
//!
//! hugetlbfs has neither: see [`super::huge`].

use super::backing::{Backing, BackingError, BackingKind};
use super::file_placer::FilePlacer;
use super::large_pages::{LARGE, LargePages};
use super::small_pages::SmallPages;
use super::{Block, GuestMemory};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;

/// A large page is made only if so many bytes at its start arrive at once. So what a peer that lies
/// has allocated is at most eight times what it sends.
const DENSE: usize = 256 << 10;

/// How pages come into the file of a block.
#[derive(Debug)]
pub enum Placement {
    /// By `write`.
    Write,
    /// Through a mapping, and through large pages where the block can have them.
    Map(FilePlacer, Option<LargePages>),
    /// Through a mapping, because a write would allocate more than it writes.
    SmallPages(SmallPages),
}

/// What a caller knows about the pages that it places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Most of them do not exist.
    New,
    /// They do not exist, and all other pages of their 2 MiB will come, too.
    Whole,
    /// Most of them exist.
    Old,
}

impl Placement {
    /// One for each block of `memory`, in order.
    pub fn of(memory: &GuestMemory) -> Vec<Self> {
        memory.blocks().iter().map(|block| Self::of_block(block)).collect()
    }

    fn of_block(block: &Block) -> Self {
        if block.backing.kind() != BackingKind::Shmem {
            return Self::Write;
        }
        let (id, huge_page) = (block.geometry.id, block.backing.write_unit());
        let placer = match FilePlacer::new(&block.backing) {
            Ok(placer) => placer,
            Err(error) => {
                let why = crate::error::chain(&error);
                if huge_page > PAGE_SIZE {
                    log::warn!(
                        "block {id}: its file system hands out huge pages, so writing one page \
                         allocates a huge one: {why}"
                    );
                } else {
                    log::info!("block {id}: its pages are written one thread at a time: {why}");
                }
                return Self::Write;
            }
        };
        if huge_page <= PAGE_SIZE {
            let large = LargePages::new(&block.backing).unwrap_or_else(|error| {
                log::info!("block {id}: no large pages: {}", crate::error::chain(&error));
                None
            });
            return Self::Map(placer, large);
        }
        match SmallPages::new(placer, &block.backing, huge_page) {
            Ok(small_pages) => Self::SmallPages(small_pages),
            Err(error) => {
                log::warn!("block {id}: no memory to remember huge pages: {error}");
                Self::Write
            }
        }
    }

    /// Writes whole pages to byte `at` of the block.
    ///
    /// # Errors
    /// If the file was truncated, or the kernel refuses.
    pub fn write(
        &self, backing: &Backing, at: u64, bytes: &[u8], pages: Pages,
    ) -> Result<(), BackingError> {
        match (self, pages) {
            (Self::SmallPages(small_pages), _) => small_pages.write(backing, at, bytes),
            (Self::Map(placer, Some(large)), _) => {
                write_to_large(placer, large, backing, at, bytes, pages)
            }
            (Self::Map(placer, None), _) => write_small(placer, backing, at, bytes, pages),
            (Self::Write, _) => backing.write(at, bytes),
        }
    }

    /// Pages of this range were punched. Their large page may have kept them.
    pub fn freed(&self, range: PageRange) {
        if let Self::Map(_, Some(large)) = self {
            large.freed(range);
        }
    }

    /// Frees pages that were allocated as part of a larger one and hold no content: see
    /// [`SmallPages::settle`] and [`LargePages::settle`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, memory: &GuestMemory, backing: &Backing, filled: &MappedBitmap,
        gone: &[&MappedBitmap],
    ) -> Result<(), BackingError> {
        match self {
            Self::SmallPages(small_pages) => small_pages.settle(backing, filled, gone),
            Self::Map(_, Some(large)) => large.settle(memory, backing, filled, gone),
            Self::Write | Self::Map(_, None) => Ok(()),
        }
    }
}

fn write_to_large(
    placer: &FilePlacer, large: &LargePages, backing: &Backing, at: u64, bytes: &[u8], pages: Pages,
) -> Result<(), BackingError> {
    let mut done = 0;
    while done < bytes.len() {
        let byte = at + done as u64;
        let rest = (bytes.len() - done).min((LARGE - byte % LARGE) as usize);
        let part = &bytes[done..done + rest];
        let begins = byte.is_multiple_of(LARGE) && part.len() >= DENSE;
        if pages == Pages::Whole && begins && !large.is_large(byte) {
            placer.place(backing, byte, &part[..PAGE_SIZE as usize])?;
            large.make(byte);
        }
        if large.is_large(byte) {
            large.copy(byte, part)?;
        } else {
            write_small(placer, backing, byte, part, pages)?;
        }
        done += part.len();
    }
    Ok(())
}

fn write_small(
    placer: &FilePlacer, backing: &Backing, at: u64, bytes: &[u8], pages: Pages,
) -> Result<(), BackingError> {
    match pages {
        Pages::New | Pages::Whole => placer.place(backing, at, bytes),
        // To find that a page exists costs as much as to write it.
        Pages::Old => backing.write(at, bytes),
    }
}
