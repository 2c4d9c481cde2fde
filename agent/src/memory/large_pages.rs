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
use super::mapped_areas::{MappedArea, MappedAreas, Maps};
use super::unsettled::Unsettled;
use pageferry_protocol::memory::{HUGE_PAGE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use rustix::io::Errno;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A mapping of a block's file whose large pages are filled by copies.
#[derive(Debug)]
pub struct LargePages {
    // Before the mapping is removed.
    guard: GuardedRange,
    area: Arc<MappedArea>,
    /// Pieces of 2 MiB that are large pages.
    large: MappedBitmap,
    /// Those that are not settled yet.
    unsettled: Unsettled,
    supply: Arc<HugePageSupply>,
    /// Pieces of the last content, each in the slot of its number. Streams are in different pieces.
    last: [AtomicU64; 16],
}

impl LargePages {
    /// Maps a file of shared memory. `None` if the block does not begin at a large page of its
    /// file, or has none.
    ///
    /// # Errors
    /// If there is no room for the mapping.
    pub fn new(
        backing: &Backing, supply: &Arc<HugePageSupply>, areas: &Arc<MappedAreas>,
    ) -> Result<Option<Self>, BackingError> {
        let kernel =
            |source| BackingError::Kernel { what: "map the file for large pages", at: 0, source };
        let length = backing.length();
        if !backing.file_offset(0).is_multiple_of(HUGE_PAGE) || length < HUGE_PAGE {
            return Ok(None);
        }
        let bitmap = || MappedBitmap::private(length / HUGE_PAGE).map_err(|_| kernel(Errno::NOMEM));
        let (large, unsettled) = (bitmap()?, Unsettled::new(bitmap()?, HUGE_PAGE, 0));
        let area = areas.map(backing, Maps::Pieces).map_err(kernel)?;
        let start = area.start().addr();
        let guard = GuardedRange::new(start..start + area.length() as usize);
        let last = std::array::from_fn(|_| AtomicU64::new(u64::MAX));
        Ok(Some(Self { guard, area, large, unsettled, supply: supply.clone(), last }))
    }

    /// True if the 2 MiB with this byte of the block are a large page.
    pub fn is_large(&self, byte: u64) -> bool {
        byte / HUGE_PAGE < self.large.pages() && self.large.contains(byte / HUGE_PAGE)
    }

    /// Notes that content comes for the 2 MiB with this byte of the block. True if the content
    /// before it, as far as is remembered, was for them, too.
    pub fn comes_again(&self, byte: u64) -> bool {
        let piece = byte / HUGE_PAGE;
        let slot = &self.last[piece as usize % self.last.len()];
        // Only a guess: another stream may use the slot.
        slot.swap(piece, Ordering::Relaxed) == piece
    }

    /// Makes a large page of the 2 MiB with this byte of the block, in which there is a page. False
    /// if the kernel does not.
    pub fn make(&self, byte: u64) -> bool {
        let piece = byte / HUGE_PAGE;
        if piece >= self.large.pages() || !self.supply.may_ask() {
            return false;
        }
        let start = self.area.start().wrapping_add((piece * HUGE_PAGE) as usize).cast();
        // SAFETY: the range lies in the mapping. Its pages keep their content.
        let made = unsafe { libc::madvise(start, HUGE_PAGE as usize, libc::MADV_COLLAPSE) };
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
        assert!(end <= self.area.length(), "a copy of {} bytes to {at:#x}", bytes.len());
        // SAFETY: the target lies in the mapping, as just checked. If the file loses its pages, the
        // guard replaces them. Other processes share this memory, but a copy of bytes has no
        // invalid values, and the guest does not run while it is placed.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.area.start().add(at as usize),
                bytes.len(),
            );
        }
        if self.guard.was_lost() {
            return Err(BackingError::Lost { at });
        }
        self.area.note(at, bytes.len() as u64);
        Ok(())
    }

    /// Pages of this range were freed.
    pub fn freed(&self, range: PageRange) {
        self.unsettled.add_of(range, |piece| self.is_large(piece * HUGE_PAGE));
    }

    /// Frees the pages of large pages that did not arrive, or were freed. A large page of which the
    /// kernel keeps a freed part is replaced by small ones: see [`Unsettled::settle`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn settle(
        &self, memory: &GuestMemory, backing: &Backing, filled: &MappedBitmap,
        gone: &[&MappedBitmap],
    ) -> Result<(), BackingError> {
        self.area.unmap_all();
        let write = |at, bytes: &[u8]| backing.write(at, bytes);
        for piece in self.unsettled.settle(memory, backing, filled, gone, write)? {
            self.large.clear(PageRange::new(piece, 1));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::spare_memory::SpareMemory;
    use crate::memory::test_support::memfd;
    use pageferry_protocol::memory::PAGE_SIZE;
    use rustix::pipe::{SpliceFlags, pipe, splice};
    use std::os::fd::OwnedFd;

    const PAGES: u64 = HUGE_PAGE / PAGE_SIZE;

    fn supply() -> Arc<HugePageSupply> {
        Arc::new(HugePageSupply::new(&Arc::default(), SpareMemory::unlimited()))
    }

    /// A block of three large pages and a few small ones, and a second descriptor of its file.
    fn block() -> (Backing, LargePages, OwnedFd) {
        let length = 3 * HUGE_PAGE + 5 * PAGE_SIZE;
        let fd = memfd(length);
        let file = fd.try_clone().unwrap();
        let backing = Backing::new(fd, 0, length).unwrap();
        let large = LargePages::new(&backing, &supply(), &Arc::default()).unwrap().unwrap();
        (backing, large, file)
    }

    /// Makes a large page. False, and says so, if this kernel makes none.
    fn make(backing: &Backing, large: &LargePages, piece: u64) -> bool {
        backing.write(piece * HUGE_PAGE, &[1; PAGE_SIZE as usize]).unwrap();
        let made = large.make(piece * HUGE_PAGE + 5);
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
        assert!(large.is_large(HUGE_PAGE) && !large.is_large(0) && !large.is_large(3 * HUGE_PAGE));
        large.copy(HUGE_PAGE, &vec![7; 300 << 10]).unwrap();
        let arrived = filled(&backing, &[PageRange::new(PAGES, 75)]);
        large.settle(&GuestMemory::default(), &backing, &arrived, &[]).unwrap();
        assert_eq!(backing.allocated_pages(), 75);
        assert_eq!((content(&backing, PAGES), content(&backing, PAGES + 74)), (7, 7));
        // A page that was freed is allocated again by its content.
        large.copy(HUGE_PAGE + (100 << 12), &[9; PAGE_SIZE as usize]).unwrap();
        assert_eq!((backing.allocated_pages(), content(&backing, PAGES + 100)), (76, 9));
        // The end of the block has no large page.
        assert!(!large.make(3 * HUGE_PAGE));
    }

    #[test]
    fn a_large_page_that_the_kernel_keeps_is_replaced_by_small_ones() {
        let (backing, large, file) = block();
        if !make(&backing, &large, 0) {
            return;
        }
        large.copy(0, &vec![5; HUGE_PAGE as usize]).unwrap();
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
        rustix::fs::ftruncate(&file, HUGE_PAGE).unwrap();
        let error = large.copy(HUGE_PAGE + 8, &[1; 16]).unwrap_err();
        assert!(matches!(error, BackingError::Lost { at } if at == HUGE_PAGE + 8), "{error}");
    }

    #[test]
    fn blocks_that_do_not_begin_at_a_large_page_have_none() {
        let length = 2 * HUGE_PAGE;
        let backing = |offset| Backing::new(memfd(length + offset), offset, length).unwrap();
        assert!(
            LargePages::new(&backing(PAGE_SIZE), &supply(), &Arc::default()).unwrap().is_none()
        );
        assert!(
            LargePages::new(&backing(HUGE_PAGE), &supply(), &Arc::default()).unwrap().is_some()
        );
        // The kernel makes none of a hole, and is not asked for ever.
        let supply = supply();
        let large = LargePages::new(&backing(0), &supply, &Arc::default()).unwrap().unwrap();
        for _ in 0..4 {
            assert!(!large.make(0));
        }
        assert!(!supply.may_ask());
    }

    #[test]
    fn content_that_comes_in_order_comes_again() {
        let (_, large, _) = block();
        let comes = [
            0,
            4096,
            HUGE_PAGE,
            HUGE_PAGE + 8192,
            8192,
            2 * HUGE_PAGE,
            18 * HUGE_PAGE,
            2 * HUGE_PAGE,
        ];
        let again = comes.map(|byte| large.comes_again(byte));
        assert_eq!(again, [false, true, false, true, true, false, false, false]);
    }
}
