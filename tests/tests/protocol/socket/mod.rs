// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's sockets with misbehaving clients and missing resources:
//!
//! - [`paths`]: what exists at the path, other agents there, and the limit of its length;
//! - [`crowd`]: connections that are idle, send requests all the time, or do not read replies;
//! - [`waits`]: requests that wait for a name server, a VMM or a full queue, while others are
//!   answered;
//! - [`descriptors`]: a process that is out of descriptors;
//! - [`frames`]: requests without their descriptors, or without their end;
//! - [`networks`]: plain TCP beyond this host;
//! - [`users`]: streams between agents of two users;
//! - [`log`]: the number of refused requests in the log.

mod crowd;
mod descriptors;
mod frames;
mod log;
mod networks;
mod paths;
mod users;
mod waits;
