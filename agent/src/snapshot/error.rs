// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a snapshot is not made.

use pageferry_protocol::error::size as bytes;

/// Why a snapshot is not made.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Host pages are too large for a background snapshot.
    #[error(
        "block {id}: the host page size is {}, a background snapshot takes at most {}: use mode paused",
        bytes(*size), bytes(*limit)
    )]
    HostPageTooLarge {
        /// The block.
        id: u32,
        /// Size of a host page in bytes.
        size: u64,
        /// The largest that can be captured at once, in bytes.
        limit: u64,
    },
    /// The kernel cannot protect memory of this kind.
    #[error(
        "block {id} is a file on a disk, which cannot be protected against writes: a background snapshot takes memfds, tmpfs and hugetlbfs; use mode paused"
    )]
    OnDisk {
        /// The block.
        id: u32,
    },
    /// The VMM frees memory without a request, and the file does not tell its holes.
    #[error(
        "block {id} has huge pages, whose holes nobody tells, and its VMM frees memory without a request \
         (unannounced-frees): use mode paused"
    )]
    UnannouncedFrees {
        /// The block.
        id: u32,
    },
    /// The thread that handles write faults failed.
    #[error("writes into protected memory are not answered as they should be; the log says why")]
    Faults,
    /// The agent does not know what changed since the base of an increment.
    #[error("{0}: save all of it, with track on (--track) if increments are to follow")]
    NoIncrement(String),
}
