// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations over TLS: what arrives, and which peers are refused, at both ends by name. And what
//! strangers at the port can do, over TLS and in plain text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod attacks;
mod downgrade;
mod folders;
mod layer;
mod middle;
mod peers;
mod recovery;
mod scene;
mod strangers;
mod tokens;
mod wires;
