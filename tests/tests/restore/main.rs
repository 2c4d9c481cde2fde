//! Restores that something comes between: nothing wrong is restored, and the next attempt succeeds.
//!
//! - [`restores`]: what comes between;
//! - [`damage`]: bytes of an image that are changed; [`chains`]: images on another base, or of
//!   another guest; [`files`]: files that fail, shrink, or are no image;
//! - [`hooks_wait`]: hooks that wait for memory that will not come.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod chains;
mod damage;
mod files;
mod hooks_wait;
mod restores;
