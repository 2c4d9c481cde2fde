// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Placing single pages into shared memory whose file system hands out huge pages.
//!
//! A `write` of one page into a hole normally allocates one page. But a tmpfs that is mounted with
//! `huge=always` or `huge=within_size` allocates a huge page, and so does a memfd while
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says so: 2 MiB, where the source may have
//! had 4 KiB ([`never-populate`](crate::invariants#never-populate)).
//!
//! `UFFDIO_COPY` allocates single pages on all shared memory, so pages are placed by
//! [`FilePlacer`].
//!
//! A guest that fills its huge pages keeps them. If the first `DENSE` bytes of a huge page arrive
//! at once, the agent *opens* this huge page, and writes everything that arrives for it. The pages
//! that did not arrive are punched by [`SmallPages::settle`] at the end of each pass, when no
//! thread places. Until then, an open huge page takes at most eight times the memory of what has
//! arrived for it.

use super::backing::{Backing, BackingError};
use super::file_placer::FilePlacer;
use super::guest_memory::GuestMemory;
use super::unsettled::Unsettled;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::{MappedBitmap, MappingError};

/// If this many bytes at the start of a huge page arrive at once, the rest probably arrives, too.
const DENSE: usize = 256 << 10;

/// Places the pages of a block in single pages.
#[derive(Debug)]
pub struct SmallPages {
    placer: FilePlacer,
    length: u64,
    /// How many bytes a write into a hole would allocate.
    huge_page: u64,
    /// The open huge pages, and those of which a part was freed.
    opened: Unsettled,
    /// All huge pages that were opened.
    huge: MappedBitmap,
    /// Huge pages may be opened.
    may_open: bool,
}

impl SmallPages {
    /// For a block into which a write allocates `huge_page` bytes, and which `placer` has mapped.
    /// Without `may_open` the guest gets no huge pages.
    ///
    /// # Errors
    /// If there is no memory for the bitmap.
    pub fn new(
        placer: FilePlacer, backing: &Backing, huge_page: u64, may_open: bool,
    ) -> Result<Self, MappingError> {
        let into_first = backing.file_offset(0) % huge_page;
        let huge_pages = (into_first + backing.length()).div_ceil(huge_page);
        let opened = Unsettled::new(MappedBitmap::private(huge_pages)?, huge_page, into_first);
        let (huge, length) = (MappedBitmap::private(huge_pages)?, backing.length());
        Ok(Self { placer, length, huge_page, opened, huge, may_open })
    }

    /// Places `bytes`, whole pages, at byte `at` of the block.
    ///
    /// # Errors
    /// If the file was truncated, or the kernel refuses.
    pub fn write(&self, backing: &Backing, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let mut done = 0;
        while done < bytes.len() {
            let byte = at + done as u64;
            let number = self.opened.number_of(byte);
            let rest = (bytes.len() - done).min((self.opened.end_of(number) - byte) as usize);
            let part = &bytes[done..done + rest];
            if self.opens(number, byte, part.len()) {
                backing.write(byte, part)?;
            } else {
                self.placer.place(backing, byte, part)?;
            }
            done += part.len();
        }
        Ok(())
    }

    /// Whether bytes for this huge page are written: it is open, or `length` bytes at `byte` open
    /// it.
    fn opens(&self, number: u64, byte: u64, length: usize) -> bool {
        if self.opened.contains(number) {
            return true;
        }
        let end = self.opened.end_of(number);
        let begins = self.may_open && byte + self.huge_page == end;
        // A part of the huge page that is outside of the block must not be punched, so it is not
        // opened.
        let opens = begins && length >= DENSE.min(self.huge_page as usize) && end <= self.length;
        if opens {
            self.opened.add(number);
            self.huge.set(PageRange::new(number, 1));
        }
        opens
    }

    /// Pages of this range were freed.
    pub fn freed(&self, range: PageRange) {
        self.opened.add_of(range, |number| self.huge.contains(number));
    }

