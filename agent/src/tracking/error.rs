// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why it is not known which pages are dirty.

use crate::hooks::HookError;
use crate::pagemap::PagemapError;
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::shm::fence::Replaced;

/// Why it is not known which pages are dirty.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// A hook of the VMM's tracker failed.
    #[error("the VMM's tracker failed")]
    Hook(#[from] HookError),
    /// The scan of a block failed.
    #[error("the write-protect scan of block {id} failed")]
    Scan {
        /// The block.
        id: u32,
        /// The cause.
        #[source]
        source: PagemapError,
    },
    /// A block is not mapped by the VMM, so it cannot be scanned.
    #[error("block {id} has no vmm_address, which write-protect scanning needs")]
    NotMapped {
        /// The block.
        id: u32,
    },
    /// The VMM has not set a dirty log.
    #[error("there is no dirty log: the VMM must set one (SET_LOG_BASE) before it migrates")]
    NoLog,
    /// The log ends before the guest's memory.
    #[error("the dirty log covers {covered:#x} pages, but block {id} ends at guest page {end:#x}")]
    ShortLog {
        /// Pages that the log covers.
        covered: u64,
        /// The block.
        id: u32,
        /// First guest page after the block.
        end: u64,
    },
    /// There is no memory for the tracker's bitmaps.
    #[error("no memory for the bitmaps of write-protect scanning")]
    NoMemory(#[from] MappingError),
    /// The VMM has given this agent up, so the log and the protection belong to another agent, or
    /// to none.
    #[error(transparent)]
    Replaced(#[from] Replaced),
    /// The file under the log, or under a discard bitmap, was truncated.
    #[error("the file under the {what} was truncated: it is unknown which pages are {state}")]
    Lost {
        /// The file that was truncated.
        what: &'static str,
        /// The set of pages that is now unknown.
        state: &'static str,
    },
}
