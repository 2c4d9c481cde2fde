//! Dirty tracking on the agent's side.

pub mod pagemap;
