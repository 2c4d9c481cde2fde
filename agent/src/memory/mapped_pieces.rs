// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped of a file into which the agent places pages.
//!
//! The kernel maps what is placed through a mapping. These pages would count as the agent's memory
//! a second time, so they are unmapped again every few megabytes. They stay in the file.

use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use std::sync::atomic::{AtomicU64, Ordering};

/// The unit in bytes: what the kernel maps at once of a large page.
const PIECE: u64 = 2 << 20;

/// What the kernel maps when a part of a piece is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maps {
    /// The pages that are placed.
    Pages,
    /// All of the piece: it is one page.
    Pieces,
}

impl Maps {
    /// When so many bytes are mapped, all are unmapped.
    fn most(self) -> u64 {
        match self {
            Self::Pages => 8 << 20,
            // Each stream needs a piece of its own.
            Self::Pieces => 8 * PIECE,
        }
    }
}

/// Pieces of a block in which pages may be mapped.
#[derive(Debug)]
pub struct MappedPieces {
    pieces: MappedBitmap,
    length: u64,
    maps: Maps,
    /// About how many bytes are mapped.
    mapped: AtomicU64,
}

impl MappedPieces {
    /// For a block of `length` bytes.
    ///
    /// # Errors
    /// If there is no memory for the bitmap.
    pub fn new(length: u64, maps: Maps) -> Result<Self, MappingError> {
        let pieces = MappedBitmap::private(length.div_ceil(PIECE))?;
        Ok(Self { pieces, length, maps, mapped: AtomicU64::new(0) })
    }

    /// Notes that `length` bytes from byte `at` of the block were placed. If a large page ends
    /// there, or much is mapped by now, calls `unmap` with the ranges to unmap: byte and length.
    /// Other threads may be placing there.
    pub fn note(&self, at: u64, length: u64, mut unmap: impl FnMut(u64, u64)) {
        let (first, end) = (at / PIECE, at + length);
        let touched = PageRange::new(first, end.div_ceil(PIECE) - first);
        let new = self.pieces.set(touched);
        let added = match self.maps {
            Maps::Pages => length,
            Maps::Pieces => new * PIECE,
        };
        let mapped = self.mapped.fetch_add(added, Ordering::Relaxed) + added;
        if mapped >= self.maps.most() {
            self.mapped.store(0, Ordering::Relaxed);
            self.take(self.pieces.all(), unmap);
        } else if self.maps == Maps::Pieces && end.is_multiple_of(PIECE) {
            // A stream that places in order does not come back.
            let unmapped = self.take(touched, &mut unmap) * PIECE;
            let less = |mapped: u64| Some(mapped.saturating_sub(unmapped));
            let _ = self.mapped.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }

    /// Unmaps pieces of `range`. Returns their number.
    fn take(&self, range: PageRange, mut unmap: impl FnMut(u64, u64)) -> u64 {
        let mut taken = 0;
        self.pieces.take(range, |word, bits| {
            taken += u64::from(bits.count_ones());
            for run in runs_of_word(word * WORD_BITS, bits) {
                let (start, end) = (run.first * PIECE, (run.end() * PIECE).min(self.length));
                unmap(start, end - start);
            }
        });
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_placed_is_unmapped_once_it_is_much() {
        let length = 40 * PIECE + 4096;
        let mapped = MappedPieces::new(length, Maps::Pages).unwrap();
        let mut unmapped = Vec::new();
        mapped.note(PIECE - 4096, 8192, |at, length| unmapped.push((at, length)));
        mapped.note(length - 4096, 4096, |at, length| unmapped.push((at, length)));
        assert_eq!(unmapped, []);
        mapped.note(4 * PIECE, 4 * PIECE, |at, length| unmapped.push((at, length)));
        assert_eq!(unmapped, [(0, 2 * PIECE), (4 * PIECE, 4 * PIECE), (40 * PIECE, 4096)]);
        mapped.note(0, 4096, |_, _| panic!("it is little again"));
    }
    #[test]
    fn a_large_page_is_unmapped_when_it_ends_or_there_are_many() {
        let mapped = MappedPieces::new(40 * PIECE, Maps::Pieces).unwrap();
        let mut unmapped = Vec::new();
        let mut note = |at, length| {
            mapped.note(at, length, |at, length| unmapped.push((at / PIECE, length / PIECE)));
            std::mem::take(&mut unmapped)
        };
        assert_eq!(note(0, PIECE / 2), []);
        assert_eq!(note(PIECE / 2, PIECE / 2), [(0, 1)]);
        // Three streams, each in a page of its own, stay mapped until they are through.
        for _ in 0..20 {
            assert_eq!([note(0, 4096), note(9 * PIECE, 4096), note(20 * PIECE, 4096)].concat(), []);
        }
        assert_eq!(note(10 * PIECE - 4096, 4096), [(9, 1)]);
        assert_eq!(note(9 * PIECE, 4096), []);
        for piece in 30..34 {
            assert_eq!(note(piece * PIECE, 4096), []);
        }
        assert_eq!(note(37 * PIECE, 4096), [(0, 1), (9, 1), (20, 1), (30, 4), (37, 1)]);
    }
}
