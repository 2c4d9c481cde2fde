//! Shared parts of the examples.
//!
//! - [`counting`]: a guest that counts for ever;
//! - [`show`]: the processes of an example, and what they say;
//! - [`table`]: what happened, in two columns.

pub mod counting;
pub mod show;
pub mod table;
