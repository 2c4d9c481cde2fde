// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Placing pages into the files of the guest's memory.
//!
//! The destination starts from holes, and a page is allocated only when its content comes
//! ([`never-populate`](crate::invariants#never-populate)). A page that turns zero or is discarded
//! later becomes a hole again ([`same-memory`](crate::invariants#same-memory)). The bitmap
//! `received` has the pages that may hold content. A zero or a discard of any other page needs no
//! system call.
//!
//! # Huge pages
//!
//! Where a write would allocate more than it writes, pages are placed one by one: see
//! [`crate::memory::small_pages`].
//!
//! If a host page is larger than a page (hugetlbfs), several pages share one allocation. The host
//! page is freed when none of its pages holds content any more. A part of it is made zero by
//! writing. A lock for each block keeps one stream from freeing a host page that another stream is
//! filling. Other memory shares nothing and needs no lock.
//!
//! # Discards while pages are placed
//!
//! The VMM may discard or free pages at any time. A thread that places pages holds
//! [`GuestMemory::placing`](crate::memory::GuestMemory::placing) from before the write until the
//! marks are set, and a discard or free excludes all such threads. So the later of the two decides.
//! A page that is placed and then given back is a hole. A page that is given back and then placed
//! has its content. It never becomes a hole whose marks say that it was placed, or the reverse.

use crate::job::{Job, JobError};
use crate::lock::lock;
use crate::memory::MemoryError;
use crate::memory::backing::BackingKind;
use crate::memory::discard_recorder::DiscardRecorder;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::huge::{Fill, HugeWindow};
use crate::memory::placement::{HugePageUse, Pages, Placement};
use crate::memory::{BackingError, Block, GuestMemory, huge};
use crate::transport::StreamError;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use pageferry_protocol::shm::bitmap::runs_of_word;
use pageferry_protocol::stream::RecordHeader;
use pageferry_protocol::stream::payload::decode_bitmap;
use pageferry_protocol::stream::record::{FLAG_STRAY, FLAG_WHOLE};
use std::sync::{Arc, Mutex};

/// Places the pages that all streams receive.
#[derive(Debug)]
pub struct Placer<'a> {
    job: &'a Arc<Job>,
    blocks: Vec<Target>,
    /// The host pages that come after the guest runs (postcopy).
    missing: HostPageSet,
    /// What the VMM gave back since it came, or was announced as missing.
    given_back: DiscardRecorder,
}

/// The pages that come after the guest runs (postcopy).
#[derive(Debug)]
pub struct Remaining {
    /// The host pages that are missing.
    pub missing: HostPageSet,
    /// What the VMM gave back since then: it need not come.
    pub given_back: DiscardRecorder,
    /// For each block, the number of pages that were received and hold content.
    came: Vec<u64>,
}

