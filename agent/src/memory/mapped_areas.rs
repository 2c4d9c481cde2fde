// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mappings through which a job places pages.
//!
//! The kernel maps what is placed through a mapping. These pages would count as the agent's memory
//! a second time, so they are unmapped again every few megabytes of all blocks of the job together.
//! They stay in the file.
#![allow(unsafe_code)]

use super::backing::Backing;
use crate::lock::lock;
use pageferry_protocol::memory::{HUGE_PAGE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// The unit in bytes: what the kernel maps at once of a large page.
const PIECE: u64 = HUGE_PAGE;
/// When about so many bytes of a job are mapped, all are unmapped. Each stream needs a piece.
const MAX_MAPPED: u64 = 8 * PIECE;

/// What the kernel maps when a part of a piece is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maps {
    /// The pages that are placed.
    Pages,
    /// All of the piece, which is one page. So the mapping begins at a multiple of a piece.
    Pieces,
}

/// All areas of a job.
#[derive(Debug, Default)]
pub struct MappedAreas {
    areas: Mutex<Vec<Weak<MappedArea>>>,
    /// About how many bytes are mapped.
    mapped: AtomicU64,
}

impl MappedAreas {
    /// Maps all of a block.
    ///
    /// # Errors
    /// If there is no room for the mapping, or no memory for its bitmap.
    pub fn map(self: &Arc<Self>, backing: &Backing, maps: Maps) -> Result<Arc<MappedArea>, Errno> {
        let length = backing.length();
        let pieces = MappedBitmap::private(length.div_ceil(PIECE)).map_err(|_| Errno::NOMEM)?;
        let bytes = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
        let more = if maps == Maps::Pieces { PIECE as usize } else { 0 };
        let taken_length = bytes.checked_add(more).ok_or(Errno::NOMEM)?;
        let (access, none) = (ProtFlags::READ | ProtFlags::WRITE, ProtFlags::empty());
        let (flags, reserve) = (MapFlags::SHARED, MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
        let taken = unsafe {
            mmap_anonymous(std::ptr::null_mut(), taken_length, none, MapFlags::PRIVATE | reserve)
        }?;
        let skip = taken.addr().next_multiple_of(PIECE as usize) - taken.addr();
        let start = taken.wrapping_byte_add(if maps == Maps::Pieces { skip } else { 0 }).cast();
        let all = self.clone();
        let area = MappedArea { all, taken, taken_length, start, length, maps, pieces };
        let flags = flags | reserve | MapFlags::FIXED;
        // SAFETY: the range lies in what was taken above, and nothing else uses that.
        unsafe { mmap(start.cast(), bytes, access, flags, backing.fd(), backing.file_offset(0)) }?;
        if maps == Maps::Pages {
            // khugepaged would fill holes. A kernel without huge pages refuses.
            // SAFETY: this changes how the kernel maps pages of our own mapping, and no content.
            let _ = unsafe { madvise(start.cast(), bytes, Advice::LinuxNoHugepage) };
        }
        let area = Arc::new(area);
        let mut areas = lock(&self.areas);
        areas.retain(|other| other.strong_count() > 0);
        areas.push(Arc::downgrade(&area));
        Ok(area)
    }

    fn add(&self, bytes: u64) {
        if self.mapped.fetch_add(bytes, Ordering::Relaxed) + bytes < MAX_MAPPED {
            return;
        }
        self.mapped.store(0, Ordering::Relaxed);
        // Dropped without the lock: the last of an area unmaps it.
        let areas: Vec<_> = lock(&self.areas).iter().filter_map(Weak::upgrade).collect();
        for area in areas {
            area.unmap_all();
        }
    }
}

/// A mapping of a block's file.
#[derive(Debug)]
pub struct MappedArea {
    all: Arc<MappedAreas>,
    /// All of the address space that was taken.
    taken: *mut c_void,
    taken_length: usize,
    start: *mut u8,
    length: u64,
    maps: Maps,
    /// Pieces in which pages may be mapped.
    pieces: MappedBitmap,
}

// SAFETY: the mapping is shared memory that other processes have, too. This type never reads or
// writes it; it only tells the address, and unmaps pages, which stay in the file.
unsafe impl Send for MappedArea {}
// SAFETY: as above.
unsafe impl Sync for MappedArea {}

impl MappedArea {
    /// The address of the block's first byte. It is valid for [`MappedArea::length`] bytes, as long
    /// as this lives.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// The length of the block in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Notes that `length` bytes from byte `at` of the block were placed. If a large page ends
    /// there, it is unmapped, and if much is mapped by now, all is. Other threads may be placing
    /// there: the kernel maps it again.
    pub fn note(&self, at: u64, length: u64) {
        let (first, end) = (at / PIECE, at + length);
        let touched = PageRange::new(first, end.div_ceil(PIECE) - first);
        let new = self.pieces.set(touched);
        match self.maps {
            Maps::Pages => self.all.add(length),
            Maps::Pieces if end.is_multiple_of(PIECE) => {
                // A stream that places in order does not come back. What is new here was not
                // counted yet, and another thread may have unmapped it already.
                let counted = self.unmap(touched).saturating_sub(new) * PIECE;
                let less = |mapped: u64| Some(mapped.saturating_sub(counted));
                let all = &self.all.mapped;
                let _ = all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            }
            Maps::Pieces => self.all.add(new * PIECE),
        }
    }

