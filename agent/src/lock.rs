// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks that outlive a panic.
//!
//! A thread that panics poisons the mutex that it holds. The job of that thread fails, but other
//! jobs and connections go on, so a poisoned lock is used like any other. What a mutex protects
//! must therefore be valid after each single step of the code that holds it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also if a thread that held it has panicked.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
