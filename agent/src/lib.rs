// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory agent: a process beside a VMM that migrates, saves and restores its guest.
//!
//! The VMM hands over the guest's memory as file descriptors. The agent serves one VM.
//!
//! - [`memory`]: blocks, their files and bitmaps, discards;
//! - [`base`]: files whose pages all clones of an image share;
//! - [`tracking`]: the trackers, which report dirty pages;
//! - [`pagemap`]: scans of the VMM's page tables;
//! - [`piece_locks`]: locks of single pieces of a file, among processes;
//! - [`event`]: an event that wakes a thread which waits in `poll`;
//! - [`hooks`]: requests of the agent to the VMM;
//! - [`missing_faults`]: faults of a guest that runs before all of its memory is here;
//! - [`cancel`]: cancelling a job wherever it waits, and the commit point after which it cannot be
//!   cancelled;
//! - [`job`]: what all jobs share: status, options, errors;
//! - [`processors`]: how many processors there are;
//! - [`priority`]: a lower priority for threads whose work is not urgent;
//! - [`sizes`]: sizes as people write them;
//! - [`stats`]: counters and histograms;
//! - [`outgoing`], [`incoming`]: the two sides of a live migration;
//! - [`image`]: image files of guests;
//! - [`store`]: images in object stores, and the cache of this machine;
//! - [`snapshot`]: saving a guest to an image;
//! - [`restore`]: restoring a guest from an image;
//! - [`devices`]: virtio devices by which the guest gives memory back;
//! - [`transport`]: addresses, sockets, records, the bandwidth limit;
//! - [`session`]: the requests of a VMM and of operators;
//! - [`server`], [`reactor`]: the control socket and its connections;
//! - [`metrics`]: metrics for Prometheus, over HTTP;
//! - [`systemd`]: sockets from systemd, and messages to it;
//! - [`trust`]: certificates, and the peers that are trusted on a network;
//! - [`inherited`]: descriptors that one program of this process hands over to the next;
//! - [`opener`]: files and addresses by name, for an agent that may not open them itself;
//! - [`sandbox`]: what an agent gives up at its start;
//! - [`upgrade`]: a newer program takes over;
//! - [`lock`]: locks that outlive a panic;
//! - [`vm_name`]: the name of the VM, for people;
//! - [`waiting`]: which code may wait;
//! - [`cli`]: the command line;
//! - [`invariants`]: the rules that the documentation cites by name.
//!
//! The library is that of the program `pageferry`. Only [`cli::main_from`] is a stable interface.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod base;
pub mod cancel;
pub mod cli;
pub mod devices;
pub mod event;
pub mod hooks;
pub mod image;
pub mod incoming;
pub mod inherited;
pub mod job;
pub mod lock;
pub mod memory;
pub mod metrics;
pub mod missing_faults;
pub mod opener;
pub mod outgoing;
pub mod pagemap;
pub mod piece_locks;
pub mod priority;
pub mod processors;
pub mod reactor;
pub mod restore;
pub mod sandbox;
pub mod server;
pub mod session;
pub mod sizes;
pub mod snapshot;
pub mod stats;
pub mod store;
pub mod systemd;
pub mod tracking;
pub mod transport;
pub mod trust;
pub mod upgrade;
pub mod vm_name;
pub mod waiting;

pub use pageferry_protocol::{error, invariants};

/// Compiles the example of the crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
