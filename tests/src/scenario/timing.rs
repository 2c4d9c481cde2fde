// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Timeouts of tests, and repetition with longer ones on a busy machine.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Timeout for anything that normally takes milliseconds, on a busy machine. It is longer than any
/// timeout of [`with_more_time`].
pub const SOON: Duration = Duration::from_secs(60);

/// A timeout ended before the scene reached its point, or another timeout ended first. So the scene
/// proves nothing.
#[derive(Debug)]
pub struct TooEarly(pub String);

/// Plays a scene that waits for a timeout: first with a short timeout, then with longer ones if the
/// machine is too busy.
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

/// Checks that the error is the expected one.
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
    /// Small enough that even a slow machine serves all cases within every deadline.
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
