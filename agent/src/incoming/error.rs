// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a destination refuses what comes.

use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::error::size as bytes;
use pageferry_protocol::stream::table::TableMismatch;

/// Why a destination refuses what comes.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// The source's blocks are not those of this VMM.
    #[error(transparent)]
    Table(#[from] TableMismatch),
    /// The totals of both sides differ.
    #[error("totals differ: {field} is {theirs} at the source and {own} here")]
    Totals {
        /// The field.
        field: &'static str,
        /// The source's.
        theirs: u64,
        /// This side's.
        own: u64,
    },
    /// A host page came in pieces that do not belong together.
    #[error(
        "record for pages {first:#x} + {count:#x} of block {id} before host page {open:#x} was whole"
    )]
    HostPageInterrupted {
        /// The block.
        id: u32,
        /// First page.
        first: u64,
        /// Page count.
        count: u64,
        /// The host page that is not whole.
        open: u64,
    },
    /// Compressed pages do not decompress.
    #[error("data record for pages {first:#x} + {count:#x} of block {id}")]
    Decompress {
        /// The block.
        id: u32,
        /// First page.
        first: u64,
        /// Page count.
        count: u64,
        /// What is wrong.
        #[source]
        source: DecompressError,
    },
    /// The destination has host pages too large for postcopy.
    #[error(
        "block {id}: the host page size is {}, postcopy takes at most {}",
        bytes(*size), bytes(*limit)
    )]
    HostPageTooLarge {
        /// The block.
        id: u32,
        /// Size of a host page in bytes.
        size: u64,
        /// The largest that can be placed at once, in bytes.
        limit: u64,
    },
    /// The kernel does not report missing pages of the destination's memory.
    #[error(
        "block {id} is a file on a disk at the destination, which userfaultfd cannot register: postcopy and hybrid take memfds, tmpfs and hugetlbfs; migrate with precopy"
    )]
    OnDisk {
        /// The block.
        id: u32,
    },
    /// A block is not mapped at the destination.
    #[error("block {id} has no vmm_address at the destination, which postcopy needs")]
    NotMapped {
        /// The block.
        id: u32,
    },
}

impl IncomingError {
    /// The code by which the source is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::HostPageTooLarge { .. } | Self::OnDisk { .. } | Self::NotMapped { .. } => {
                ErrorCode::Unsupported
            }
            _ => ErrorCode::Invalid,
        }
    }
}

/// Why a compressed record is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// The compression of the record was not negotiated.
    #[error("flag {flag:#x}, {method}, was not negotiated on this stream")]
    NotNegotiated {
        /// The flag of the record.
        flag: u16,
        /// The compression that it stands for.
        method: &'static str,
    },
    /// The payload holds fewer bytes than the pages.
    #[error("{length:#x} bytes of {method} hold {found:#x} bytes, expected {expected:#x}")]
    Short {
        /// The compression.
        method: &'static str,
        /// Length of the payload in bytes.
        length: usize,
        /// Bytes that came out of it.
        found: usize,
        /// Bytes of the pages.
        expected: usize,
    },
    /// The payload holds more bytes than the pages, or is malformed.
    #[error(
        "{length:#x} bytes of {method} cannot be decompressed to {expected:#x} bytes: {reason}"
    )]
    Broken {
        /// The compression.
        method: &'static str,
        /// Length of the payload in bytes.
        length: usize,
        /// Bytes of the pages.
        expected: usize,
        /// The error of the decompressor.
        reason: String,
    },
}
