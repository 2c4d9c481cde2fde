// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Placing single pages into shared memory whose file system hands out huge pages.
//!
//! A `write` of one page into a hole normally allocates one page. But a tmpfs that is mounted with
//! `huge=always` or `huge=within_size` allocates a huge page, and so does a memfd while
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says so: 2 MiB, where the source may have
//! had 4 KiB ([`never-populate`](crate::invariants#never-populate)).
//!
//! `UFFDIO_COPY` allocates single pages on all shared memory. So the agent maps the block,
//! registers the mapping with a userfaultfd of its own, and places pages by `UFFDIO_COPY`. It never
//! touches the mapping: no page fault occurs, and a file that shrinks is an error of the call
//! instead of SIGBUS.
//!
//! A guest that fills its huge pages keeps them. If the first `DENSE` bytes of a huge page arrive
//! at once, the agent *opens* this huge page, and writes everything that arrives for it. The pages
//! that did not arrive are punched by [`SmallPages::settle`] at the end of each pass, when no
//! thread places. Until then, an open huge page takes at most eight times the memory of what has
//! arrived for it.
#![allow(unsafe_code)]

use super::backing::{Backing, BackingError, BackingKind};
use super::{Block, GuestMemory};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::userfault::{AddressRange, FillError, RegisterMode, Userfaultfd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// If this many bytes at the start of a huge page arrive at once, the rest probably arrives, too.
const DENSE: usize = 256 << 10;

/// A mapping of a block's file that is only used to place pages.
#[derive(Debug)]
pub struct SmallPages {
    uffd: Userfaultfd,
    start: *mut std::ffi::c_void,
    length: usize,
    /// How many bytes a write into a hole would allocate.
    huge_page: u64,
    /// The offset of the block's start in its first huge page, in bytes.
    into_first: u64,
    /// The open huge pages, counted from the one in which the block starts.
    opened: MappedBitmap,
}

// SAFETY: nobody reads or writes through the mapping. System calls that use its address may come
// from any thread, and from several at once.
unsafe impl Send for SmallPages {}
// SAFETY: as above.
unsafe impl Sync for SmallPages {}

impl SmallPages {
    /// One entry for each block of `memory`, in order. It is `Some` if a write would allocate more
    /// than it writes and the kernel has a userfaultfd for placing.
    pub fn of(memory: &GuestMemory) -> Vec<Option<Self>> {
        memory.blocks().iter().map(|block| Self::of_block(block)).collect()
    }

    fn of_block(block: &Block) -> Option<Self> {
        let huge_page = block.backing.write_unit();
        if block.backing.kind() != BackingKind::Shmem || huge_page <= PAGE_SIZE {
            return None;
        }
        match Self::new(&block.backing, huge_page) {
            Ok(small_pages) => Some(small_pages),
            Err(error) => {
                let (id, why) = (block.geometry.id, crate::error::chain(&error));
                log::warn!(
                    "block {id}: its file system hands out huge pages, so writing one page allocates a huge one: {why}"
                );
                None
            }
        }
    }

    fn new(backing: &Backing, huge_page: u64) -> Result<Self, BackingError> {
        let kernel =
            |source| BackingError::Kernel { what: "map the file for placing", at: 0, source };
        let uffd =
            Userfaultfd::open_for_placing().map_err(|source| BackingError::Userfault { source })?;
        let length = usize::try_from(backing.length()).map_err(|_| kernel(Errno::NOMEM))?;
        let (access, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let start = unsafe {
            mmap(std::ptr::null_mut(), length, access, flags, backing.fd(), backing.file_offset(0))
        };
        let into_first = backing.file_offset(0) % huge_page;
        let huge_pages = (into_first + backing.length()).div_ceil(huge_page);
        let start = start.map_err(kernel)?;
        let opened = MappedBitmap::private(huge_pages);
        let Ok(opened) = opened else {
            // SAFETY: as in `drop`.
            let _ = unsafe { munmap(start, length) };
            return Err(kernel(Errno::NOMEM));
        };
        let mapped = Self { uffd, start, length, huge_page, into_first, opened };
        let range = AddressRange { start: mapped.address(0), length: backing.length() };
        let registered = mapped.uffd.register(range, RegisterMode::Missing);
        registered.map_err(|source| BackingError::Userfault { source })?;
        Ok(mapped)
    }

    fn address(&self, byte: u64) -> u64 {
        self.start.expose_provenance() as u64 + byte
    }

    /// Places `bytes`, whole pages, at byte `at` of the block.
    ///
    /// # Errors
    /// If the file was truncated, or the kernel refuses.
    pub fn write(&self, backing: &Backing, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let mut done = 0;
        while done < bytes.len() {
            let byte = at + done as u64;
            let number = (self.into_first + byte) / self.huge_page;
            let rest = (bytes.len() - done).min((self.end_of(number) - byte) as usize);
            let part = &bytes[done..done + rest];
            if self.opens(number, byte, part.len()) {
                backing.write(byte, part)?;
            } else {
                self.place(backing, byte, part)?;
            }
            done += part.len();
        }
        Ok(())
    }

    /// The byte of the block at which the huge page with this number ends. It may lie after the
    /// block's end.
    fn end_of(&self, number: u64) -> u64 {
        (number + 1) * self.huge_page - self.into_first
    }

    /// Whether bytes for this huge page are written: it is open, or `length` bytes at `byte` open
    /// it.
    fn opens(&self, number: u64, byte: u64, length: usize) -> bool {
        if self.opened.contains(number) {
            return true;
        }
        let end = self.end_of(number);
        let begins = byte + self.huge_page == end;
        // A part of the huge page that is outside of the block must not be punched, so it is not
        // opened.
        let opens =
            begins && length >= DENSE.min(self.huge_page as usize) && end <= self.length as u64;
        if opens {
            self.opened.set(PageRange::new(number, 1));
        }
        opens
    }

    /// Punches the pages of open huge pages that hold nothing: those that are not `filled`, and
    /// those that are in one of `gone`. Closes all huge pages. No thread may place during this
    /// call.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, backing: &Backing, filled: &MappedBitmap, gone: &[&MappedBitmap],
    ) -> Result<(), BackingError> {
        let mut numbers = Vec::new();
        self.opened.take(self.opened.all(), |word, bits| {
            numbers
                .extend(runs_of_word(word * WORD_BITS, bits).flat_map(|run| run.first..run.end()));
        });
        for number in numbers {
            let count = self.huge_page / PAGE_SIZE;
            let mut rest = PageRange::new(self.end_of(number) / PAGE_SIZE - count, count);
            for run in gone.iter().flat_map(|gone| gone.runs(rest)) {
                backing.punch(run)?;
            }
            while let Some(first) = filled.next_clear(rest) {
                let after = PageRange::new(first, rest.end() - first);
                let next = filled.next_set(after).unwrap_or(rest.end());
                backing.punch(PageRange::new(first, next - first))?;
                rest = PageRange::new(next, rest.end() - next);
            }
        }
        Ok(())
    }

    fn place(&self, backing: &Backing, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let mut done = 0;
        while done < bytes.len() {
            let placed = self.uffd.copy(self.address(at + done as u64), &bytes[done..]);
            let Err(FillError { done: more, errno }) = placed else { return Ok(()) };
            done += more as usize;
            let byte = at + done as u64;
            match errno {
                Errno::EXIST => {
                    let rest =
                        PageRange::new(byte / PAGE_SIZE, (bytes.len() - done) as u64 / PAGE_SIZE);
                    // At least one: reserved pages are reported as holes, but they exist.
                    let present = backing.first_hole(rest)?.saturating_sub(rest.first).max(1);
                    let part = &bytes[done..done + (present * PAGE_SIZE) as usize];
                    backing.write(byte, part)?;
                    done += part.len();
                }
                Errno::FAULT => {
                    return Err(BackingError::Truncated { end: at + bytes.len() as u64 });
                }
                source => {
                    return Err(BackingError::Kernel { what: "place pages", at: byte, source });
                }
            }
        }
        Ok(())
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody has a reference into it.
        let unmapped = unsafe { munmap(self.start, self.length) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

/// Writes whole pages to byte `at` of a block: by `small_pages` if there is one, else by `write`.
///
/// # Errors
/// If the file was truncated, or the kernel refuses.
pub fn write(
    small_pages: Option<&SmallPages>, backing: &Backing, at: u64, bytes: &[u8],
) -> Result<(), BackingError> {
    match small_pages {
        Some(small_pages) => small_pages.write(backing, at, bytes),
        None => backing.write(at, bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::BlockGeometry;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

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
        let small_pages = SmallPages::new(&backing, HUGE).unwrap();
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
            assert_eq!(small_pages.opened.count(small_pages.opened.all()), 1);
            small_pages.write(&block.backing, (first + 200) * PAGE_SIZE, &all[..PAGE]).unwrap();
            filled.set(PageRange::new(first + 200, 1));
            // The kernel allocates the rest of an open huge page. These writes stand for that.
            for page in [100, 400] {
                block.backing.write((first + page) * PAGE_SIZE, &all[..PAGE]).unwrap();
            }
            let discarded = MappedBitmap::private(block.geometry.pages()).unwrap();
            discarded.set(PageRange::new(first + 3, 2));
            small_pages.settle(&block.backing, &filled, &[&discarded]).unwrap();
            let expected = [
                PageRange::new(first, 3),
                PageRange::new(first + 5, dense - 5),
                PageRange::new(first + 200, 1),
                PageRange::new(first + PAGES + 1, dense + 1),
            ];
            assert_eq!(allocated(&block), pages(&expected));
            assert_eq!(small_pages.opened.count(small_pages.opened.all()), 0);
        }
    }
}
