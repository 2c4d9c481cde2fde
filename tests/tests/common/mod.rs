//! What several scenario tests share:
//!
//! - [`model`]: the guest of the model tests;
//! - [`blocks`]: the blocks of the model tests of snapshots and restores;
//! - [`images`]: how images are asked for, what must hold of them, and damage to them;
//! - [`ram`]: memory with stamps in its pages;
//! - [`vmm`]: a VMM whose hooks follow a script;
//! - [`side`]: such a VMM with its agent;
//! - [`relay`]: what stands between two agents and passes one record at a time, so that a test decides what happens between any two of them;
//! - [`agents`]: agents that listen, that end, that are killed, and connections to them.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod agents;
pub mod blocks;
pub mod images;
pub mod model;
mod ram;
mod relay;
mod side;
mod vmm;

pub use agents::{Agent, Listening, PROGRAM, Peer};
pub use ram::{Ram, Touch, assert_same};
pub use relay::{Passing, Relay, WIRES, Wire, read_record};
pub use side::{Attached, Side, arrives_at, config, migrates_next_time, moves_to};
pub use vmm::{Asked, At, KvmLog, Vmm, VmmHooks};

use pageferry_client::{NonConvergence, OutgoingOptions};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest time for anything that takes milliseconds.
pub const SOON: Duration = Duration::from_secs(20);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `running` passes over the running guest, and one over the stopped one; fewer if nothing is
/// dirty before.
pub fn passes(running: u32) -> OutgoingOptions {
    OutgoingOptions {
        // Never met, so that as many passes run as the test wants.
        downtime_limit: Duration::ZERO,
        max_passes: running,
        policy: NonConvergence::StopAnyway,
        ..OutgoingOptions::default()
    }
}

/// Runs `test` for several cases at once: for tests that spend their time waiting for a deadline.
pub fn at_once<T: Sync>(cases: &[T], test: impl Fn(&T) + Sync) {
    /// Few enough that even a slow machine serves all of them within any deadline.
    const TOGETHER: usize = 12;
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..TOGETHER.min(cases.len()) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    test(case);
                }
            });
        }
    });
}
