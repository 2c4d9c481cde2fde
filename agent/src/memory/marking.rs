//! The lock that decides what comes first: the marks of a discard or a populate, or the instant of
//! a snapshot.
//!
//! Marks are set with it held, all of them or none, and the instant is taken with it held. A
//! discard looks for a snapshot after its marks: so either its marks come before the instant, and
//! the snapshot saves the pages as discarded; or the discard finds the snapshot, and has it save
//! them first. What a populate takes out of the discarded pages and puts into the dirty log is in
//! one of the two at the instant. A model checker goes through the orders.

use super::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Orders marks and instants. `T` is what is still to be saved.
#[derive(Debug)]
pub struct Marking<T> {
    marks: Mutex<()>,
    snapshot: Mutex<Option<Arc<T>>>,
}

impl<T> Default for Marking<T> {
    fn default() -> Self {
        Self { marks: Mutex::new(()), snapshot: Mutex::new(None) }
    }
}

impl<T> Marking<T> {
    /// No marks are set, and no instant is taken, while this is held.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the marks of a discard by `mark`. Returns with it what then is to be saved before it is
    /// freed.
    pub fn discard<R>(&self, mark: impl FnOnce() -> R) -> (R, Option<Arc<T>>) {
        let marks = self.hold();
        let marked = mark();
        drop(marks);
        (marked, self.snapshot())
    }

    /// The instant: `find` finds out what is to be saved as of now. From now on discards save what
    /// they discard.
    ///
    /// # Errors
    /// What `find` returns; there was no instant then.
    pub fn instant<E>(&self, find: impl FnOnce() -> Result<Arc<T>, E>) -> Result<(), E> {
        let _marks = self.hold();
        let found = find()?;
        *self.locked() = Some(found);
        Ok(())
    }

    /// Nothing is to be saved any more.
    pub fn end(&self) {
        *self.locked() = None;
    }

    /// What is still to be saved as it was at the instant of a snapshot, if that is over. An
    /// instant that is under way is waited for.
    pub fn running_snapshot(&self) -> Option<Arc<T>> {
        self.discard(|| ()).1
    }

    /// What is still to be saved as it was at the instant of a snapshot.
    fn snapshot(&self) -> Option<Arc<T>> {
        self.locked().clone()
    }

    fn locked(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
