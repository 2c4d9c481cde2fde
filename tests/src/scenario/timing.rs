// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a test waits, and what it does on a machine that is too busy for a timeout.

use std::sync::atomic::{AtomicUsize, Ordering};
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
///
/// # Errors
/// [`TooEarly`] if it has none of these words.
pub fn says(error: &str, words: &[&str]) -> Result<(), TooEarly> {
    if words.iter().any(|words| error.contains(words)) {
        Ok(())
    } else {
        Err(TooEarly(error.to_owned()))
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
