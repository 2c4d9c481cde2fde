// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Precopy: what arrives, what is sent for it, and who owns the guest when something fails.
//!
//! - [`discards`], [`frees`]: memory that the guest gives back at any moment; [`stale_bits`]: dirty
//!   bits from before that;
//! - [`passes`]: how many there are; [`compression`]: pages that travel compressed;
//! - [`kvm`]: a real guest, with either tracker;
//! - [`failures`]: every moment at which either side can fail;
//! - [`scene`]: two VMMs, and a relay between their agents.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod compression;
mod discards;
mod failures;
mod frees;
mod kvm;
mod passes;
mod scene;
mod stale_bits;
