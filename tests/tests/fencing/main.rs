// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fencing: an agent that was given up does nothing more, whenever it wakes up.
//!
//! - [`wakes`]: real agents that hang at the critical moments, and wake up again;
//! - [`word`]: the fence word alone, without a kill, for agents that cannot be killed;
//! - [`matrix`]: agents that are killed, or hang, at any moment of any job.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod matrix;
mod wakes;
mod word;

use pageferry_tests::process::state;
use std::path::Path;

/// True if the process has ended. It may still be a zombie.
fn is_dead(pid: u32) -> bool {
    matches!(state(Path::new(&format!("/proc/{pid}/stat"))), None | Some('Z' | 'X'))
}
