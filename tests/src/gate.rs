// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stopping threads for certain: what a pause hook needs of the threads that write guest memory.
//!
//! A worker passes the gate for every small batch of work. Closing it returns when no worker is
//! inside any more, so whoever closed it knows that nothing is written until it opens it again.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug, Default)]
struct State {
    open: bool,
    ended: bool,
    inside: usize,
}

/// A gate that starts closed.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// Being inside; dropping it leaves.
#[derive(Debug)]
pub struct Pass<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the gate is open and goes in; `None` when the gate ended.
    pub fn enter(&self) -> Option<Pass<'_>> {
        let closed = |state: &mut State| !state.open && !state.ended;
        let mut state =
            self.changed.wait_while(self.lock(), closed).unwrap_or_else(PoisonError::into_inner);
        if state.ended {
            return None;
        }
        state.inside += 1;
        Some(Pass(self))
    }

    /// Outside: waits for `duration`, less if the gate is closed or ends meanwhile.
    pub fn idle(&self, duration: Duration) {
        let open = |state: &mut State| state.open && !state.ended;
        drop(self.changed.wait_timeout_while(self.lock(), duration, open));
    }

    /// Lets workers in.
    pub fn open(&self) {
        self.lock().open = true;
        self.changed.notify_all();
    }

    /// Lets no worker in any more, and returns when none is inside.
    pub fn close(&self) {
        self.lock().open = false;
        self.changed.notify_all();
        drop(self.changed.wait_while(self.lock(), |state| state.inside > 0));
    }

    /// Sends all workers home.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// True if workers are let in.
    pub fn is_open(&self) -> bool {
        self.lock().open
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.lock().inside -= 1;
        self.0.changed.notify_all();
    }
}
