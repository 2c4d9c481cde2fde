// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the harness, on which all other tests rely.
//!
//! - [`parts`]: memory, threads that write it, and their ledgers;
//! - [`guests`]: migrations of guests with devices and balloons; [`mock_vmm`]: migrations of mock
//!   VMM processes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod guests;
mod mock_vmm;
mod parts;
