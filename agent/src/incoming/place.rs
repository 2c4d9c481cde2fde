//! Pages into the files.
//!
//! The destination starts from holes, and a page is allocated only when its content comes
//! (`never-populate`). A page that turns zero or is discarded afterwards becomes a hole again
//! (`same-memory`). `received` says which pages may hold something: a zero or a discard of any
//! other page costs nothing.
//!
//! Where a write would allocate more than it writes, pages are placed one by one; see
//! [`crate::memory::small_pages`].
//!
//! On host pages larger than a page, several pages share one allocation: it is freed when none of
//! them holds anything, and a part of it is zeroed by writing. There a lock per block keeps one
//! stream from freeing what another is just filling; on small pages nothing is shared and there is
//! no lock.
//!
//! The VMM may discard or free meanwhile. Whoever places holds
//! [`GuestMemory::placing`](crate::memory::GuestMemory::placing) from before the write until the
//! marks are set, and whoever gives back keeps that out: so what comes last holds. A page that
//! came, and was then given back, is a hole; one that was given back, and then comes, is what came.
//! It is never the hole of the one with the marks of the other.

use crate::job::{Job, JobError, add};
use crate::memory::backing::BackingKind;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::huge::{Fill, HugeWindow};
use crate::memory::recorded_discards::DiscardRecorder;
use crate::memory::small_pages::{self, SmallPages};
use crate::memory::{BackingError, Block, GuestMemory, huge};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use pageferry_protocol::shm::bitmap::runs_of_word;
use pageferry_protocol::stream::RecordHeader;
use pageferry_protocol::stream::payload::decode_bitmap;
use pageferry_protocol::stream::record::FLAG_STRAY;
use std::sync::{Arc, Mutex, PoisonError};

/// Places pages for all streams at once.
#[derive(Debug)]
pub struct Placer<'a> {
    job: &'a Arc<Job>,
    blocks: Vec<Target>,
    /// What is to come after the guest runs.
    missing: HostPageSet,
    /// What the VMM gave back since it was announced.
    given_back: DiscardRecorder,
}

/// What is to come after the guest runs.
#[derive(Debug)]
pub struct Remaining {
    /// These pages.
    pub missing: HostPageSet,
    /// But for what the VMM gave back since they were announced.
    pub given_back: DiscardRecorder,
    /// The number of pages that came, of each block.
    came: Vec<u64>,
}

