// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The socket between a VMM and its agent. `docs/control.md` in the repository describes it
//! byte by byte, and a test compares the two.
//!
//! Frames:
//!
//! - [`codec`]: reading and printing bodies field by field, with errors that name the field;
//! - [`frame`]: the header of vhost-user, and the limits of a frame;
//! - [`socket`]: sending and receiving frames with file descriptors over a UNIX stream socket;
//! - [`unix_path`]: which paths sockets may have, and connecting to one.
//!
//! From the VMM or an operator to the agent:
//!
//! - [`request`]: pageferry's own requests;
//! - [`grants`]: descriptors that stand for what a request names;
//! - [`role`]: which connections may send a request;
//! - [`reply`]: answers to requests, and errors as they travel;
//! - [`agent_info`]: what an agent serves;
//! - [`clones`]: the memory of guests that share the pages of one image;
//! - [`job`]: the options and the status of a job;
//! - [`journal`]: what the next agent needs to continue a job;
//! - [`trackers`]: what reports the writes of the guest;
//! - [`vhost_user`] (feature `vhost-user`): the requests of vhost-user that hand over memory.
//!
//! From the agent to the VMM:
//!
//! - [`hook`]: the hooks; [`hook_reply`]: their answers;
//! - [`state_pieces`]: the list of the pieces in which a VMM saves its state.

pub mod agent_info;
pub mod clones;
pub mod codec;
pub mod devices;
pub mod frame;
pub mod grants;
pub mod hook;
pub mod hook_reply;
pub mod job;
// Many ranges of memory in one request.
mod ranges;
// The system call that receives, with descriptors and the process of the sender.
pub mod journal;
mod receive;
pub mod reply;
pub mod request;
pub mod role;
pub mod socket;
pub mod state_pieces;
pub mod trackers;
pub mod unix_path;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;

pub use agent_info::{AgentInfo, BlockInfo};
pub use codec::{DecodeError, Decoder, Encoder};
pub use frame::{Frame, FrameHeader};
pub use grants::Grants;
pub use role::Role;
pub use socket::{FrameSocket, SocketError};
pub use trackers::Trackers;
