// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots: the content of images, and the guest meanwhile.
//!
//! - [`kvm`]: a real guest that keeps running;
//! - [`operator`]: snapshots and restores by an operator on the command line;
//! - [`bandwidth`]: the bandwidth limit; [`capture_memory`]: the memory for captured pages;
//! - [`huge`]: guests on huge pages;
//! - [`increments`]: images that can be the base of others;
//! - [`aborts`]: snapshots that do not complete;
//! - [`sealed`]: agents with a key;
//! - [`refusals`]: requests that are refused, and the errors;
//! - [`full_disk`]: a file system that is full; [`files`]: files that fail;
//! - [`kills`]: agents and VMMs that are killed at any moment; [`hangs`]: agents that hang and are
//!   given up;
//! - [`scene`]: a VMM, its agent, and a folder for images.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod aborts;
mod bandwidth;
mod capture_memory;
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
mod sealed;
