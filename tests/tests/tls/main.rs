// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations over TLS: what arrives, and which peers are refused, at both ends by name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod certificates;
mod folders;
mod layer;
mod peers;
mod scene;
mod wires;
