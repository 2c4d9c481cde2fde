// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a destination refuses what comes.

use super::decompress::DecompressError;
use pageferry_protocol::stream::table::TableMismatch;

/// Why a destination refuses what comes.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// The source's blocks are not those of this VMM.
    #[error(transparent)]
    Table(#[from] TableMismatch),
    /// A stream ended another pass than the one that runs.
    #[error("stream {stream} ended pass {found}, expected is pass {expected}")]
    Pass {
        /// The stream.
        stream: u16,
        /// Pass in the record.
        found: u64,
        /// Pass that runs.
        expected: u64,
    },
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
    Torn {
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
    Compressed {
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
}
