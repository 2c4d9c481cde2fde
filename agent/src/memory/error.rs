// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with the memory of a guest.

use super::backing::BackingError;
use super::block::Block;
use super::page_placer::PlaceError;
use super::pool::{self, ReserveError};
use pageferry_protocol::shm::MappingError;

/// What can go wrong with the memory of a guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It is not known which pages are still to come.
    #[error("block {id} has no bitmap of owed pages, or its file was truncated")]
    OwedUnknown {
        /// The block.
        id: u32,
    },
    /// The file under a block failed.
    #[error("block {id}")]
    Backing {
        /// The block.
        id: u32,
        /// What is wrong.
        #[source]
        source: BackingError,
    },
    /// There is no memory for a bitmap or a buffer.
    #[error("memory for a bitmap or a buffer")]
    Bitmap(#[from] MappingError),
    /// Nothing can be written to the file of a block.
    #[error(
        "block {id} is sealed against writing (F_SEAL_WRITE or F_SEAL_FUTURE_WRITE): no guest can come into it"
    )]
    Sealed {
        /// The block.
        id: u32,
    },
    /// A clone's memory is that of its image and of nothing else.
    #[error("block {id} is a clone's, into which only a restore with a shared base brings a guest")]
    Clone {
        /// The block.
        id: u32,
    },
    /// There are not enough huge pages for the guest.
    #[error(transparent)]
    HugePages(#[from] ReserveError),
    /// A page could not be placed because the host has no memory for it.
    #[error("{advice}")]
    NoMemory {
        /// What an operator can do.
        advice: String,
        /// What could not be done.
        #[source]
        source: PlaceError,
    },
    /// A page could not be placed.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

impl MemoryError {
    /// The error for a page of `block` that could not be placed. If the host has no
    /// memory for it, the error says what an operator can do.
    pub fn not_placed(block: &Block, error: PlaceError) -> Self {
        if error.lacks_memory() {
            Self::NoMemory { advice: pool::advice(block), source: error }
        } else {
            Self::Place(error)
        }
    }
}
