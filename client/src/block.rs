// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One block as the client keeps it: enough to hand it to a new agent, and to discard in it without
//! an agent (`discard-cannot-fail`).

use crate::error::Error;
use crate::memfd::sealed_memfd;
use crate::private_memory::{PrivateMemory, View};
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::file::MemoryFile;
use pageferry_protocol::memory::{BlockGeometry, PageRange};
use pageferry_protocol::shm::{DirtyLog, MappedBitmap, bitmap_bytes};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A block of guest memory, as the VMM describes it.
#[derive(Debug, Clone, Copy)]
pub struct BlockSpec<'a> {
    /// Chosen by the VMM. Unique among its blocks, and the same on source and destination.
    pub id: u32,
    /// For people. Unique among the blocks of the VMM, 1 to 255 bytes.
    pub name: &'a str,
    /// Guest physical address of the first byte; a multiple of 4096.
    pub gpa: u64,
    /// Length in bytes; a multiple of 4096.
    pub length: u64,
    /// The file that holds the memory: a memfd, or a file on tmpfs or hugetlbfs. The client
    /// duplicates the descriptor.
    pub memory: BorrowedFd<'a>,
    /// Where the block begins in that file, in bytes.
    pub fd_offset: u64,
    /// Address at which the VMM has the block mapped; 0 if it has not. Write-protect scanning,
    /// postcopy, lazy restore and background snapshots need it.
    pub vmm_address: u64,
    /// Unit of discards and populates in bytes: a power of two, at least 4096. If the host page is
    /// larger, the host page is the unit.
    pub granularity: u64,
    /// True if the whole block starts as discarded, as in a virtio-mem device; otherwise it starts
    /// as populated.
    pub discarded: bool,
}

/// What the agent reports about a block that it accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockAdded {
    /// The backing's allocation unit in bytes.
    pub host_page_size: u64,
    /// True if the file cannot shrink under the agent (`F_SEAL_SHRINK`).
    pub sealed: bool,
}

/// A block that was added.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) geometry: BlockGeometry,
    pub(crate) memory: OwnedFd,
    pub(crate) fd_offset: u64,
    pub(crate) vmm_address: u64,
    file: MemoryFile,
    /// The bitmap of discarded pages: the file, for the agent, and our mapping of it.
    pub(crate) discarded_fd: OwnedFd,
    pub(crate) discarded: Arc<MappedBitmap>,
    /// The bitmap of owed pages, in the same way: see [`crate::missing_pages`].
    pub(crate) owed_fd: OwnedFd,
    owed: MappedBitmap,
    /// A clone's memory.
    pub(crate) private: Option<Private>,
}

/// The memory of a clone's block.
#[derive(Debug)]
pub(crate) struct Private {
    pub(crate) memory: Arc<PrivateMemory>,
    pub(crate) view: View,
}

impl Block {
    /// Makes the bitmap and keeps a duplicate of the file. `geometry` is checked.
    pub(crate) fn new(geometry: BlockGeometry, spec: &BlockSpec<'_>) -> Result<Self, Error> {
        // The agent checks the same, but there may be no agent now.
        let file = MemoryFile::check(spec.memory, spec.fd_offset, spec.length)
            .map_err(|source| Error::Memory { id: spec.id, source })?;
        Self::of(geometry, spec, file, None)
    }

    /// The same for a private mapping of a base.
    pub(crate) fn new_clone(
        geometry: BlockGeometry, spec: &BlockSpec<'_>, memory: PrivateMemory,
    ) -> Result<Self, Error> {
        let file = MemoryFile::check_base(spec.memory, spec.fd_offset, spec.length)
            .map_err(|source| Error::Memory { id: spec.id, source })?;
        let private = Private { memory: Arc::new(memory), view: View::open()? };
        Self::of(geometry, spec, file, Some(private))
    }

    fn of(
        geometry: BlockGeometry, spec: &BlockSpec<'_>, file: MemoryFile, private: Option<Private>,
    ) -> Result<Self, Error> {
        let pages = geometry.pages();
        let discarded_fd = sealed_memfd("pageferry-discarded", bitmap_bytes(pages))?;
        let discarded = MappedBitmap::shared(discarded_fd.as_fd(), pages)
            .map_err(|source| Error::Mapping { what: "bitmap of discarded pages", source })?;
        let owed_fd = sealed_memfd("pageferry-owed", bitmap_bytes(pages))?;
        // Nearly always all holes, which a walk must not fill.
        let walked = owed_fd.try_clone().map_err(Error::io("duplicate a memfd"))?;
        let owed = MappedBitmap::shared_sparse(walked, pages)
            .map_err(|source| Error::Mapping { what: "bitmap of owed pages", source })?;
        if spec.discarded {
            discarded.set(discarded.all());
        }
        let memory = spec
            .memory
            .try_clone_to_owned()
            .map_err(Error::io("duplicate the file under a block"))?;
        Ok(Self {
            geometry,
            file,
            memory,
            fd_offset: spec.fd_offset,
            vmm_address: spec.vmm_address,
            discarded_fd,
            discarded: Arc::new(discarded),
            owed_fd,
            owed,
            private,
        })
    }

