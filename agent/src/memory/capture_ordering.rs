// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The steps by which the threads that capture a page, discard it or end the snapshot agree: each
//! page is read once, and never after it may have changed. [`super::copy_before_write`] tells the
//! whole story, and a model checker tries all orders of these steps.
//!
//! A thread that captures publishes the word in the fence, takes the page, and reads it while the
//! word is published. So a thread that finds a page taken, and then looks who has published, sees
//! every thread that may still be reading it.

use super::fence::Readers;

/// The number of a reader, the index of the block, and the word that the reader publishes.
pub type Place = (usize, usize, u64);

/// Captures pages: `take` returns the pages that belong to the caller from then on, and `read`
/// reads them, if there are any. Their protection may be removed only after this. Returns what was
/// taken.
pub fn capture<E>(
    readers: &Readers, (reader, block, word): Place, take: impl FnOnce() -> u64,
    read: impl FnOnce(u64) -> Result<(), E>,
) -> Result<u64, E> {
    let _reading = readers.reading(reader, block, word);
    let taken = take();
    if taken != 0 {
        read(taken)?;
    }
    Ok(taken)
}

/// Lets a write happen. Captures the page as [`capture`] does. If the page is taken already, waits
/// for the threads that may be reading it, according to `overlaps`. Then `lift` removes the
/// protection, also if the page cannot be read: the snapshot has failed then, and the writer waits
/// for nothing else. Returns what was taken.
pub fn before_write<E>(
    readers: &Readers, place: Place, take: impl FnOnce() -> u64,
    read: impl FnOnce(u64) -> Result<(), E>, overlaps: impl Fn(usize, u64) -> bool,
    lift: impl FnOnce() -> Result<(), E>,
) -> Result<u64, E> {
    let captured = capture(readers, place, take, read);
    if matches!(captured, Ok(0)) {
        readers.wait(overlaps);
    }
    let lifted = lift();
    let taken = captured?;
    lifted.map(|()| taken)
}

/// A worker has taken all pages of a piece that were pending. Waits for the threads that took pages
/// of it before, according to `overlaps`. From then on nobody takes a page of the piece, and `take`
/// finds all of its pages that faults have captured.
pub fn collect<T>(
    readers: &Readers, overlaps: impl Fn(usize, u64) -> bool, take: impl FnOnce() -> T,
) -> T {
    readers.wait(overlaps);
    take()
}

/// Pages are marked as discarded, and not freed yet. `capture_pending` captures those of them that
/// are pending; then this waits until all threads that took pages before have read them.
pub fn before_punch(
    readers: &Readers, capture_pending: impl FnOnce(), overlaps: impl Fn(usize, u64) -> bool,
) {
    capture_pending();
    readers.wait(overlaps);
}

/// Pages without a mark were freed, and have been punched. `announce` says that they are holes,
/// for threads that look before they read. Then this waits for the threads that may have looked
/// before the announcement. `overlaps` gets what `announce` returns.
pub fn after_punch<T>(
    readers: &Readers, announce: impl FnOnce() -> T, overlaps: impl Fn(&T, usize, u64) -> bool,
) {
    let announced = announce();
    readers.wait(|index, word| overlaps(&announced, index, word));
}

/// Nothing is pending any more. Waits until all threads have read what they took, so that the
/// protection can be given up.
pub fn before_unregister(readers: &Readers) {
    readers.wait(|_, _| true);
}
