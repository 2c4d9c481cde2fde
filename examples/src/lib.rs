//! Shared parts of the examples.
//!
//! - [`counting`]: a guest that counts for ever;
//! - [`table`]: what happened, in two columns.

pub mod counting;
pub mod table;
