// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors about records of a peer that are well-formed, but not allowed where they were received.
//!
//! The source and the destination both read records, so both use these errors.

use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::control::reply::RemoteError;
use pageferry_protocol::stream::Kind;
use pageferry_protocol::stream::answer::decode_error;
use pageferry_protocol::stream::hello::HelloError;

/// An error about a record whose header, lengths and checksum are right.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The payload does not decode.
    #[error("{kind} record")]
    Payload {
        /// Kind of the record.
        kind: &'static str,
        /// What is wrong with the payload.
        #[source]
        source: DecodeError,
    },
    /// The record is of a kind that is not allowed here.
    #[error("{found} record where {expected} was expected")]
    Unexpected {
        /// Kind of the record.
        found: String,
        /// The record that was expected.
        expected: &'static str,
    },
    /// The record is about a block that does not exist.
    #[error("record for block {id}, which does not exist")]
    NoBlock {
        /// The block.
        id: u32,
    },
    /// The record is about pages outside of its block.
    #[error("record for pages {first:#x} + {count:#x} of block {id}, which has {pages:#x}")]
    Outside {
        /// The block.
        id: u32,
        /// First page of the record.
        first: u64,
        /// Number of pages of the record.
        count: u64,
        /// Number of pages of the block.
        pages: u64,
    },
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
    /// The first record of a stream does not decode.
    #[error("hello")]
    Hello(#[from] HelloError),
    /// The peer failed and sent its error.
    #[error("the peer failed: {0}")]
    Peer(RemoteError),
}

impl StreamError {
    /// The error for a record that is not allowed here. If the record is the peer's own error,
    /// returns that error.
    pub fn unexpected(kind: Kind, payload: &[u8], expected: &'static str) -> Self {
        match kind {
            Kind::Error => decode_remote(payload).map_or_else(|error| error, Self::Peer),
            _ => Self::Unexpected { found: format!("{kind:?}"), expected },
        }
    }
}

/// Decodes the error that a peer sent.
///
/// # Errors
/// If the payload does not decode.
pub fn decode_remote(payload: &[u8]) -> Result<RemoteError, StreamError> {
    decode_error(payload).map_err(|source| StreamError::Payload { kind: "error", source })
}
