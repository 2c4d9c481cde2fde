// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Virtio devices by which the guest itself gives memory back: vhost-user back-ends, for any VMM
//! that has a generic vhost-user front-end.
//!
//! What the guest gives back is a discard or a free of the session's memory, as if the VMM had
//! asked for it, so every job knows of it at once. The device finds the pages by the file of the
//! front-end's memory table: it is the file of a block.
//!
//! - [`socket`]: waits for a front-end, and serves one after another;
//! - [`relay`]: hands messages from the front-end to the back-end library, and keeps the socket
//!   by which the device tells of changes;
//! - [`back_end`]: the back-end library's side: queues, features and configuration of any device;
//! - [`device`]: what a kind of device has to do;
//! - [`buffer`]: one buffer of a queue;
//! - [`guest_map`]: which pages of which blocks a guest physical address is;
//! - [`registry`]: the devices of an agent; [`state_pieces`]: their states in its jobs;
//! - `state_transfer`: the state of a device, to and from a front-end;
//! - [`access`]: when a device may change the memory;
//! - [`balloon`]: the balloon; [`mem`]: virtio-mem.

pub mod access;
pub mod back_end;
pub mod balloon;
pub mod buffer;
pub mod device;
pub mod guest_map;
pub mod mem;
pub mod registry;
pub mod relay;
pub mod socket;
pub mod state_pieces;
mod state_transfer;
