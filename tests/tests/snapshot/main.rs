// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots: what is in the image, and how the guest runs meanwhile.
//!
//! - [`kvm`]: a real guest that runs on;
//! - [`operator`]: what an operator saves and restores from a command line;
//! - [`bandwidth`]: the limit;
//! - [`huge`]: guests on huge pages;
//! - [`increments`]: what may be built on what;
//! - [`aborts`]: snapshots that do not come to their end;
//! - [`refusals`]: what is refused, and the words for it;
//! - [`full_disk`]: a file system that is full; [`files`]: files that fail;
//! - [`kills`]: agents and VMMs that are killed at any moment; [`hangs`]: agents that hang, and are
//!   given up;
//! - [`scene`]: a VMM, its agent, and a folder for images.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod aborts;
mod bandwidth;
mod files;
mod full_disk;
mod hangs;
mod huge;
mod increments;
mod kills;
mod kvm;
mod operator;
mod refusals;
mod scene;
