// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What others say to an agent: on its sockets, on the page stream, and by vhost-user.
//!
//! - [`bad_input`]: requests and records that are wrong;
//! - [`socket`]: the agent's sockets, and who may keep whom waiting;
//! - [`stock_frontend`]: a vhost-user front-end that knows nothing of pageferry.
//!
//! `decoders.rs`, beside this file, is a program of its own, since it counts what it allocates.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod bad_input;
mod socket;
mod stock_frontend;
