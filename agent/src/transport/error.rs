// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with a connection.

use super::unix_socket::UntrustedPeer;
use crate::cancel::CancelError;
use crate::trust::TrustError;
use pageferry_protocol::stream::hello::MAX_HELLO;
use pageferry_protocol::stream::{Kind, RecordError};
use std::net::IpAddr;
use std::time::Duration;

/// What can go wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The job was cancelled while it waited.
    #[error(transparent)]
    Cancel(#[from] CancelError),
    /// The address is malformed, or the descriptor is not a connected stream socket.
    #[error("address \"{address}\": {reason}")]
    Address {
        /// The address as the user wrote it; "fd" for a descriptor.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Guest memory would cross a network in the clear.
    #[error(
        "address \"{address}\": {ip} is not a loopback address, so guest memory would cross the \
         network in the clear; allowed are tls:HOST:PORT, unix:PATH, tcp: with a loopback address \
         such as 127.0.0.1, and any address if the agent is started with --insecure"
    )]
    PlainNetwork {
        /// The address as the user wrote it.
        address: String,
        /// One of its addresses, which is not loopback.
        ip: IpAddr,
    },
    /// Connecting, listening, or the look-up of the name failed.
    #[error("cannot {what} {address}")]
    Connect {
        /// What was tried.
        what: &'static str,
        /// The address for which it was tried.
        address: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The peer closed the connection between two records.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection inside a record.
    #[error("the connection was cut inside a record, {missing} bytes before its end")]
    ClosedInRecord {
        /// Bytes of the record that were not received.
        missing: usize,
    },
    /// The peer did not begin a record, or did not answer the kernel's probes, for this long.
    #[error("the peer was silent for {0:?}")]
    Silent(Duration),
    /// The peer began a record and did not finish it in time.
    #[error(
        "the peer did not send a whole record within {timeout:.1?}: {missing} bytes are missing"
    )]
    RecordTimeout {
        /// How long the peer had, from the beginning of the record.
        timeout: Duration,
        /// Bytes that were not received. If the header is incomplete, only the header's bytes are
        /// counted.
        missing: usize,
    },
    /// The peer did not receive the bytes of a write in time.
    #[error("the peer did not take what was sent within {timeout:.1?}")]
    SendTimeout {
        /// How long the peer had.
        timeout: Duration,
    },
    /// The guest is paused for its hand-over, and the deadline of the stop has passed. The error
    /// that contains this one names the time limit.
    #[error("the peer did not answer, or did not receive what was sent, before that time was over")]
    StopDeadlinePassed,
    /// The first record of a peer that has not said hello is something else, or too long.
    #[error(
        "{kind:?} record of {length:#x} bytes where a hello of at most {MAX_HELLO:#x} was expected"
    )]
    HelloExpected {
        /// Kind of the record.
        kind: Kind,
        /// Length of its payload in bytes.
        length: usize,
    },
    /// The peer speaks TLS, and this side does not.
    #[error("the other side speaks TLS: both addresses must be tls:, or neither of them")]
    SpeaksTls,
    /// The other end of a UNIX socket is another user's.
    #[error(transparent)]
    User(#[from] UntrustedPeer),
    /// A record is malformed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The peer is not trusted, or a record was changed on its way.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A system call on the socket failed.
    #[error("stream")]
    Kernel(#[source] std::io::Error),
}
