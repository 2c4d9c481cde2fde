// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which code may wait.
//!
//! The reactor's thread handles signals, timers and new connections. Every connection needs the
//! session's lock for its next answer. So nothing may wait on that thread or under that lock: no
//! name look-up, no connect, no hook, no file, no thread. Otherwise one slow disk or name server
//! would delay all answers, and a VMM whose guest waits for memory would give the agent up.
//!
//! This file checks the rule. Code that must not wait holds a [`NoWait`]. Every function that can
//! wait calls [`may_wait`]. A debug build panics if a thread does both. A test sends every kind of
//! request to an agent.

use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    /// Number of [`NoWait`]s that this thread holds.
    static FORBIDDEN: Cell<u32> = const { Cell::new(0) };
}

/// Forbids the calling thread to wait until this is dropped. It cannot move to another thread.
#[derive(Debug)]
pub struct NoWait {
    _this_thread: PhantomData<*const ()>,
}

impl NoWait {
    /// Forbids the calling thread to wait.
    pub fn begin() -> Self {
        FORBIDDEN.with(|count| count.set(count.get() + 1));
        Self { _this_thread: PhantomData }
    }
}

impl Drop for NoWait {
    fn drop(&mut self) {
        FORBIDDEN.with(|count| count.set(count.get() - 1));
    }
}

/// Declares that the caller is about to do `what`, which can take any time.
///
/// # Panics
/// In a debug build, if the calling thread must not wait.
pub fn may_wait(what: &str) {
    debug_assert!(
        FORBIDDEN.with(Cell::get) == 0,
        "this thread must not wait, but is about to: {what}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_that_holds_a_no_wait_must_not_wait() {
        let mark = NoWait::begin();
        let inner = NoWait::begin();
        drop(inner);
        assert!(std::panic::catch_unwind(|| may_wait("wait")).is_err());
        std::thread::spawn(|| may_wait("wait elsewhere")).join().unwrap();
        drop(mark);
        may_wait("wait again");
    }
}
