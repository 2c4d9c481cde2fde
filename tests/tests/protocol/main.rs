// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Input of an agent: on its sockets, on the page stream, and by vhost-user.
//!
//! - [`bad_input`]: requests and records that are wrong;
//! - [`socket`]: the agent's sockets, and clients that make others wait;
//! - [`metrics`]: scrapes of the metrics;
//! - [`raw_control`]: the control protocol from raw bytes, as docs/control.md says;
//! - [`stock_frontend`]: a vhost-user front-end that knows nothing of pageferry.
//!
//! `decoders.rs`, beside this file, is a program of its own, because it counts its allocations.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod bad_input;
mod metrics;
mod raw_control;
mod socket;
mod stock_frontend;
