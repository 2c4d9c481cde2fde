// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Postcopy between two VMMs whose guests touch memory by their mappings: threads, devices, and a
//! real one under KVM, on small and huge pages.
//!
//! - [`scene`]: two VMMs, and a migration between them;
//! - [`threads`]: guests of threads, and devices, whenever they go; [`kvm`]: a real guest;
//! - [`faults`]: many at once, and those of system calls; [`arrivals`]: one that comes while its
//!   page is being placed;
//! - [`discards`]: what is given away and taken back meanwhile; [`sparse`]: a large guest that gave
//!   most of it away;
//! - [`release`]: memory that the source frees; [`shortage`]: a destination without memory;
//! - [`refusals`]: memory that it cannot fill;
//! - [`attempts`]: recoveries that fail half-way; [`watch`]: what is seen of one;
//! - [`onwards`]: what comes after;
//! - [`failures`]: every moment at which something can fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod arrivals;
mod attempts;
mod discards;
mod failures;
mod faults;
mod kvm;
mod onwards;
mod refusals;
mod release;
mod scene;
mod shortage;
mod sparse;
mod threads;
mod watch;