impl Remaining {
    /// Makes holes of missing pages that hold something. To be called right after the mappings were
    /// registered for missing faults.
    ///
    /// Between the punch and the registration the VMM may have touched a missing page. The kernel
    /// then allocated a page of zeroes, and the guest would read it and never fault.
    ///
    /// The guest is paused during this call, and looking at the file costs 0.1 s for 100,000 runs
    /// of missing pages. So a file is skipped if it has exactly as many pages as came. If the VMM
    /// gave pages back, that comparison proves nothing, since one page more and one page less give
    /// the same number. Such a file is always looked at.
    ///
    /// # Errors
    /// If a file cannot be examined or punched.
    pub fn make_holes(&self, memory: &GuestMemory) -> Result<(), JobError> {
        for (at, block) in memory.blocks().iter().enumerate() {
            let is_as_it_came = block.backing.exactly_allocated_pages() == Some(self.came[at]);
            if !is_as_it_came || !self.given_back.recorded().is_empty(at) {
                let made = self.missing.punch_missing(at, block);
                made.map_err(|source| MemoryError::Backing { id: block.geometry.id, source })?;
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Target {
    /// Pages that may hold content.
    received: MappedBitmap,
    /// The host page that was mapped last; only on hugetlbfs.
    window: Mutex<Option<HugeWindow>>,
    placement: Placement,
}

impl<'a> Placer<'a> {
    /// Makes holes of all memory, and marks all of it as populated.
    pub fn prepare(job: &'a Arc<Job>, huge_pages: HugePageUse) -> Result<Self, JobError> {
        let given_back = DiscardRecorder::start(&job.memory, || ())?;
        let mut blocks = Vec::new();
        let placements = Placement::of(&job.memory, huge_pages, &job.placing);
        for (block, placement) in job.memory.blocks().iter().zip(placements) {
            job.check()?;
            let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
            // The marks are cleared first, so that what the VMM discards from now on stays marked.
            // The lock is released before the punch: emptying a large block takes seconds, and a
            // discard must not wait for that.
            {
                let _placing = job.memory.placing();
                block.discarded.clear(block.all());
            }
            block.backing.empty().map_err(failed)?;
            let received = MappedBitmap::private(block.geometry.pages())?;
            blocks.push(Target { received, window: Mutex::new(None), placement });
        }
        let host_pages: Vec<u64> =
            job.memory.blocks().iter().map(|block| block.backing.host_page_size()).collect();
        Ok(Self {
            job,
            blocks,
            missing: HostPageSet::empty(job.memory.blocks(), &host_pages)?,
            given_back,
        })
    }

    /// The pages that come after the guest runs.
    pub fn into_remaining(self) -> Remaining {
        let came =
            self.blocks.iter().map(|target| target.received.count(target.received.all())).collect();
        Remaining { missing: self.missing, given_back: self.given_back, came }
    }

    /// Ends a pass: frees pages that were allocated as part of a huge page and hold no content. All
    /// streams have ended the pass, and none has begun the next.
    ///
    /// # Errors
    /// If a file cannot be punched.
    pub fn end_pass(&self) -> Result<(), JobError> {
        let given_back = self.given_back.recorded();
        for (at, (target, block)) in self.blocks.iter().zip(self.job.memory.blocks()).enumerate() {
            self.job.check()?;
            // The VMM has punched them, but a large page may have kept them.
            for pages in [given_back.discarded(at), given_back.freed(at)] {
                for run in pages.runs(pages.all()) {
                    target.received.clear(run);
                    target.placement.freed(run);
                }
            }
            let settled =
                target.placement.settle(&self.job.memory, &block.backing, &target.received, &[]);
            settled.map_err(|source| MemoryError::Backing { id: block.geometry.id, source })?;
        }
        Ok(())
    }

    /// The block of a record, and its index.
    ///
    /// # Errors
    /// If there is no such block, or the pages of the record are not in it.
    pub fn block_of(
        &self, header: &RecordHeader, range: PageRange,
    ) -> Result<(usize, &'a Block), JobError> {
        // If the VMM has another agent now, this one must not write to its memory.
        self.job.memory.current.check()?;
        let id = header.block();
        let (at, block) = self.job.memory.find(id).ok_or(StreamError::NoBlock { id })?;
        let pages = block.geometry.pages();
        if !range.fits(pages) {
            return Err(
                StreamError::Outside { id, first: range.first, count: range.count, pages }.into()
            );
        }
        Ok((at, block))
    }

    /// Writes the content of pages.
    ///
    /// # Errors
    /// If the pages do not exist, or the file cannot be written.
    pub fn place_data(&self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let range = header.range();
        let (at, block) = self.block_of(header, range)?;
        let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
        let target = &self.blocks[at];
        let _placing = self.job.memory.placing();
        self.given_back.recorded().forget(at, range);
        if block.backing.kind() == BackingKind::Hugetlb {
            let mut window = lock(&target.window);
            target.received.set(range);
            huge::write(&block.backing, &mut window, range.offset(), Fill::Bytes(payload))
                .map_err(failed)?;
        } else {
            let is_new = target.received.next_set(range).is_none();
            target.received.set(range);
            let pages = match header.flags() & FLAG_WHOLE {
                _ if !is_new => Pages::Old,
                0 => Pages::New,
                _ => Pages::Whole,
            };
            let placed = target.placement.write(&block.backing, range.offset(), payload, pages);
            placed.map_err(failed)?;
        }
        self.mark(header, block);
        Ok(())
    }

    /// Marks pages that came as populated, or as discarded if the record says that the guest wrote
    /// into a discarded page (a stray write).
    fn mark(&self, header: &RecordHeader, block: &Block) {
        let range = header.range();
        if header.flags() & FLAG_STRAY == 0 {
            block.discarded.clear(range);
        } else {
            block.discarded.set(range);
        }
    }

    /// Makes pages zero: holes that are populated.
    ///
    /// # Errors
    /// If the pages do not exist, or the file cannot be punched.
    pub fn place_zero(&self, header: &RecordHeader) -> Result<(), JobError> {
        let range = header.range();
        let (at, block) = self.block_of(header, range)?;
        let _placing = self.job.memory.placing();
        self.empty(at, block, range)?;
        self.mark(header, block);
        Ok(())
    }

    /// Makes pages discarded: holes that are marked.
    ///
    /// # Errors
    /// If the file cannot be punched.
    pub fn place_discard(&self, at: usize, block: &Block, run: PageRange) -> Result<(), JobError> {
        let _placing = self.job.memory.placing();
        block.discarded.set(run);
        Ok(self.empty(at, block, run)?)
    }

    /// Notes pages that come after the guest runs, and makes holes of them, also if they were sent
    /// before. Returns their number.
    ///
    /// # Errors
    /// If the bitmap is malformed, or the file cannot be punched.
    pub fn expect_remaining(&self, header: &RecordHeader, payload: &[u8]) -> Result<u64, JobError> {
        let range = header.range();
        let (at, block) = self.block_of(header, range)?;
        let words = decode_bitmap(payload, range, block.geometry.pages());
        let words = words.map_err(|source| StreamError::Payload { kind: "remaining", source })?;
        let mut run = PageRange::default();
        let mut pages = 0;
        for (word, bits) in words {
            self.missing.add_pages(at, word, bits);
            pages += u64::from(bits.count_ones());
            for next in runs_of_word(word * WORD_BITS, bits) {
                if next.first == run.end() {
                    run.count += next.count;
                } else {
                    self.expect_run(at, block, header, run)?;
                    run = next;
                }
            }
        }
        self.expect_run(at, block, header, run)?;
        Ok(pages)
    }

    fn expect_run(
        &self, at: usize, block: &Block, header: &RecordHeader, run: PageRange,
    ) -> Result<(), MemoryError> {
        let _placing = self.job.memory.placing();
        self.given_back.recorded().forget(at, run);
        // The pages are populated, with two exceptions that carry the stray flag: a discarded page
        // that comes because another page of its host page comes, and a page that was written after
        // its discard. No other record says that these pages are discarded.
        if header.flags() & FLAG_STRAY == 0 {
            block.discarded.clear(run);
        } else {
            block.discarded.set(run);
        }
        self.empty(at, block, run)
    }

    /// Makes those pages of `range` zero that hold content. It punches them, or writes zeroes if
    /// their host page holds other content, too.
    fn empty(&self, at: usize, block: &Block, range: PageRange) -> Result<(), MemoryError> {
        let target = &self.blocks[at];
        let emptied = if block.backing.host_page_size() == PAGE_SIZE {
            empty_small(block, target, range)
        } else {
            let mut window = lock(&target.window);
            empty_huge(block, &target.received, &mut window, range)
        };
        emptied.map_err(|source| MemoryError::Backing { id: block.geometry.id, source })
    }
}

fn empty_small(block: &Block, target: &Target, range: PageRange) -> Result<(), BackingError> {
    let mut rest = range;
    while let Some(run) = target.received.runs(rest).next() {
        target.received.clear(run);
        block.backing.punch(run)?;
        target.placement.freed(run);
        rest = PageRange::new(run.end(), range.end() - run.end());
    }
    Ok(())
}

fn empty_huge(
    block: &Block, received: &MappedBitmap, window: &mut Option<HugeWindow>, range: PageRange,
) -> Result<(), BackingError> {
    let unit = block.backing.host_page_size() / PAGE_SIZE;
    let mut rest = range;
    while let Some(page) = received.next_set(rest) {
        let host_page = PageRange::new(page / unit * unit, unit);
        let part = host_page.intersection(&range);
        received.clear(part);
        if received.next_set(host_page).is_none() {
            // While the window is mapped, the file would keep the page.
            *window = None;
            block.backing.punch(host_page)?;
        } else {
            huge::write(&block.backing, window, part.offset(), Fill::Zero(part.bytes() as usize))?;
        }
        rest = PageRange::new(part.end(), range.end() - part.end());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
