// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a source does not migrate its guest.

use crate::transport::TransportError;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use std::time::Duration;

/// Why a source does not migrate its guest.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// The destination refused the stream.
    #[error("the peer refused the migration: {0}")]
    Rejected(RemoteError),
    /// The peer ended the connection instead of answering the hello.
    #[error(
        "the other side ended the connection before it accepted the guest: the destination was \
         cancelled or ended, it waits over TLS (tls:), or what listens there is no destination that \
         waits for a guest (a control socket is none)"
    )]
    NoDestination {
        /// How it ended.
        #[source]
        source: TransportError,
    },
    /// The destination does not know postcopy.
    #[error("mode is {0}, which the destination does not know: migrate with precopy")]
    ModeUnsupported(&'static str),
    /// The destination does not know the compression that is wanted.
    #[error(
        "compression is {0}, which the destination does not take: migrate with one that it takes, or with none"
    )]
    CompressionUnsupported(&'static str),
    /// The policy is to throttle the guest, and the VMM cannot.
    #[error("policy is throttle, and the VMM cannot throttle its guest: {0}")]
    NoThrottle(RemoteError),
    /// The passes did not converge, and the policy is to fail.
    #[error(
        "not converging: after {passes} passes {remaining} pages remain, which would stop the guest for {expected:?}, \
         the limit is {limit:?}"
    )]
    NotConverging {
        /// Passes that ended.
        passes: u64,
        /// Dirty pages.
        remaining: u64,
        /// How long the guest would be paused.
        expected: Duration,
        /// How long it may be paused.
        limit: Duration,
    },
    /// The destination says that it placed a page that was not sent.
    #[error("the destination says that it has page {first:#x} of block {id}, which was not sent")]
    PlacedButNotSent {
        /// The block.
        id: u32,
        /// The page.
        first: u64,
    },
    /// At a recovery: the destination asks for pages that it never lacked, or has already.
    #[error(
        "recovery: the destination lacks {pages:#x} pages from page {first:#x} of block {id}, which it has or was never missing"
    )]
    RequestedNotMissing {
        /// The block.
        id: u32,
        /// The first of them.
        first: u64,
        /// How many in the word where they begin.
        pages: u64,
    },
    /// At a recovery: the destination's host pages have another size than before.
    #[error(
        "recovery: host pages of block {id} are {size:#x} bytes at the destination, and were {expected:#x} before"
    )]
    HostPageSizeChanged {
        /// The block.
        id: u32,
        /// Bytes, as the destination says now.
        size: u64,
        /// Bytes, as it said first.
        expected: u64,
    },
    /// At a recovery: the destination's bitmaps do not cover the blocks.
    #[error(
        "recovery: bitmap of block {id} from page {found:#x}, expected is block {expected_id} from page {expected:#x}"
    )]
    BitmapOutOfOrder {
        /// Block of the record.
        id: u32,
        /// First page of the record.
        found: u64,
        /// The block that was expected.
        expected_id: u32,
        /// The page that was expected.
        expected: u64,
    },
}

impl OutgoingError {
    /// The code by which the destination is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::CompressionUnsupported(_) | Self::ModeUnsupported(_) => ErrorCode::Unsupported,
            Self::NotConverging { .. } | Self::NoThrottle(_) => ErrorCode::Other,
            _ => ErrorCode::Invalid,
        }
    }
}
