// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shared parts of the examples.
//!
//! - [`counting`]: a guest that counts in its pages forever;
//! - [`show`]: the processes of an example, and their reports;
//! - [`table`]: a table of two columns.

pub mod counting;
pub mod show;
pub mod table;
