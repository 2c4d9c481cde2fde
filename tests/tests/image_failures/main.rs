//! Snapshots and restores that something comes between, with real processes that are killed and
//! real files that are damaged: nothing half is left, nothing wrong is restored, and the next
//! attempt succeeds.
//!
//! - [`common::image_scene`]: an agent that is a process, a VMM in this one, and folders for
//!   images;
//! - [`space`]: a file system that is full; [`files`]: files that fail, shrink, or are none;
//! - [`damage`]: bytes that are changed; [`chains`]: images on another base, or of another guest;
//! - [`restores`]: what comes between while a guest is restored;
//! - [`kills`]: agents and VMMs that are killed at any moment; [`common::moments`]: how these are
//!   chosen, and guests that never stop writing;
//! - [`hangs`]: agents that hang, and wake up again;
//! - [`hooks_wait`]: hooks that wait for memory that will not come.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod chains;
mod damage;
mod files;
mod hangs;
mod hooks_wait;
mod kills;
mod restores;
mod space;
