// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Streams between agents: addresses, sockets, records, and the bandwidth limit.
//!
//! - [`address`]: `tcp:HOST:PORT`, `tls:HOST:PORT` and `unix:PATH`, and how to connect and to
//!   listen there;
//! - [`resolve`]: name look-ups with a deadline;
//! - [`plain`]: where plain TCP may go;
//! - [`tcp_options`]: the options of TCP sockets;
//! - [`unix_path`]: listening sockets with a path, and the lock that protects the path;
//! - [`unix_socket`]: checks that a descriptor is a UNIX stream socket, connected or listening;
//! - [`backoff`]: what a listener does when it cannot accept a connection;
//! - [`stream`]: a connected stream of bytes, with deadlines;
//! - [`records`]: records into a stream and out of it;
//! - [`stream_error`]: errors about well-formed records that are not allowed;
//! - `socket`: bytes into a socket and out of it, without waiting;
//! - `tls`: the TLS layer of a stream;
//! - [`socket_queue`]: how many bytes of a stream the kernel may queue in postcopy;
//! - [`limiter`]: the bandwidth limit;
//! - [`error`]: what can go wrong with a connection.

pub mod address;
pub mod backoff;
pub mod error;
pub mod limiter;
pub mod plain;
pub mod records;
pub mod resolve;
mod socket;
pub mod socket_queue;
pub mod stream;
pub mod stream_error;
pub mod tcp_options;
mod tls;
pub mod unix_path;
pub mod unix_socket;

pub use address::{Address, Listener};
pub use error::TransportError;
pub use limiter::Limiter;
pub use plain::PlainNetworks;
pub use records::{ReceivedRecord, RecordReader, RecordWriter};
pub use stream::StreamSocket;
pub use stream_error::StreamError;
pub use tls::Proof;
