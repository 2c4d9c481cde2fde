// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks that a panic does not close.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a thread has panicked while it held the lock.
///
/// A thread of the VMM may panic in a hook or while it uses the client. The other threads must
/// still be able to resume the guest, so a poisoned lock is no reason to panic, too.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
