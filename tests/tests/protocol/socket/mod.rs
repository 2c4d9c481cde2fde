// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's sockets among clients that misbehave, and without what an agent needs:
//!
//! - [`paths`]: what is at the path already, who else takes it, and how long it may be;
//! - [`crowd`]: connections that are idle, that never stop asking, that do not read their answers;
//! - [`waits`]: requests that wait for a name server, a VMM, a full queue, while others are
//!   answered;
//! - [`descriptors`]: a process that is out of descriptors;
//! - [`frames`]: requests without their descriptors, or without an end;
//! - [`log`]: refused requests, and how many of them are logged.

mod crowd;
mod descriptors;
mod frames;
mod log;
mod paths;
mod waits;