    /// Punches the pages of open huge pages that did not arrive, and closes all huge pages. A huge
    /// page of which the kernel keeps a freed part is replaced by single pages: see
    /// [`Unsettled::settle`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, memory: &GuestMemory, backing: &Backing, filled: &MappedBitmap,
        gone: &[&MappedBitmap],
    ) -> Result<(), BackingError> {
        let place = |at, bytes: &[u8]| self.placer.place(backing, at, bytes);
        for number in self.opened.settle(memory, backing, filled, gone, place)? {
            self.huge.clear(PageRange::new(number, 1));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Block;
    use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::sync::Arc;

    const HUGE: u64 = 2 << 20;
    const PAGES: u64 = HUGE / PAGE_SIZE;
    const PAGE: usize = PAGE_SIZE as usize;

    /// A block of three huge pages and a few pages, treated as if its file system hands out huge
    /// pages.
    fn block(offset: u64) -> (Block, SmallPages) {
        let (fd, length) =
            (memfd_create("ram", MemfdFlags::CLOEXEC).unwrap(), 3 * HUGE + 9 * PAGE_SIZE);
        ftruncate(&fd, offset + length).unwrap();
        let backing = Backing::new(fd, offset, length).unwrap();
        let geometry =
            BlockGeometry { id: 1, name: "ram".into(), gpa: 0, length, granularity: PAGE_SIZE };
        let placer = FilePlacer::new(&backing, &Arc::default()).unwrap();
        let small_pages = SmallPages::new(placer, &backing, HUGE, true).unwrap();
        (Block::new(geometry, backing, 0, None).unwrap(), small_pages)
    }

    fn allocated(block: &Block) -> Vec<u64> {
        block.backing.data_runs(block.all()).flat_map(|run| pages(&[run.unwrap()])).collect()
    }

    fn pages(runs: &[PageRange]) -> Vec<u64> {
        runs.iter().flat_map(|run| run.first..run.end()).collect()
    }

    #[test]
    fn existing_and_absent_pages_are_placed() {
        for offset in [0, 3 * PAGE_SIZE] {
            let (block, small_pages) = block(offset);
            let bytes = |value: u8, pages: u64| vec![value; (pages * PAGE_SIZE) as usize];
            small_pages.write(&block.backing, 5 * PAGE_SIZE, &bytes(1, 2)).unwrap();
            // Over pages that exist, holes, and the end of a huge page.
            small_pages.write(&block.backing, 4 * PAGE_SIZE, &bytes(2, 4)).unwrap();
            small_pages.write(&block.backing, HUGE - 2 * PAGE_SIZE, &bytes(3, 4)).unwrap();
            assert_eq!(
                allocated(&block),
                pages(&[PageRange::new(4, 4), PageRange::new(PAGES - 2, 4)])
            );
            let mut found = bytes(0, 1);
            for (page, value) in [(4, 2), (5, 2), (7, 2), (PAGES - 1, 3), (PAGES + 1, 3), (8, 0)] {
                block.backing.read(page * PAGE_SIZE, &mut found).unwrap();
                assert!(found.iter().all(|byte| *byte == value), "page {page}");
            }
            // Reserved: the page is reported as a hole, but it exists.
            let place = block.backing.file_offset(20 * PAGE_SIZE);
            rustix::fs::fallocate(
                block.backing.fd(),
                rustix::fs::FallocateFlags::empty(),
                place,
                PAGE_SIZE,
            )
            .unwrap();
            small_pages.write(&block.backing, 19 * PAGE_SIZE, &bytes(4, 3)).unwrap();
            block.backing.read(20 * PAGE_SIZE, &mut found).unwrap();
            assert_eq!(found[0], 4);
            ftruncate(block.backing.fd(), HUGE).unwrap();
            let error = small_pages.write(&block.backing, 2 * HUGE, &bytes(5, 1)).unwrap_err();
            assert!(matches!(error, BackingError::Truncated { .. }), "{error}");
        }
    }

    #[test]
    fn settle_punches_what_did_not_arrive_of_open_huge_pages() {
        for offset in [0, 3 * PAGE_SIZE] {
            let (block, small_pages) = block(offset);
            let first = (HUGE - offset % HUGE) % HUGE / PAGE_SIZE;
            let all = vec![7; DENSE + PAGE];
            let dense = DENSE as u64 / PAGE_SIZE;
            let filled = MappedBitmap::private(block.geometry.pages()).unwrap();
            small_pages.write(&block.backing, first * PAGE_SIZE, &all[..DENSE]).unwrap();
            filled.set(PageRange::new(first, dense));
            // This write does not begin at the start of a huge page, so it opens none.
            small_pages.write(&block.backing, (first + PAGES + 1) * PAGE_SIZE, &all).unwrap();
            filled.set(PageRange::new(first + PAGES + 1, dense + 1));
            assert_eq!(small_pages.opened.count(), 1);
            small_pages.write(&block.backing, (first + 200) * PAGE_SIZE, &all[..PAGE]).unwrap();
            filled.set(PageRange::new(first + 200, 1));
            // The kernel allocates the rest of an open huge page. These writes stand for that.
            for page in [100, 400] {
                block.backing.write((first + page) * PAGE_SIZE, &all[..PAGE]).unwrap();
            }
            let discarded = MappedBitmap::private(block.geometry.pages()).unwrap();
            discarded.set(PageRange::new(first + 3, 2));
            small_pages
                .settle(&GuestMemory::default(), &block.backing, &filled, &[&discarded])
                .unwrap();
            let expected = [
                PageRange::new(first, 3),
                PageRange::new(first + 5, dense - 5),
                PageRange::new(first + 200, 1),
                PageRange::new(first + PAGES + 1, dense + 1),
            ];
            assert_eq!(allocated(&block), pages(&expected));
            assert_eq!(small_pages.opened.count(), 0);
        }
    }

    #[test]
    fn no_huge_page_is_opened_if_the_guest_is_to_have_none() {
        let (block, opening) = block(0);
        let small_pages = SmallPages { may_open: false, ..opening };
        small_pages.write(&block.backing, 0, &vec![7; HUGE as usize]).unwrap();
        assert_eq!(small_pages.opened.count(), 0);
        assert_eq!(allocated(&block), pages(&[PageRange::new(0, PAGES)]));
    }
}
