// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator does on the command line.
//!
//! - [`operator`]: migrations, and what goes wrong with them;
//! - [`image`]: looking at images, checking them and merging them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod image;
mod operator;
