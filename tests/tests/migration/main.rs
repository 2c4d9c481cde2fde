//! Precopy: what arrives, what is sent for it, and who owns the guest when something fails.
//!
//! - [`discards`]: discards and frees at every moment;
//! - [`compression`]: pages that travel compressed;
//! - [`kvm`]: a real guest, with either tracker;
//! - [`failures`]: every moment at which either side can fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod compression;
mod discards;
mod failures;
mod kvm;
