// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mock front-end of the agent's devices: a VMM that connects to their sockets, and a guest's
//! drivers, without a guest.
//!
//! The VMM's side is that of the crate `vhost`, so the back-end meets messages that this project
//! has not written. The drivers are ours, so that they can also break every rule.
//!
//! - [`connection`]: the VMM's side of the vhost-user protocol;
//! - [`queue`]: a split virtqueue as a driver has it;
//! - [`driver`]: a connection with its queues: what all drivers have in common;
//! - [`balloon`]: a driver of the balloon; [`mem`]: a driver of virtio-mem;
//! - [`host`]: an agent process with its devices, and the mock VMM whose memory it has.
//!
//! Functions here panic on an error, and so fail the test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a panic here is a failed test"
)]

pub mod balloon;
pub mod connection;
pub mod driver;
pub mod host;
pub mod mem;
pub mod queue;

pub use balloon::{BalloonDriver, Numbering};
pub use connection::FrontEnd;
pub use driver::Driver;
pub use host::DeviceHost;
pub use mem::MemDriver;
pub use queue::{DriverQueue, Piece, Rings};

use std::time::Duration;

/// How long a test waits for something that normally takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(20);
