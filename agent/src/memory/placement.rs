// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How pages come into the file of a block: through a mapping where the kernel lets us, else by
//! `write`.
//!
//! hugetlbfs has neither: see [`super::huge`].

use super::backing::{Backing, BackingError, BackingKind};
use super::file_placer::FilePlacer;
use super::huge_page_supply::HugePageSupply;
use super::large_pages::LargePages;
use super::mapped_areas::MappedAreas;
use super::placing_report::PlacingReport;
use super::small_pages::SmallPages;
use super::spare_memory::SpareMemory;
use super::{Block, GuestMemory};
use pageferry_protocol::control::job::{HugePages, Placing};
use pageferry_protocol::memory::{HUGE_PAGE, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use std::sync::Arc;

/// A large page is made only if so many bytes at its start arrive at once. So what a peer that lies
/// has allocated is at most eight times what it sends.
const DENSE: usize = 256 << 10;
/// Fewer bytes than this are written to a large page by the kernel, if they are the only ones
/// there: to map 2 MiB for them, and to unmap it again, costs more.
const WORTH_MAPPING: usize = 64 << 10;
/// The reason why a guest has no huge pages if it is not to have them.
const NEVER: &str = "no huge pages: the job was told to make none";

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

/// Whether the pages of a job may become huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePageUse {
    /// Where all of them come.
    WhereWhole,
    /// Only where the file system hands them out by itself. Nobody knows where all of them come,
    /// for this reason.
    NotKnown(&'static str),
    /// Nowhere.
    Never,
}

impl HugePageUse {
    /// What an operator chose.
    pub fn chosen(choice: HugePages) -> Self {
        match choice {
            HugePages::Auto => Self::WhereWhole,
            HugePages::Never => Self::Never,
        }
    }
}

impl Placement {
    /// One for each block of `memory`, in order. `report` gets what the status says about it.
    pub fn of(
        memory: &GuestMemory, huge_pages: HugePageUse, report: &Arc<PlacingReport>,
    ) -> Vec<Self> {
        let supply = Arc::new(HugePageSupply::new(report, SpareMemory::of_this_process()));
        let areas = Arc::default();
        let of_block =
            |block: &Arc<Block>| Self::of_block(block, huge_pages, (&supply, &areas), report);
        memory.blocks().iter().map(of_block).collect()
    }

    fn of_block(
        block: &Block, huge_pages: HugePageUse,
        (supply, areas): (&Arc<HugePageSupply>, &Arc<MappedAreas>), report: &PlacingReport,
    ) -> Self {
        let (id, huge_page) = (block.geometry.id, block.backing.write_unit());
        match block.backing.kind() {
            BackingKind::Shmem => {}
            // Nothing is placed into a clone but what its base gets.
            BackingKind::Clone => return Self::Write,
            // Whole host pages, through a mapping: see [`super::huge`].
            BackingKind::Hugetlb => {
                report.uses(Placing::Pages);
                return Self::Write;
            }
            BackingKind::File => {
                report.uses(Placing::Write);
                report.explain(format!("block {id}: its file is on a disk"));
                return Self::Write;
            }
        }
        let placer = match FilePlacer::new(&block.backing, areas) {
            Ok(placer) => placer,
            Err(error) => {
                let why = crate::error::chain(&error);
                report.uses(Placing::Write);
                report.explain(format!("block {id}: {why}"));
                if huge_page > PAGE_SIZE {
                    log::warn!(
                        "block {id}: its file system hands out huge pages, so writing one page \
                         allocates a huge one: {why}"
                    );
                }
                return Self::Write;
            }
        };
        report.uses(Placing::Pages);
        if huge_page <= PAGE_SIZE {
            let large =
                LargePages::of_block(block, huge_pages, supply, areas).unwrap_or_else(|why| {
                    report.explain(why);
                    None
                });
            if large.is_some() {
                report.uses(Placing::HugePages);
            }
            return Self::Map(placer, large);
        }
        let may_open = huge_pages != HugePageUse::Never;
        match SmallPages::new(placer, &block.backing, huge_page, may_open) {
            Ok(small_pages) => {
                if may_open {
                    report.uses(Placing::HugePages);
                    report.explain(format!("block {id}: its file system makes huge pages itself"));
                } else {
                    report.explain(NEVER.into());
                }
                Self::SmallPages(small_pages)
            }
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
        match self {
            Self::Map(_, Some(large)) => large.freed(range),
            Self::SmallPages(small_pages) => small_pages.freed(range),
            Self::Write | Self::Map(_, None) => {}
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
            Self::SmallPages(small_pages) => small_pages.settle(memory, backing, filled, gone),
            Self::Map(_, Some(large)) => large.settle(memory, backing, filled, gone),
            Self::Write | Self::Map(_, None) => Ok(()),
        }
    }
}

impl LargePages {
    /// For a block, if it may and can have large pages. The reason if it cannot; a block that is
    /// smaller than a large page needs none.
    fn of_block(
        block: &Block, huge_pages: HugePageUse, supply: &Arc<HugePageSupply>,
        areas: &Arc<MappedAreas>,
    ) -> Result<Option<Self>, String> {
        let id = block.geometry.id;
        match huge_pages {
            HugePageUse::WhereWhole => {}
            HugePageUse::NotKnown(why) => return Err(why.into()),
            HugePageUse::Never => return Err(NEVER.into()),
        }
        let large = Self::new(&block.backing, supply, areas);
        let large =
            large.map_err(|error| format!("block {id}: {}", crate::error::chain(&error)))?;
        if large.is_none() && block.backing.length() >= HUGE_PAGE {
            return Err(format!(
                "block {id}: it does not begin at a multiple of 2 MiB of its file"
            ));
        }
        Ok(large)
    }
}

fn write_to_large(
    placer: &FilePlacer, large: &LargePages, backing: &Backing, at: u64, bytes: &[u8], pages: Pages,
) -> Result<(), BackingError> {
    let mut done = 0;
    while done < bytes.len() {
        let byte = at + done as u64;
        let rest = (bytes.len() - done).min((HUGE_PAGE - byte % HUGE_PAGE) as usize);
        let part = &bytes[done..done + rest];
        let begins = byte.is_multiple_of(HUGE_PAGE) && part.len() >= DENSE;
        if pages == Pages::Whole && begins && !large.is_large(byte) {
            placer.place(backing, byte, &part[..PAGE_SIZE as usize])?;
            large.make(byte);
        }
        if !large.is_large(byte) {
            write_small(placer, backing, byte, part, pages)?;
        } else if large.comes_again(byte) || part.len() >= WORTH_MAPPING {
            large.copy(byte, part)?;
        } else {
            backing.write(byte, part)?;
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
