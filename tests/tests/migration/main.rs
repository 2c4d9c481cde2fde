// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Precopy: what arrives, what is sent, and which side owns the guest after a failure.
//!
//! - [`discards`], [`frees`]: memory that the guest gives back at any moment; [`stale_bits`]: dirty
//!   bits that are older than that;
//! - [`passes`]: the number of passes; [`compression`]: compressed pages;
//! - [`kvm`]: a real guest, with either tracker; [`huge_pages`]: guests in huge pages;
//! - [`failures`]: failures of either side at every moment;
//! - [`scene`]: two VMMs, and a relay between their agents.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod compression;
mod discards;
mod failures;
mod frees;
mod huge_pages;
mod kvm;
mod passes;
mod scene;
mod stale_bits;
