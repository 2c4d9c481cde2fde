// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is mapped of a file into which the agent places pages.
//!
//! The kernel maps what is placed through a mapping. These pages would count as the agent's memory
//! a second time, so they are unmapped again every few megabytes. They stay in the file.

use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use std::sync::atomic::{AtomicU64, Ordering};

/// The unit in bytes.
const PIECE: u64 = 2 << 20;
/// When so many bytes were placed, they are unmapped.
const MAX_MAPPED: u64 = 8 << 20;

/// Pieces of a block in which pages may be mapped.
#[derive(Debug)]
pub struct MappedPieces {
    pieces: MappedBitmap,
    length: u64,
    /// Bytes that were placed since the last time that pieces were unmapped.
    placed: AtomicU64,
}

impl MappedPieces {
    /// For a block of `length` bytes.
    ///
    /// # Errors
    /// If there is no memory for the bitmap.
    pub fn new(length: u64) -> Result<Self, MappingError> {
        let pieces = MappedBitmap::private(length.div_ceil(PIECE))?;
        Ok(Self { pieces, length, placed: AtomicU64::new(0) })
    }

    /// Notes that `length` bytes from byte `at` of the block were placed. If that is much by now,
    /// calls `unmap` with the ranges to unmap: byte and length. Other threads may be placing there.
    pub fn note(&self, at: u64, length: u64, mut unmap: impl FnMut(u64, u64)) {
        let first = at / PIECE;
        self.pieces.set(PageRange::new(first, (at + length).div_ceil(PIECE) - first));
        if self.placed.fetch_add(length, Ordering::Relaxed) + length < MAX_MAPPED {
            return;
        }
        self.placed.store(0, Ordering::Relaxed);
        self.pieces.take(self.pieces.all(), |word, bits| {
            for run in runs_of_word(word * WORD_BITS, bits) {
                let (start, end) = (run.first * PIECE, (run.end() * PIECE).min(self.length));
                unmap(start, end - start);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_placed_is_unmapped_once_it_is_much() {
        let length = 40 * PIECE + 4096;
        let mapped = MappedPieces::new(length).unwrap();
        let mut unmapped = Vec::new();
        mapped.note(PIECE - 4096, 8192, |at, length| unmapped.push((at, length)));
        mapped.note(length - 4096, 4096, |at, length| unmapped.push((at, length)));
        assert_eq!(unmapped, []);
        mapped.note(4 * PIECE, 4 * PIECE, |at, length| unmapped.push((at, length)));
        assert_eq!(unmapped, [(0, 2 * PIECE), (4 * PIECE, 4 * PIECE), (40 * PIECE, 4096)]);
        mapped.note(0, 4096, |_, _| panic!("it is little again"));
    }
}
