//! Records of a peer that do not belong where they came.
//!
//! Source and destination read records alike, so the errors stand here, below both.

use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::control::reply::RemoteError;
use pageferry_protocol::stream::Kind;
use pageferry_protocol::stream::answer::decode_error;
use pageferry_protocol::stream::hello::HelloError;

/// What is wrong with a record that is well-formed by itself.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The payload does not decode.
    #[error("{kind} record")]
    Payload {
        /// Kind of the record.
        kind: &'static str,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// The record has no place here.
    #[error("{found} record where {expected} was expected")]
    Unexpected {
        /// What came.
        found: String,
        /// What should have come.
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
        /// First page.
        first: u64,
        /// Page count.
        count: u64,
        /// Pages in the block.
        pages: u64,
    },
    /// The first record of a stream does not decode.
    #[error("hello")]
    Hello(#[from] HelloError),
    /// The peer failed, and said why.
    #[error("the peer failed: {0}")]
    Peer(RemoteError),
}

impl StreamError {
    /// The error for a record that has no place. If the peer sent its own error, that is the one.
    pub fn unexpected(kind: Kind, payload: &[u8], expected: &'static str) -> Self {
        match kind {
            Kind::Error => decode_remote(payload).map_or_else(|error| error, Self::Peer),
            _ => Self::Unexpected { found: format!("{kind:?}"), expected },
        }
    }
}

/// The error that a peer sent.
///
/// # Errors
/// If it does not decode.
pub fn decode_remote(payload: &[u8]) -> Result<RemoteError, StreamError> {
    decode_error(payload).map_err(|source| StreamError::Payload { kind: "error", source })
}
