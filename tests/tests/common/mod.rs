//! What several scenario tests share:
//!
//! - [`model`]: the guest of the model tests;
//! - [`blocks`]: the blocks of the model tests of snapshots and restores;
//! - [`images`]: how images are asked for, what must hold of them, and damage to them;
//! - [`image_scene`]: an agent that is a process, a VMM in this one, and folders for images;
//! - [`moments`]: moments at which processes are killed, and guests that never stop writing;
//! - [`ram`]: memory with stamps in its pages;
//! - [`vmm`]: a VMM whose hooks follow a script;
//! - [`side`]: such a VMM with its agent;
//! - [`relay`]: what stands between two agents and passes one record at a time, so that a test
//!   decides what happens between any two of them;
//! - [`agents`]: agents that listen, that end, that are killed, and connections to them.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod agents;
pub mod blocks;
pub mod image_scene;
pub mod images;
pub mod model;
pub mod moments;
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
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest time for anything that takes milliseconds, on a machine with other things to do; longer
/// than any timeout of [`with_more_time`] is waited for.
pub const SOON: Duration = Duration::from_secs(60);

/// The scene did not get to what it is about before a timeout was over, or another one was over
/// first. So it proves nothing.
#[derive(Debug)]
pub struct TooEarly(pub String);

/// Plays a scene in which a timeout is waited for: with a short one, and with longer ones if this
/// machine is too busy for that.
#[track_caller]
pub fn with_more_time(scene: impl Fn(Duration) -> Result<(), TooEarly>) {
    let mut last = None;
    for timeout in [Duration::from_millis(700), Duration::from_secs(3), Duration::from_secs(10)] {
        match scene(timeout) {
            Ok(()) => return,
            Err(TooEarly(why)) => {
                eprintln!("too early with a timeout of {timeout:?}: {why}");
                last = Some(why);
            }
        }
    }
    panic!("the scene never got to what it is about: {last:?}");
}

/// The error is the one that the scene is about.
pub fn says(error: &str, words: &[&str]) -> Result<(), TooEarly> {
    if words.iter().any(|words| error.contains(words)) {
        Ok(())
    } else {
        Err(TooEarly(error.to_owned()))
    }
}

/// A memfd of so many bytes.
pub fn memfd(size: u64) -> OwnedFd {
    pageferry_tests::files::memfd(size).unwrap()
}

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
