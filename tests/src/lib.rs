// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mock VMM harness: what a test, a benchmark or an example needs around an agent, made of threads
//! and files.
//!
//! - [`memory`]: guest memory of several blocks, which can be read without allocating it;
//!   [`verify`]: what must hold after a migration;
//! - [`files`]: plain files as guest memory, for tests without a mock VMM;
//! - [`guest_mapping`]: guest memory mapped so that huge pages fit;
//! - [`usage`]: which pages may be written now, and what was written to them;
//! - [`guest`]: guests that write: threads, or a real guest under KVM; [`device`]: emulated devices
//!   that write through vm-memory;
//! - [`balloon`], [`plug`]: sources of discards;
//! - [`vmm`]: a mock VMM: all of this behind a [`pageferry_client::Client`] and its hooks, with
//!   faults on demand;
//! - [`in_process`]: an agent on a thread of the test's own process;
//! - [`process`]: agents and VMMs as processes of their own; [`agent`]: the agent's command line
//!   within this binary;
//! - [`tmpfs`]: a small file system for one process, which is soon full;
//! - [`mock_vmm`]: the command line `mock_vmm source|destination`;
//! - [`proxy`]: a wire between two agents that can be cut;
//! - [`scenario`]: scenes that a test steps through, with VMMs that follow a script;
//! - [`linux_guest`]: real Linux guests under unmodified QEMUs;
//! - [`stores`]: servers of objects (S3, Azure), and a proxy that damages what they answer;
//! - [`front_end`]: a mock front-end of the agent's devices, with drivers;
//! - [`decoders`]: what every decoder must do with arbitrary bytes;
//! - [`forbidden`]: what somebody who has taken an agent over would try;
//! - [`seccomp`]: threads that may not use userfaultfd; [`memory_group`]: a limit of memory;
//! - [`require`]: what a test needs of the machine; [`huge_pages`]: the kernel's pool of huge
//!   pages;
//! - [`gate`], [`deadline`], [`random`]: stopping threads, waiting for conditions, and repeatable
//!   random numbers.
//!
//! Everything random follows from a seed, and everything that waits has a deadline.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod agent;
pub mod balloon;
pub mod certificates;
pub mod deadline;
pub mod decoders;
pub mod device;
pub mod error;
pub mod files;
pub mod flood;
pub mod forbidden;
pub mod front_end;
pub mod gate;
pub mod guest;
pub mod guest_mapping;
pub mod huge_pages;
pub mod in_process;
pub mod linux_guest;
pub mod memory;
pub mod memory_group;
pub mod mock_vmm;
pub mod on_drop;
pub mod plug;
pub mod process;
pub mod proxy;
pub mod random;
pub mod require;
pub mod scenario;
pub mod seccomp;
pub mod stores;
pub mod tmpfs;
pub mod usage;
pub mod verify;
pub mod vmm;

pub use error::Error;

/// Compiles the examples for authors of VMMs.
#[cfg(doctest)]
#[doc = include_str!("../../docs/embedding.md")]
struct Embedding;