impl Remaining {
    /// Makes holes of what is missing and holds something. Whoever looked at a page since it was
    /// punched and before missing pages are waited for made a page of zeroes there, which nobody
    /// would miss.
    ///
    /// The guest is paused meanwhile, and to look at each run that is missing costs 0.1 s for
    /// 100,000 of them. So a file that has as many pages as came is not looked at, unless the VMM
    /// gave something back: then a page more and a page less would be the same number.
    ///
    /// # Errors
    /// If a file cannot be asked, or not be punched.
    pub fn make_holes(&self, memory: &GuestMemory) -> Result<(), JobError> {
        for (at, block) in memory.blocks().iter().enumerate() {
            let is_as_it_came = block.backing.exactly_allocated_pages() == Some(self.came[at]);
            if !is_as_it_came || !self.given_back.recorded().is_empty(at) {
                let made = self.missing.punch_missing(at, block);
                made.map_err(|source| JobError::Backing { id: block.geometry.id, source })?;
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Target {
    /// Pages that may hold something.
    received: MappedBitmap,
    /// The host page mapped last; hugetlbfs only.
    window: Mutex<Option<HugeWindow>>,
    /// Where a write would allocate more than it writes.
    small_pages: Option<SmallPages>,
}

impl<'a> Placer<'a> {
    /// Makes all memory holes, and all of it populated.
    pub fn prepare(job: &'a Arc<Job>) -> Result<Self, JobError> {
        let given_back = DiscardRecorder::start(&job.memory, || ())?;
        let mut blocks = Vec::new();
        let small_pages = SmallPages::of(&job.memory);
        for (block, small_pages) in job.memory.blocks().iter().zip(small_pages) {
            job.check()?;
            let failed = |source| JobError::Backing { id: block.geometry.id, source };
            // In this order: what the VMM discards from now on stays marked. A large block takes
            // seconds to empty, and a discard must not wait for that.
            {
                let _placing = job.memory.placing();
                block.discarded.clear(block.all());
            }
            block.backing.empty().map_err(failed)?;
            let received = MappedBitmap::private(block.geometry.pages())?;
            blocks.push(Target { received, window: Mutex::new(None), small_pages });
        }
        let host_pages: Vec<u64> =
            job.memory.blocks().iter().map(|block| block.backing.host_page_size()).collect();
        Ok(Self { job, blocks, missing: HostPageSet::empty(&job.memory, &host_pages)?, given_back })
    }

    /// What is to come after the guest runs.
    pub fn into_remaining(self) -> Remaining {
        let came =
            self.blocks.iter().map(|target| target.received.count(target.received.all())).collect();
        Remaining { missing: self.missing, given_back: self.given_back, came }
    }

    /// All streams have ended a pass, and none has begun the next: frees what was allocated with
    /// huge pages and does not hold anything.
    ///
    /// # Errors
    /// If a file cannot be punched.
    pub fn end_pass(&self) -> Result<(), JobError> {
        for (target, block) in self.blocks.iter().zip(self.job.memory.blocks()) {
            let Some(small_pages) = &target.small_pages else { continue };
            self.job.check()?;
            let settled = small_pages.settle(&block.backing, &target.received, &[]);
            settled.map_err(|source| JobError::Backing { id: block.geometry.id, source })?;
        }
        Ok(())
    }

    /// The block of a record, with its index.
    ///
    /// # Errors
    /// If there is none, or the record's pages are not in it.
    pub fn block_of(
        &self, header: &RecordHeader, range: PageRange,
    ) -> Result<(usize, &'a Block), JobError> {
        // Whoever has this memory now does not expect anything from here.
        self.job.memory.current.check()?;
        let id = header.block();
        let (at, block) = self.job.memory.find(id).ok_or(JobError::NoBlock { id })?;
        let pages = block.geometry.pages();
        if !range.fits(pages) {
            return Err(JobError::Outside { id, first: range.first, count: range.count, pages });
        }
        Ok((at, block))
    }

    /// Places the content of pages.
    ///
    /// # Errors
    /// If the pages do not exist, or the file cannot be written.
    pub fn place_data(&self, header: &RecordHeader, payload: &[u8]) -> Result<(), JobError> {
        let range = header.range();
        let (at, block) = self.block_of(header, range)?;
        let failed = |source| JobError::Backing { id: block.geometry.id, source };
        let target = &self.blocks[at];
        let _placing = self.job.memory.placing();
        if block.backing.kind() == BackingKind::Hugetlb {
            let mut window = target.window.lock().unwrap_or_else(PoisonError::into_inner);
            target.received.set(range);
            huge::write(&block.backing, &mut window, range.offset(), Fill::Bytes(payload))
                .map_err(failed)?;
        } else {
            target.received.set(range);
            let small_pages = target.small_pages.as_ref();
            small_pages::write(small_pages, &block.backing, range.offset(), payload)
                .map_err(failed)?;
        }
        self.mark(header, block);
        add(&self.job.live.pages_sent, range.count);
        Ok(())
    }

    /// What came is populated, unless it is a stray write into what stays discarded.
    fn mark(&self, header: &RecordHeader, block: &Block) {
        let range = header.range();
        if header.flags() & FLAG_STRAY == 0 {
            block.discarded.clear(range);
        } else {
            block.discarded.set(range);
            add(&self.job.live.stray_pages, range.count);
        }
    }

    /// Makes pages zero.
    ///
    /// # Errors
    /// If the pages do not exist, or the file cannot be punched.
    pub fn place_zero(&self, header: &RecordHeader) -> Result<(), JobError> {
        let range = header.range();
        let (at, block) = self.block_of(header, range)?;
        let _placing = self.job.memory.placing();
        self.empty(at, block, range)?;
        self.mark(header, block);
        add(&self.job.live.zero_pages, range.count);
        Ok(())
    }

    /// Makes pages discarded.
    ///
    /// # Errors
    /// If the file cannot be punched.
    pub fn place_discard(&self, at: usize, block: &Block, run: PageRange) -> Result<(), JobError> {
        let _placing = self.job.memory.placing();
        block.discarded.set(run);
        self.empty(at, block, run)?;
        add(&self.job.live.discarded_pages, run.count);
        Ok(())
    }

    /// Makes holes of pages that are still to come, sent before or not. Returns how many they are.
    ///
    /// # Errors
    /// If the bitmap is malformed, or the file cannot be punched.
    pub fn expect_remaining(&self, header: &RecordHeader, payload: &[u8]) -> Result<u64, JobError> {
        let range = header.range();
        let (at, block) = self.block_of(header, range)?;
        let words = decode_bitmap(payload, range, block.geometry.pages());
        let words = words.map_err(|source| JobError::Payload { kind: "remaining", source })?;
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
    ) -> Result<(), JobError> {
        let _placing = self.job.memory.placing();
        self.given_back.recorded().forget(at, run);
        // What comes is populated, unless it comes along with what is, or was written after its
        // discard, of which no other record tells.
        if header.flags() & FLAG_STRAY == 0 {
            block.discarded.clear(run);
        } else {
            block.discarded.set(run);
        }
        self.empty(at, block, run)
    }

    /// Makes holes of those pages of `range` that hold something.
    fn empty(&self, at: usize, block: &Block, range: PageRange) -> Result<(), JobError> {
        let target = &self.blocks[at];
        let emptied = if block.backing.host_page_size() == PAGE_SIZE {
            empty_small(block, &target.received, range)
        } else {
            let mut window = target.window.lock().unwrap_or_else(PoisonError::into_inner);
            empty_huge(block, &target.received, &mut window, range)
        };
        emptied.map_err(|source| JobError::Backing { id: block.geometry.id, source })
    }
}

fn empty_small(
    block: &Block, received: &MappedBitmap, range: PageRange,
) -> Result<(), BackingError> {
    let mut rest = range;
    while let Some(run) = received.runs(rest).next() {
        received.clear(run);
        block.backing.punch(run)?;
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
            // The window would keep the page.
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
