// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio-mem device (virtio id 24; virtio 1.3, section 5.15).
//!
//! - [`port`]: the device, as a front-end has it;
//! - [`plugged`]: its region in the session's memory;
//! - [`wire`]: the layouts of requests, responses and the configuration space;
//! - [`region`]: the memory of the device, in blocks;
//! - [`device`]: the requests of the driver, the size that the operator wants, and the state that
//!   travels with a migration.
//!
//! The guest's driver plugs and unplugs blocks of a fixed region until it has as much memory as the
//! operator requests. The device does not keep which blocks are plugged. The agent's bitmap of
//! discarded pages does ([`PluggableMemory`]): a discarded page is unplugged. So a job that leaves
//! out discarded pages leaves out unplugged blocks, and there are no two bitmaps that could differ.
//!
//! # Blocks and pages
//!
//! A block is plugged if all of its pages are. Any other block is unplugged. An agent that dies
//! while it plugs a block leaves a part of the pages. To the driver this block is unplugged, and
//! the driver can plug it.
//!
//! # Replay
//!
//! An agent can die after it has carried out a request and before the driver has the answer. Then
//! the next agent gets the same request. So the first request after [`VirtioMem::connected`] may
//! find its blocks in the state that it asks for, all of them or some of them. All later requests
//! are held to the rules of the specification.

pub mod device;
pub mod plugged;
pub mod port;
pub mod region;
pub mod wire;

pub use device::{FeaturesError, LoadError, VirtioMem};
pub use region::{FieldError, MemoryRefused, PluggableMemory, Region};
pub use wire::{BlockRun, BlockState, Config, Request, Response, WireError};

#[cfg(test)]
mod tests;
