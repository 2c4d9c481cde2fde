// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Virtio devices by which the guest itself gives memory back: vhost-user back-ends, for any VMM
//! that has a generic vhost-user front-end.
//!
//! What the guest gives back is a discard or a free of the session's memory, as if the VMM had
//! asked for it, so every job knows of it at once. The device finds the pages by the file of the
//! front-end's memory table: it is the file of a block.
//!
//! - [`port`]: a device, as the rest of the agent sees it;
//! - [`device`]: what a kind of device has to do;
//! - [`socket`]: waits for a front-end, and serves one after another;
//! - [`relay`] and `messages`: hand messages from the front-end to the back-end library, and look
//!   at them on the way;
//! - [`back_end`]: the back-end library's side: features, configuration and events of any device;
//! - `library_fds`: descriptors that the library has;
//! - [`queues`]: takes buffers from queues and returns them; [`buffer`]: one of them;
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
mod library_fds;
pub mod mem;
mod messages;
pub mod port;
pub mod queues;
pub mod registry;
pub mod relay;
pub mod socket;
pub mod state_pieces;
mod state_transfer;
