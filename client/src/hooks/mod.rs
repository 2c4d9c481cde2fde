// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests of the agent to the VMM.
//!
//! - [`api`]: [`Hooks`], the trait that a VMM implements; [`error`]: how a hook fails;
//! - [`channel`]: the socket on which the requests arrive, and how they are answered;
//! - [`context`]: what the hooks of one agent work on;
//! - [`guest`]: pause, resume, and the state of the guest;
//! - [`memory`]: missing pages and watched writes;
//! - [`trackers`]: the VMM's tracker, write-protect scanning, throttling;
//! - [`end`]: what is undone when the agent is lost;
//! - [`catch_panics`]: a panic of a hook becomes an error;
//! - [`state_file`]: the file in which the state of the VMM travels.

mod api;
mod catch_panics;
mod channel;
mod context;
mod end;
mod error;
mod guest;
mod memory;
mod state_file;
mod trackers;

pub use api::{Hooks, StatePiece};
pub(crate) use catch_panics::tell_attached;
pub use channel::{Dispatch, HookChannel, HookThread};
pub(crate) use context::HookContext;
pub use error::HookError;
