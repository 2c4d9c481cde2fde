// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The harness itself: what a test believes because of it has to be true.
//!
//! - [`parts`]: memory, threads that write it, and their ledgers;
//! - [`guests`]: guests with devices and balloons migrate; [`mock_vmm`]: so do those of processes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod guests;
mod mock_vmm;
mod parts;
