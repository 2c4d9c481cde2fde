//! What the model tests share:
//!
//! - [`model`]: the guest at the source of a migration;
//! - [`blocks`]: the blocks of the models of snapshots and restores.
#![allow(dead_code, unreachable_pub)]

pub mod blocks;
pub mod model;
