//! Requests of the agent to the VMM.
//!
//! - [`api`]: [`Hooks`], the trait that a VMM implements; [`error`]: how a hook fails;
//! - [`channel`]: the socket on which the requests arrive, and how they are answered;
//! - [`context`]: what the hooks of one agent work on;
//! - [`guest`]: pause, resume, and the state of the guest;
//! - [`memory`]: missing pages and watched writes;
//! - [`trackers`]: the VMM's tracker, write-protect scanning, throttling;
//! - [`end`]: what is undone when the agent is lost;
//! - [`guarded`]: a panic of a hook becomes an error;
//! - [`state`]: the file in which the state of the VMM travels.

mod api;
mod channel;
mod context;
mod end;
mod error;
mod guarded;
mod guest;
mod memory;
mod state;
mod trackers;

pub use api::{ClearPages, Hooks, StatePiece};
pub use channel::{Dispatch, HookChannel, HookThread};
pub(crate) use context::HookContext;
pub use error::HookError;
