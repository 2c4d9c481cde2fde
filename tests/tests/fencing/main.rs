//! An agent that was given up does nothing any more, whenever it wakes up.
//!
//! - [`wakes`]: real agents that hang where it matters most, and wake up again;
//! - [`word`]: the fence word alone, without a kill, for agents that cannot be killed;
//! - [`matrix`]: agents that are killed, or hang, at any moment of any job.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;
mod matrix;
#[allow(dead_code, reason = "the tests of images use the rest of it")]
#[path = "../image_failures/moments.rs"]
mod moments;
#[allow(dead_code, unused_imports, reason = "the tests of images use the rest of it")]
#[path = "../image_failures/scene.rs"]
mod scene;
mod wakes;
mod word;

use std::path::Path;

/// The state letter of a process, or of one of its threads; `None` if it is gone.
fn state(stat: &Path) -> Option<char> {
    let stat = std::fs::read_to_string(stat).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// True if nothing of the process runs any more, whether or not anybody has waited for it.
fn is_dead(pid: u32) -> bool {
    matches!(state(Path::new(&format!("/proc/{pid}/stat"))), None | Some('Z' | 'X'))
}
