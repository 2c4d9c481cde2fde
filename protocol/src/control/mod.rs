//! The socket between a VMM and its agent.
//!
//! - [`codec`]: reading and printing bodies field by field, each error naming the field;
//! - [`frame`]: vhost-user's header, and the limits of a frame;
//! - [`socket`]: sending and receiving frames with file descriptors over a UNIX stream socket;
//! - `receive`: the system call that receives, with descriptors and the sender's process;
//! - [`unix_path`]: which paths sockets may have, and connecting to one;
//! - [`request`]: pageferry's own requests from the VMM or operator to the agent;
//! - `ranges`: many ranges of memory in one request;
//! - [`reply`]: answers to requests, and errors as they travel;
//! - [`role`]: who sends a request, and so what it may ask;
//! - [`job`]: what a job is started with, and how it stands;
//! - [`trackers`]: who reports the guest's writes;
//! - [`hook`]: requests of the agent to the VMM; [`hook_reply`]: their answers;
//! - [`state_pieces`]: the list of the pieces in which a VMM saves its state;
//! - [`vhost_user`] (feature `vhost-user`): the part of vhost-user that hands over memory.

pub mod codec;
pub mod frame;
pub mod hook;
pub mod hook_reply;
pub mod job;
mod ranges;
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

pub use codec::{DecodeError, Decoder, Encoder};
pub use frame::{Frame, FrameHeader};
pub use role::Role;
pub use socket::{FrameSocket, SocketError};
pub use trackers::Trackers;
