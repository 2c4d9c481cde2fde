// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages of 2 MiB in shared memory, where all of their small pages arrive.
//!
//! A large page is allocated once instead of 512 times, and the guest is faster with it afterwards.
//! The kernel makes one of a range in which there is a page when it is told to (`MADV_COLLAPSE`),
//! whatever the settings for huge pages of the file system are (only `deny` forbids it). The
//! content then goes into it by a copy, which takes no lock of the file.
//!
//! The pages that do not arrive after all are freed at the end of the pass ([`Unsettled`]), when no
//! thread places: until then they take memory that the source has for them, too. So
//! [`never-populate`](crate::invariants#never-populate) holds.
//!
//! If a page is freed later, the kernel splits the large page.
#![allow(unsafe_code)]

use super::backing::{Backing, BackingError};
use super::bus_guard::GuardedRange;
use super::guest_memory::GuestMemory;
use super::huge_page_supply::HugePageSupply;
use super::mapped_pieces::{MappedPieces, Maps};
use super::unsettled::Unsettled;
use super::zero::is_zero;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::sync::Arc;

/// Bytes of a large page.
pub const LARGE: u64 = 2 << 20;

/// A mapping of a block's file whose large pages are filled by copies.
#[derive(Debug)]
pub struct LargePages {
    // Before the mapping is removed.
    guard: GuardedRange,
    /// All of the address space that was taken, so that the block lies in it as in the file.
    _reserved: Range,
    /// The block.
    start: *mut u8,
    length: u64,
    /// Pieces of 2 MiB that are large pages.
    large: MappedBitmap,
    /// Those that are not settled yet.
    unsettled: Unsettled,
    mapped: MappedPieces,
    supply: Arc<HugePageSupply>,
}

#[derive(Debug)]
struct Range {
    start: *mut c_void,
    length: usize,
}

// SAFETY: the mapping is shared memory that other processes have, too. It is only written, by
// copies of bytes, to ranges that no other thread of this agent writes to.
unsafe impl Send for LargePages {}
// SAFETY: as above.
unsafe impl Sync for LargePages {}

impl LargePages {
    /// Maps a file of shared memory. `None` if the block does not begin at a large page of its
    /// file, or has none.
    ///
    /// # Errors
    /// If there is no room for the mapping.
    pub fn new(
        backing: &Backing, supply: &Arc<HugePageSupply>,
    ) -> Result<Option<Self>, BackingError> {
        let kernel =
            |source| BackingError::Kernel { what: "map the file for large pages", at: 0, source };
        let length = backing.length();
        if !backing.file_offset(0).is_multiple_of(LARGE) || length < LARGE {
            return Ok(None);
        }
        let bitmap = || MappedBitmap::private(length / LARGE).map_err(|_| kernel(Errno::NOMEM));
        let (large, unsettled) = (bitmap()?, Unsettled::new(bitmap()?, LARGE, 0));
        let mapped = MappedPieces::new(length, Maps::Pieces).map_err(|_| kernel(Errno::NOMEM))?;
        let bytes = usize::try_from(length).map_err(|_| kernel(Errno::NOMEM))?;
        let all = bytes.checked_add(LARGE as usize).ok_or_else(|| kernel(Errno::NOMEM))?;
        let (access, none) = (ProtFlags::READ | ProtFlags::WRITE, ProtFlags::empty());
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let taken = unsafe {
            mmap_anonymous(std::ptr::null_mut(), all, none, MapFlags::PRIVATE | MapFlags::NORESERVE)
        };
        let reserved = Range { start: taken.map_err(kernel)?, length: all };
        let skip = reserved.start.addr().next_multiple_of(LARGE as usize) - reserved.start.addr();
        let start = reserved.start.wrapping_byte_add(skip);
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range lies in what was taken above, and nothing else uses that.
        let placed =
            unsafe { mmap(start, bytes, access, flags, backing.fd(), backing.file_offset(0)) };
        let start: *mut u8 = placed.map_err(kernel)?.cast();
        Ok(Some(Self {
            guard: GuardedRange::new(start.addr()..start.addr() + bytes),
            _reserved: reserved,
            start,
            length,
            large,
            unsettled,
            mapped,
            supply: supply.clone(),
        }))
    }

    /// True if the 2 MiB with this byte of the block are a large page.
    pub fn is_large(&self, byte: u64) -> bool {
        byte / LARGE < self.large.pages() && self.large.contains(byte / LARGE)
    }

