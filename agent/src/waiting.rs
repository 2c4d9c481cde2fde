//! Which code may wait.
//!
//! The reactor's thread answers signals, timers and new connections. Every connection needs the
//! session's lock for its next answer. So nothing waits on that thread or under that lock: no
//! name look-up, no connect, no hook, no file, no thread. Otherwise one slow disk or name server
//! takes the answers from everyone, and a VMM whose guest waits for memory gives the agent up.
//!
//! This file makes the rule visible. [`NoWait`] marks code that must not wait, and every function
//! that can wait says so by [`may_wait`]. A debug build panics where both meet; a test sends every
//! request there is.

use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    /// What forbids this thread to wait; several can at once.
    static FORBIDDEN: Cell<u32> = const { Cell::new(0) };
}

/// The calling thread does not wait until this is dropped. Stays on its thread.
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

/// Says that the caller is about to do `what`, which can take any time.
///
/// # Panics
/// In a debug build, if the calling thread must not wait.
pub fn may_wait(what: &str) {
    debug_assert!(
        FORBIDDEN.with(Cell::get) == 0,
        "this thread must not wait, and is about to: {what}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_refused_on_the_marked_thread_alone_and_until_the_mark_is_gone() {
        let mark = NoWait::begin();
        let inner = NoWait::begin();
        drop(inner);
        assert!(std::panic::catch_unwind(|| may_wait("wait")).is_err());
        std::thread::spawn(|| may_wait("wait elsewhere")).join().unwrap();
        drop(mark);
        may_wait("wait again");
    }
}
