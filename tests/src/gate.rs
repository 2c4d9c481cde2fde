// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A gate that stops the threads that write guest memory, for a pause hook.
//!
//! A worker passes the gate for every small batch of work. [`Gate::close`] returns when no worker
//! is inside any more. So nothing is written until the gate is opened again.

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

/// The right to be inside the gate. Dropping it leaves.
#[derive(Debug)]
pub struct Pass<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the gate is open, and enters. `None` when the gate ended.
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

    /// Waits outside for `duration`, or less if the gate is closed or ends meanwhile.
    pub fn idle(&self, duration: Duration) {
        let open = |state: &mut State| state.open && !state.ended;
        drop(self.changed.wait_timeout_while(self.lock(), duration, open));
    }

    /// Lets workers in.
    pub fn open(&self) {
        self.lock().open = true;
        self.changed.notify_all();
    }

    /// Closes the gate, and returns when no worker is inside.
    pub fn close(&self) {
        self.lock().open = false;
        self.changed.notify_all();
        drop(self.changed.wait_while(self.lock(), |state| state.inside > 0));
    }

    /// Ends the gate. From now on [`Gate::enter`] returns `None`.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// True if the gate is open.
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
