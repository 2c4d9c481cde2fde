// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Postcopy between two VMMs whose guests touch memory through mappings: threads, devices, and a
//! real guest under KVM, on small and huge pages.
//!
//! - [`scene`]: two VMMs, and a migration between them;
//! - [`threads`]: guests of threads, and devices, with every kind of switch; [`kvm`]: a real guest;
//! - [`faults`]: many faults at once, and faults in system calls; [`arrivals`]: a fault on a page
//!   that is just being placed;
//! - [`discards`]: discards and populates meanwhile; [`sparse`]: a large guest that gave most of
//!   its memory back;
//! - [`release`]: memory that the source frees; [`shortage`]: a destination without memory;
//! - [`refusals`]: memory that postcopy cannot fill;
//! - [`attempts`]: recoveries that fail half-way; [`watch`]: what operators and VMMs see of a
//!   recovery;
//! - [`onwards`]: the guest after a postcopy;
//! - [`failures`]: failures at every moment.
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
