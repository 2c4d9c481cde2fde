// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guarantees for a VMM that links the client.
//!
//! - [`embedding`]: hooks that panic, resets during a job, and requests that come too early or too
//!   late;
//! - [`embed_example`]: the example of a VMM that embeds the client;
//! - [`run_state`]: a guest that its operator has paused stays paused, wherever it goes;
//! - [`spawned_agent`]: an agent that the VMM starts;
//! - [`supervisor`]: lost agents that are replaced without the VMM; [`upgrade`]: agents that are
//!   upgraded;
//! - [`page_stream`]: a page stream that the VMMs carry over their own transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod embed_example;
mod embedding;
mod page_stream;
mod run_state;
mod spawned_agent;
mod supervisor;
mod upgrade;