    /// Unmaps all.
    ///
    /// While the kernel unmaps a large page, it has a reference to it, and nobody can free a part
    /// of it. So this comes before the last look at what could not be freed.
    pub fn unmap_all(&self) {
        self.unmap(self.pieces.all());
    }

    /// Unmaps pieces of `range`. Returns their number.
    fn unmap(&self, range: PageRange) -> u64 {
        let mut count = 0;
        self.pieces.take(range, |word, bits| {
            count += u64::from(bits.count_ones());
            for run in runs_of_word(word * WORD_BITS, bits) {
                let (first, end) = (run.first * PIECE, (run.end() * PIECE).min(self.length));
                let start = self.start.wrapping_add(first as usize).cast();
                // SAFETY: the range lies in the mapping, which is shared, so its pages stay in the
                // file. A thread that copies there gets them again.
                let done = unsafe { madvise(start, (end - first) as usize, Advice::LinuxDontNeed) };
                debug_assert!(done.is_ok(), "madvise of our own mapping");
            }
        });
        count
    }

    /// The pieces that may be mapped.
    #[cfg(test)]
    fn mapped(&self) -> Vec<u64> {
        self.pieces.runs(self.pieces.all()).flat_map(|run| run.first..run.end()).collect()
    }
}

impl Drop for MappedArea {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and nobody has a reference into it.
        let unmapped = unsafe { munmap(self.taken, self.taken_length) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memfd;

    fn area(all: &Arc<MappedAreas>, length: u64, maps: Maps) -> Arc<MappedArea> {
        let backing = Backing::new(memfd(length), 0, length).unwrap();
        all.map(&backing, maps).unwrap()
    }

    #[test]
    fn what_all_blocks_have_mapped_is_unmapped_once_it_is_much() {
        let all = Arc::default();
        let (one, other) =
            (area(&all, 40 * PIECE + 4096, Maps::Pages), area(&all, PIECE, Maps::Pages));
        one.note(PIECE - 4096, 8192);
        one.note(40 * PIECE, 4096);
        other.note(0, PIECE);
        assert_eq!((one.mapped(), other.mapped()), (vec![0, 1, 40], vec![0]));
        one.note(4 * PIECE, 7 * PIECE);
        assert_eq!((one.mapped(), other.mapped()), (vec![], vec![]));
        one.note(0, 4096);
        drop(other);
        one.note(PIECE, MAX_MAPPED);
        assert!(one.mapped().is_empty());
    }

    #[test]
    fn a_large_page_is_unmapped_when_it_ends_or_there_are_many() {
        let all = Arc::default();
        let area = area(&all, 40 * PIECE, Maps::Pieces);
        assert!(area.start().addr().is_multiple_of(PIECE as usize));
        area.note(0, PIECE / 2);
        assert_eq!(area.mapped(), [0]);
        area.note(PIECE / 2, PIECE / 2);
        assert!(area.mapped().is_empty());
        // Three streams, each in a page of its own, stay mapped until they are through.
        for _ in 0..20 {
            [0, 9, 20].into_iter().for_each(|piece| area.note(piece * PIECE, 4096));
            assert_eq!(area.mapped(), [0, 9, 20]);
        }
        area.note(10 * PIECE - 4096, 4096);
        assert_eq!(area.mapped(), [0, 20]);
        (30..35).for_each(|piece| area.note(piece * PIECE, 4096));
        assert_eq!(area.mapped(), [0, 20, 30, 31, 32, 33, 34]);
        area.note(37 * PIECE, 4096);
        assert!(area.mapped().is_empty());
        assert_eq!(all.mapped.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn threads_unmap_each_others_pieces() {
        let all = Arc::default();
        let (one, other) =
            (area(&all, 40 * PIECE, Maps::Pieces), area(&all, 40 * PIECE, Maps::Pages));
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (one, other) = (&one, &other);
                scope.spawn(move || {
                    for round in 0..3000 {
                        one.note((round * 7 + thread) % 40 * PIECE, PIECE);
                        one.note((round * 5 + thread) % 40 * PIECE, 4096);
                        other.note(round % 40 * PIECE, PIECE);
                    }
                });
            }
        });
        one.note(PIECE, MAX_MAPPED);
        other.note(PIECE, MAX_MAPPED);
        assert!(one.mapped().is_empty() && other.mapped().is_empty());
    }
}