    /// The backing's allocation unit in bytes.
    pub(crate) fn host_page_size(&self) -> u64 {
        self.file.host_page_size
    }

    /// What an agent would say about the block.
    pub(crate) fn added(&self) -> BlockAdded {
        BlockAdded { host_page_size: self.file.host_page_size, sealed: self.file.sealed }
    }

    /// The unit of discards and populates in bytes, here and in the agent.
    pub(crate) fn discard_unit(&self) -> u64 {
        self.geometry.discard_unit(self.file.host_page_size)
    }

    /// The whole units inside `range`, for a discard (`round-safely`).
    pub(crate) fn inward(&self, range: &BlockRange) -> Result<PageRange, Error> {
        PageRange::inward(range.offset, range.length, self.discard_unit(), self.geometry.length)
            .map_err(|source| Error::Range { block: range.block, source })
    }

    /// The units that `range` touches, for a populate (`round-safely`).
    pub(crate) fn outward(&self, range: &BlockRange) -> Result<PageRange, Error> {
        PageRange::outward(range.offset, range.length, self.discard_unit(), self.geometry.length)
            .map_err(|source| Error::Range { block: range.block, source })
    }

    /// Discards without an agent: marks the pages, then frees them if `punch` says so. Returns how
    /// many pages were not discarded before.
    ///
    /// Pages that are owed need not come any more: the next agent must not place them.
    pub(crate) fn discard(&self, pages: PageRange, punch: bool) -> u64 {
        let changed = self.discarded.set(pages);
        self.owed.clear(pages);
        if punch {
            self.punch(pages);
        }
        changed
    }

    /// True if a page is owed.
    pub(crate) fn owes(&self) -> bool {
        self.owed.next_set(self.owed.all()).is_some()
    }

    /// Number of pages that are owed.
    pub(crate) fn owed_pages(&self) -> u64 {
        self.owed.count(self.owed.all())
    }

    /// No page is owed.
    pub(crate) fn owe_nothing(&self) {
        self.owed.clear(self.owed.all());
    }

    /// Frees without an agent. Returns how many of the pages are not discarded.
    ///
    /// The next agent has to send these pages as zero and learns of them only from the log. They
    /// are marked after the punch: an agent that takes a mark while the page still exists would
    /// send its old content. A discarded page needs no mark; the bitmap says it all.
    pub(crate) fn free(&self, pages: PageRange, log: &DirtyLog) -> u64 {
        self.owed.clear(pages);
        self.punch(pages);
        let mark = |pages: PageRange| {
            log.mark(PageRange::new(self.geometry.first_log_page() + pages.first, pages.count))
        };
        let mut next = pages.first;
        for run in self.discarded.runs(pages) {
            mark(PageRange::new(next, run.first - next));
            next = run.end();
        }
        mark(PageRange::new(next, pages.end() - next));
        pages.count - self.discarded.count(pages)
    }

    /// Populates without an agent. Returns how many pages were discarded before.
    ///
    /// The next agent has to send these pages and learns of them only from the log. They are marked
    /// last: an agent that takes a mark while the page still counts as discarded would drop it.
    pub(crate) fn populate(&self, pages: PageRange, log: &DirtyLog) -> u64 {
        let changed = self.discarded.clear(pages);
        log.mark(PageRange::new(self.geometry.first_log_page() + pages.first, pages.count));
        changed
    }

    /// Frees the whole host pages of `pages`. A discard cannot fail (`discard-cannot-fail`), so a
    /// failure is only logged: the content is stale anyway and only costs memory.
    fn punch(&self, pages: PageRange) {
        if let Some(private) = &self.private {
            return private.memory.punch(pages);
        }
        let start = (self.fd_offset + pages.offset()).next_multiple_of(self.host_page_size());
        let end = (self.fd_offset + pages.offset() + pages.bytes()) / self.host_page_size()
            * self.host_page_size();
        if start >= end {
            return;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&self.memory, flags, start, end - start) {
                Ok(()) => return,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let (name, bytes) = (&self.geometry.name, end - start);
                    log::warn!(
                        "block {name}: cannot free {bytes:#x} bytes at file offset {start:#x}: {errno}"
                    );
                    return;
                }
            }
        }
    }
}
