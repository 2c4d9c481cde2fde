//! Placing into shared memory whose file system hands out huge pages.
//!
//! On a tmpfs that is mounted with `huge=always` or `huge=within_size`, and in a memfd while
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says so, a `write` of one page into a hole
//! allocates a huge page: 2 MiB, of which the source may have had 4 KiB (`never-populate`).
//!
//! `UFFDIO_COPY` allocates single pages on every shared memory. So the agent maps the block,
//! registers the mapping with a userfaultfd of its own, and places by that. The mapping is never
//! touched: no fault is taken, and a file that shrinks is an error of the call, not SIGBUS.
//!
//! A guest that fills its huge pages keeps them: where the first `DENSE` bytes of a huge page come
//! at once, it is *opened*, and all that comes for it is written. What did not come is punched by
//! [`SmallPages::settle`], when nobody places: at the end of each pass. Until then an opened huge
//! page takes at most eight times what has come for it.
#![allow(unsafe_code)]

use super::backing::{Backing, BackingError, BackingKind};
use super::{Block, GuestMemory};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::userfault::{AddressRange, FillError, RegisterMode, Userfaultfd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes at the start of a huge page that make it likely that the rest comes, too.
const DENSE: usize = 256 << 10;

/// A block's file, mapped for placing alone.
#[derive(Debug)]
pub struct SmallPages {
    uffd: Userfaultfd,
    start: *mut std::ffi::c_void,
    length: usize,
    /// Bytes that a write into a hole would allocate.
    huge_page: u64,
    /// Where the block begins in its first huge page, in bytes.
    into_first: u64,
    /// Huge pages that are written, counted from the one in which the block begins.
    opened: MappedBitmap,
}

// SAFETY: nobody reads or writes through the mapping. The kernel's calls that take its address may
// come from any thread, and several at once.
unsafe impl Send for SmallPages {}
// SAFETY: as above.
unsafe impl Sync for SmallPages {}

impl SmallPages {
    /// For each block of `memory`, in order: how to place in it, where a write would allocate more
    /// than it writes; `None` elsewhere, and where the kernel has no userfaultfd for that.
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
                    "block {id}: its file system hands out huge pages, so more is allocated than comes: {why}"
                );
                None
            }
        }
    }

    fn new(backing: &Backing, huge_page: u64) -> Result<Self, BackingError> {
        let kernel = |source| BackingError::Kernel { what: "map it for placing", at: 0, source };
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
            // SAFETY: as in the drop.
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

    /// Where the huge page with this number ends, in bytes of the block, or beyond it.
    fn end_of(&self, number: u64) -> u64 {
        (number + 1) * self.huge_page - self.into_first
    }

    /// True if the huge page is written: it is open, or `length` bytes at `byte` open it.
    fn opens(&self, number: u64, byte: u64, length: usize) -> bool {
        if self.opened.contains(number) {
            return true;
        }
        let end = self.end_of(number);
        let begins = byte + self.huge_page == end;
        // What of it is outside of the block is not ours to punch.
        let opens =
            begins && length >= DENSE.min(self.huge_page as usize) && end <= self.length as u64;
        if opens {
            self.opened.set(PageRange::new(number, 1));
        }
        opens
    }

    /// Frees what was allocated with the huge pages that are open, and does not hold anything:
    /// pages that are not `filled`, or are in one of `gone`. Nobody may be placing meanwhile.
    /// Closes them.
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
                    // One at least: reserved pages are told as holes, and are there.
                    let there = backing.first_hole(rest)?.saturating_sub(rest.first).max(1);
                    let part = &bytes[done..done + (there * PAGE_SIZE) as usize];
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

/// Writes whole pages to byte `at` of a block, by `small_pages` where a write would allocate more.
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

    /// Three huge pages and a bit, as on a file system that hands them out; and how it is placed
    /// there.
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
    fn pages_are_placed_whether_they_exist_or_not() {
        for offset in [0, 3 * PAGE_SIZE] {
            let (block, small_pages) = block(offset);
            let bytes = |value: u8, pages: u64| vec![value; (pages * PAGE_SIZE) as usize];
            small_pages.write(&block.backing, 5 * PAGE_SIZE, &bytes(1, 2)).unwrap();
            // Over pages that are there, holes, and the end of a huge page.
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
            // Reserved: told as a hole, and there.
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
    fn of_a_huge_page_that_began_to_come_what_did_not_is_punched_in_the_end() {
        for offset in [0, 3 * PAGE_SIZE] {
            let (block, small_pages) = block(offset);
            let first = (HUGE - offset % HUGE) % HUGE / PAGE_SIZE;
            let all = vec![7; DENSE + PAGE];
            let dense = DENSE as u64 / PAGE_SIZE;
            let filled = MappedBitmap::private(block.geometry.pages()).unwrap();
            small_pages.write(&block.backing, first * PAGE_SIZE, &all[..DENSE]).unwrap();
            filled.set(PageRange::new(first, dense));
            // Where it does not begin, and where it is not all of the block's, it is not.
            small_pages.write(&block.backing, (first + PAGES + 1) * PAGE_SIZE, &all).unwrap();
            filled.set(PageRange::new(first + PAGES + 1, dense + 1));
            assert_eq!(small_pages.opened.count(small_pages.opened.all()), 1);
            small_pages.write(&block.backing, (first + 200) * PAGE_SIZE, &all[..PAGE]).unwrap();
            filled.set(PageRange::new(first + 200, 1));
            // As the kernel does with the rest of it.
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