    /// Makes a large page of the 2 MiB with this byte of the block, in which there is a page. False
    /// if the kernel does not.
    pub fn make(&self, byte: u64) -> bool {
        let piece = byte / LARGE;
        if piece >= self.large.pages() || !self.supply.may_ask() {
            return false;
        }
        let start = self.start.wrapping_add((piece * LARGE) as usize).cast();
        // SAFETY: the range lies in the mapping. Its pages keep their content.
        let made = unsafe { libc::madvise(start, LARGE as usize, libc::MADV_COLLAPSE) };
        if made != 0 {
            self.supply
                .refused(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::NOMEM));
            return false;
        }
        self.supply.made();
        self.unsettled.add(piece);
        self.large.set(PageRange::new(piece, 1));
        true
    }

    /// Copies `bytes` to byte `at` of the block, in a large page.
    ///
    /// # Errors
    /// If the file was truncated, or there is no memory for a page that was freed meanwhile.
    pub fn copy(&self, at: u64, bytes: &[u8]) -> Result<(), BackingError> {
        let end = at + bytes.len() as u64;
        assert!(end <= self.length, "a copy of {} bytes to {at:#x}", bytes.len());
        // SAFETY: the target lies in the mapping, as just checked. If the file loses its pages, the
        // guard replaces them. Other processes share this memory, but a copy of bytes has no
        // invalid values, and the guest does not run while it is placed.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at as usize), bytes.len());
        }
        if self.guard.was_lost() {
            return Err(BackingError::Lost { at });
        }
        self.mapped.note(at, bytes.len() as u64, |at, length| self.unmap(at, length));
        Ok(())
    }

    /// Pages of this range were freed.
    pub fn freed(&self, range: PageRange) {
        let first = range.offset() / LARGE;
        let end = (range.end() * PAGE_SIZE).div_ceil(LARGE).min(self.large.pages());
        for piece in first..end {
            if self.large.contains(piece) {
                self.unsettled.add(piece);
            }
        }
    }

    /// Frees the pages of large pages that did not arrive, or were freed: see
    /// [`Unsettled::settle`].
    ///
    /// The kernel frees a part of a large page by splitting it. It cannot while somebody else has a
    /// reference to the page, such as a transfer to a disk: then it writes zeroes and keeps the
    /// memory. Such a large page is replaced by small ones.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, memory: &GuestMemory, backing: &Backing, filled: &MappedBitmap,
        gone: &[&MappedBitmap],
    ) -> Result<(), BackingError> {
        for run in self.unsettled.settle(backing, filled, gone)? {
            let piece = run.offset() / LARGE;
            if self.large.contains(piece) && backing.first_data(run)?.is_some() {
                // The VMM gives nothing back between the read and the writes.
                let _giving_back = memory.giving_back();
                self.replace(backing, piece, filled)?;
            }
        }
        Ok(())
    }

    fn replace(
        &self, backing: &Backing, piece: u64, filled: &MappedBitmap,
    ) -> Result<(), BackingError> {
        let all = PageRange::new(piece * LARGE / PAGE_SIZE, LARGE / PAGE_SIZE);
        let mut content = vec![0; LARGE as usize];
        backing.read(all.offset(), &mut content)?;
        self.large.clear(PageRange::new(piece, 1));
        // All of it goes, whoever has a reference.
        backing.punch(all)?;
        for page in filled.runs(all).flat_map(|run| run.first..run.end()) {
            let start = ((page - all.first) * PAGE_SIZE) as usize;
            let bytes = &content[start..start + PAGE_SIZE as usize];
            // Freed since it was filled, or as good as that.
            if !is_zero(bytes) {
                backing.write(page * PAGE_SIZE, bytes)?;
            }
        }
        Ok(())
    }

    fn unmap(&self, at: u64, length: u64) {
        let start = self.start.wrapping_add(at as usize).cast();
        // SAFETY: the range lies in the mapping, which is shared, so its pages stay in the file. A
        // thread that copies there gets them again.
        let unmapped = unsafe { madvise(start, length as usize, Advice::LinuxDontNeed) };
        debug_assert!(unmapped.is_ok(), "madvise of our own mapping");
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and nobody has a reference into it.
        let unmapped = unsafe { munmap(self.start, self.length) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::spare_memory::SpareMemory;
    use crate::memory::test_support::memfd;
    use rustix::pipe::{SpliceFlags, pipe, splice};
    use std::os::fd::OwnedFd;

    const PAGES: u64 = LARGE / PAGE_SIZE;

    fn supply() -> Arc<HugePageSupply> {
        Arc::new(HugePageSupply::new(&Arc::default(), SpareMemory::unlimited()))
    }

    /// A block of three large pages and a few small ones, and a second descriptor of its file.
    fn block() -> (Backing, LargePages, OwnedFd) {
        let length = 3 * LARGE + 5 * PAGE_SIZE;
        let fd = memfd(length);
        let file = fd.try_clone().unwrap();
        let backing = Backing::new(fd, 0, length).unwrap();
        let large = LargePages::new(&backing, &supply()).unwrap().unwrap();
        (backing, large, file)
    }

    /// Makes a large page. False, and says so, if this kernel makes none.
    fn make(backing: &Backing, large: &LargePages, piece: u64) -> bool {
        backing.write(piece * LARGE, &[1; PAGE_SIZE as usize]).unwrap();
        let made = large.make(piece * LARGE + 5);
        if !made {
            eprintln!("skipped: the kernel makes no large pages");
        }
        made
    }

    fn filled(backing: &Backing, runs: &[PageRange]) -> MappedBitmap {
        let filled = MappedBitmap::private(backing.length() / PAGE_SIZE).unwrap();
        for run in runs {
            filled.set(*run);
        }
        filled
    }

    fn content(backing: &Backing, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE as usize];
        backing.read(page * PAGE_SIZE, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
        bytes[0]
    }

    #[test]
    fn what_does_not_arrive_is_freed_when_the_pass_ends() {
        let (backing, large, _) = block();
        if !make(&backing, &large, 1) {
            return;
        }
        assert_eq!(backing.allocated_pages(), PAGES);
        assert!(large.is_large(LARGE) && !large.is_large(0) && !large.is_large(3 * LARGE));
        large.copy(LARGE, &vec![7; 300 << 10]).unwrap();
        let arrived = filled(&backing, &[PageRange::new(PAGES, 75)]);
        large.settle(&GuestMemory::default(), &backing, &arrived, &[]).unwrap();
        assert_eq!(backing.allocated_pages(), 75);
        assert_eq!((content(&backing, PAGES), content(&backing, PAGES + 74)), (7, 7));
        // A page that was freed is allocated again by its content.
        large.copy(LARGE + (100 << 12), &[9; PAGE_SIZE as usize]).unwrap();
        assert_eq!((backing.allocated_pages(), content(&backing, PAGES + 100)), (76, 9));
        // The end of the block has no large page.
        assert!(!large.make(3 * LARGE));
    }

    #[test]
    fn a_large_page_that_the_kernel_keeps_is_replaced_by_small_ones() {
        let (backing, large, file) = block();
        if !make(&backing, &large, 0) {
            return;
        }
        large.copy(0, &vec![5; LARGE as usize]).unwrap();
        let arrived = filled(&backing, &[PageRange::new(0, PAGES)]);
        // Somebody has a reference to some of its pages.
        let (reader, writer) = pipe().unwrap();
        let length = 8 * PAGE_SIZE as usize;
        splice(&file, Some(&mut 0), &writer, None, length, SpliceFlags::empty()).unwrap();
        let zero = PageRange::new(20, 3);
        arrived.clear(zero);
        backing.punch(zero).unwrap();
        large.freed(zero);
        large.settle(&GuestMemory::default(), &backing, &arrived, &[]).unwrap();
        assert_eq!(backing.allocated_pages(), PAGES - 3);
        assert!(!large.is_large(0));
        for (page, wanted) in [(0, 5), (19, 5), (20, 0), (22, 0), (23, 5), (PAGES - 1, 5)] {
            assert_eq!(content(&backing, page), wanted, "page {page}");
        }
        drop((reader, writer));
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let (backing, large, file) = block();
        if !make(&backing, &large, 1) {
            return;
        }
        rustix::fs::ftruncate(&file, LARGE).unwrap();
        let error = large.copy(LARGE + 8, &[1; 16]).unwrap_err();
        assert!(matches!(error, BackingError::Lost { at } if at == LARGE + 8), "{error}");
    }

    #[test]
    fn blocks_that_do_not_begin_at_a_large_page_have_none() {
        let length = 2 * LARGE;
        let backing = |offset| Backing::new(memfd(length + offset), offset, length).unwrap();
        assert!(LargePages::new(&backing(PAGE_SIZE), &supply()).unwrap().is_none());
        assert!(LargePages::new(&backing(LARGE), &supply()).unwrap().is_some());
        // The kernel makes none of a hole, and is not asked for ever.
        let supply = supply();
        let large = LargePages::new(&backing(0), &supply).unwrap().unwrap();
        for _ in 0..4 {
            assert!(!large.make(0));
        }
        assert!(!supply.may_ask());
    }
}
