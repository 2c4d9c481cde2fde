//! Streams between agents.
//!
//! - [`address`]: `tcp:HOST:PORT`, `unix:PATH`, or a socket that the VMM hands over;
//! - [`unix_path`]: who listens on a path, and who removes it;
//! - [`backoff`]: what a listener does when it cannot accept a connection;
//! - [`resolve`]: name look-ups that end in time;
//! - [`stream`]: a connected stream: records in and out, with deadlines;
//! - [`socket_queue`]: how much of a stream lies in the kernel's queues;
//! - [`limiter`]: the bandwidth limit.

pub mod address;
pub mod backoff;
pub mod limiter;
pub mod resolve;
pub mod socket_queue;
pub mod stream;
pub mod unix_path;
pub mod unix_socket;

pub use address::{Address, Listener};
pub use limiter::Limiter;
pub use stream::{ReceivedRecord, RecordReader, RecordWriter, StreamSocket};

use pageferry_protocol::stream::hello::MAX_HELLO;
use pageferry_protocol::stream::{Kind, RecordError};
use std::time::Duration;

/// What can go wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address is none.
    #[error("address \"{address}\": {reason}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Connecting or listening failed.
    #[error("cannot {what} {address}")]
    Connect {
        /// What was tried.
        what: &'static str,
        /// Where.
        address: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The peer closed the connection between two records.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection inside a record.
    #[error("the connection was cut inside a record, {missing} bytes before its end")]
    Cut {
        /// Bytes that did not come.
        missing: usize,
    },
    /// The peer is silent.
    #[error("the peer was silent for {0:?}")]
    Silent(Duration),
    /// The peer began a record, and does not come to its end.
    #[error(
        "the peer did not send a whole record within {timeout:.1?}: {missing} bytes are missing"
    )]
    Slow {
        /// How long it had, since the record began.
        timeout: Duration,
        /// Bytes that did not come, as far as is known.
        missing: usize,
    },
    /// The peer takes nothing, or not enough.
    #[error("the peer did not take what was sent within {timeout:.1?}: {missing} bytes are left")]
    Stuck {
        /// How long it had.
        timeout: Duration,
        /// Bytes that it did not take.
        missing: usize,
    },
    /// The guest is paused for its hand-over, and may be no longer.
    #[error("the peer had not answered, or not taken what was sent, when that time was over")]
    StopOver,
    /// A peer that is not known yet said something else first.
    #[error(
        "{kind:?} record of {length:#x} bytes where a hello of at most {MAX_HELLO:#x} was expected"
    )]
    NoHello {
        /// What came.
        kind: Kind,
        /// Length of its payload in bytes.
        length: usize,
    },
    /// A record is malformed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The kernel refused.
    #[error("stream")]
    Kernel(#[source] std::io::Error),
}
