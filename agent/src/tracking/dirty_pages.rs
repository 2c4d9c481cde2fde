// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The set of dirty pages of a guest.

use crate::memory::{Block, GuestMemory};
use pageferry_protocol::shm::{MappedBitmap, MappingError};
use std::sync::Arc;

/// The dirty pages of all blocks, in the order of the memory's blocks.
#[derive(Debug, Default)]
pub struct DirtyPages {
    blocks: Vec<MappedBitmap>,
}

impl DirtyPages {
    /// No dirty page in any block of `memory`.
    ///
    /// # Errors
    /// If there is no memory for the bitmaps.
    pub fn none(memory: &GuestMemory) -> Result<Self, MappingError> {
        let bitmap = |block: &Arc<Block>| MappedBitmap::private(block.geometry.pages());
        Ok(Self { blocks: memory.blocks().iter().map(bitmap).collect::<Result<_, _>>()? })
    }

    /// The bitmap of the block at `index`.
    pub fn block(&self, index: usize) -> &MappedBitmap {
        &self.blocks[index]
    }

    /// The bitmaps of all blocks.
    pub fn all(&self) -> &[MappedBitmap] {
        &self.blocks
    }

    /// Adds the dirty pages of `other`, which belongs to the same memory.
    pub fn merge(&self, other: &Self) {
        for (own, other) in self.blocks.iter().zip(&other.blocks) {
            for (word, bits) in other.nonzero_words(other.all()) {
                own.or_word(word, bits);
            }
        }
    }

    /// The number of dirty pages.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(|bitmap| bitmap.count(bitmap.all())).sum()
    }
}
