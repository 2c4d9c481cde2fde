//! Shared parts of the examples.
//!
//! - [`table`]: what happened, in two columns.

pub mod table;
