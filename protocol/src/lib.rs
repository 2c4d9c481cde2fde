// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Wire and shared-memory formats of pageferry.
//!
//! This crate parses and prints bytes. It has no policy and starts no threads. Both the agent and
//! the client build on it:
//!
//! - [`memory`]: pages, ranges, rounding ([`round-safely`](crate::invariants#round-safely)) and the
//!   geometry of blocks;
//! - [`shm`]: bitmaps of atomic words, in private or shared memory, and the dirty log in vhost
//!   layout;
//! - [`control`]: the socket between a VMM and its agent: vhost-user framing, requests and hooks;
//! - [`stream`]: the page stream between two agents, or between an agent and a VMM;
//! - [`image`]: the memory of a guest in a file;
//! - [`userfault`]: the kernel's userfaultfd, which both sides use;
//! - [`error`]: errors as sentences;
//! - [`invariants`]: the rules that the documentation cites by name.
//!
//! # Features
//!
//! | feature | what it adds |
//! | --- | --- |
//! | `vhost-user` | [`control::vhost_user`]: payloads of the standard vhost-user requests, from the `vhost` crate |
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

#[cfg(not(target_endian = "little"))]
compile_error!(
    "pageferry's shared bitmaps are read as little-endian words, as the vhost log is on every supported VMM"
);

pub mod control;
pub mod error;
pub mod image;
pub mod invariants;
pub mod memory;
pub mod shm;
pub mod stream;
pub mod userfault;

/// Compiles the example of the crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
