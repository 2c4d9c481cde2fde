// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restores that are interrupted, or whose image is damaged: a guest is restored as it was saved or
//! not at all, and the next attempt succeeds.
//!
//! - [`discards`]: discards and populates meanwhile; [`aborts`]: cancels, and hooks that fail;
//! - [`operator`]: restores that an operator starts;
//! - [`damage`]: changed bytes in an image; [`chains`]: images on another base, or of another
//!   guest; [`files`]: files that fail, shrink or are not an image;
//! - [`kills`]: agents and VMMs that are killed at any moment;
//! - [`hooks_wait`]: hooks that wait for memory that does not come;
//! - [`scene`]: an image to restore from.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod aborts;
mod chains;
mod damage;
mod discards;
mod files;
mod hooks_wait;
mod kills;
mod operator;
mod scene;
