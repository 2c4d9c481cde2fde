// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks that outlive a panic.
//!
//! A thread that panics poisons the mutex that it holds. The job of that thread fails, but other
//! jobs and connections go on, so a poisoned lock is used like any other. What a mutex protects
//! must therefore be valid after each single step of the code that holds it.
//!
//! A thread that has to wait for a lock is counted, so that a bench can tell whether many workers
//! wait for each other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

static WAITS: AtomicU64 = AtomicU64::new(0);
static WAITED_NANOS: AtomicU64 = AtomicU64::new(0);

/// Locks `mutex`, also if a thread that held it has panicked.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => wait(mutex),
    }
}

#[cold]
fn wait<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    WAITS.fetch_add(1, Ordering::Relaxed);
    let started = Instant::now();
    let guard = mutex.lock().unwrap_or_else(PoisonError::into_inner);
    let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    WAITED_NANOS.fetch_add(nanos, Ordering::Relaxed);
    guard
}

/// How often threads of this process have waited in [`lock`], and the sum of these times.
pub fn waits() -> (u64, Duration) {
    let waited = Duration::from_nanos(WAITED_NANOS.load(Ordering::Relaxed));
    (WAITS.load(Ordering::Relaxed), waited)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_lock_is_counted() {
        let mutex = Mutex::new(0);
        let (before, _) = waits();
        let guard = lock(&mutex);
        std::thread::scope(|scope| {
            scope.spawn(|| *lock(&mutex) = 1);
            let deadline = Instant::now() + Duration::from_secs(60);
            while waits().0 == before && Instant::now() < deadline {
                std::thread::yield_now();
            }
            drop(guard);
        });
        assert_eq!(*lock(&mutex), 1);
        assert!(waits().0 > before);
    }
}
