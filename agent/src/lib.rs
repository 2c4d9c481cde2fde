//! The memory agent: takes a guest's memory as file descriptors and moves it, outside of the VMM.
//!
//! - [`memory`]: blocks, their files and bitmaps, discards;
//! - [`tracking`]: who says which pages are dirty;
//! - [`hooks`]: what the agent asks of the VMM;
//! - [`missing_faults`]: what a guest waits for that runs before its memory is here;
//! - [`cancel`]: stopping a job wherever it waits, and the line after which it cannot be stopped;
//! - [`job`]: what all jobs share: status, cancelling, errors;
//! - [`priority`]: who steps back behind whom;
//! - [`stats`]: counters and histograms;
//! - [`outgoing`], [`incoming`]: live migration, the two sides of it;
//! - [`image`]: images of guests;
//! - [`restore`]: a guest from an image;
//! - [`transport`]: addresses, sockets, records on them, the bandwidth limit;
//! - [`session`]: what a VMM and its operator ask for;
//! - [`server`], [`reactor`]: the sockets they ask on;
//! - [`waiting`]: which code may wait;
//! - [`cli`]: the command line.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod cancel;
pub mod cli;
pub mod hooks;
pub mod image;
pub mod incoming;
pub mod job;
pub mod memory;
pub mod missing_faults;
pub mod outgoing;
pub mod priority;
pub mod reactor;
pub mod restore;
pub mod server;
pub mod session;
pub mod snapshot;
pub mod stats;
pub mod tracking;
pub mod transport;
pub mod waiting;

pub use pageferry_protocol::error;
