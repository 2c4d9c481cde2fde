// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lock that orders the marks of a discard or a populate against the instant of a snapshot.
//!
//! The lock is held while all marks of a discard are set, and while the instant is taken. A discard
//! looks for a snapshot after it has set its marks. So there are two cases:
//!
//! - The marks come before the instant: the snapshot saves the pages as discarded.
//! - The marks come after the instant: the discard finds the snapshot, and has it save the pages
//!   first.
//!
//! A populate moves pages from the discarded ones to the dirty log while the lock is held, so at
//! the instant each of these pages is in one of the two. A model checker tries all orders.
//!
//! A fix-up needs only that no marks are set meanwhile. So its threads share the lock, and do not
//! wait for each other.

use super::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Orders marks and instants. `T` is the snapshot's set of pages that are still to be saved.
#[derive(Debug)]
pub struct Marking<T> {
    marks: RwLock<()>,
    snapshot: Mutex<Option<Arc<T>>>,
}

impl<T> Default for Marking<T> {
    fn default() -> Self {
        Self { marks: RwLock::new(()), snapshot: Mutex::new(None) }
    }
}

impl<T> Marking<T> {
    /// While this is held, no marks are set and no instant is taken.
    pub fn lock(&self) -> RwLockWriteGuard<'_, ()> {
        self.marks.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Marking::lock`], but several threads can hold this at once. For those who set no marks
    /// of discards themselves.
    pub fn share(&self) -> RwLockReadGuard<'_, ()> {
        self.marks.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `mark` to set the marks of a discard. Returns its result, and the snapshot, if there
    /// is one: it must save the pages before they are freed.
    pub fn mark_discarded<R>(&self, mark: impl FnOnce() -> R) -> (R, Option<Arc<T>>) {
        let marks = self.lock();
        let marked = mark();
        drop(marks);
        (marked, self.snapshot())
    }

    /// Takes the instant: `find` collects what must be saved as of now. From now on discards find
    /// the snapshot.
    ///
    /// # Errors
    /// The error of `find`. There is no instant then.
    pub fn take_instant<E>(&self, find: impl FnOnce() -> Result<Arc<T>, E>) -> Result<(), E> {
        let _marks = self.lock();
        let found = find()?;
        *self.locked() = Some(found);
        Ok(())
    }

    /// Ends the snapshot: discards do not find it any more.
    pub fn end_snapshot(&self) {
        *self.locked() = None;
    }

    /// The running snapshot, if its instant is over. Waits for an instant that is being taken.
    pub fn running_snapshot(&self) -> Option<Arc<T>> {
        self.mark_discarded(|| ()).1
    }

    /// The snapshot, without waiting for an instant.
    pub(super) fn snapshot(&self) -> Option<Arc<T>> {
        self.locked().clone()
    }

    fn locked(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
