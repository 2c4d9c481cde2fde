//! The steps by which all who capture a page, or end its time, agree: each page is read once, and
//! nobody reads it when it may change. See [`super::copy_before_write`] for all of it; a model
//! checker goes through all orders of these steps.
//!
//! Whoever captures publishes first, takes then, and reads while that is published. So whoever
//! finds a page taken, and looks who has published after that, sees who may still be reading it.

use super::fence::Readers;

/// A reader's number, the index of the block, and the word that it publishes.
pub type Place = (usize, usize, u64);

/// Captures: `take` returns what is the caller's from then on, and `read` reads it, if that is any.
/// Only after this its protection may be lifted. Returns what was taken.
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

/// Lets a write happen: captures the page as in [`capture`], or waits for those of whom `overlaps`
/// says that they may be reading it; then `lift` lifts the protection. It does so even if the page
/// cannot be read: nothing is left to be saved then, and the writer waits for nothing else. Returns
/// what was taken.
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

/// Pages are marked as discarded. Before they are freed, `rescue` captures what is pending of them,
/// and then all who took before have read.
pub fn before_punch(
    readers: &Readers, rescue: impl FnOnce(), overlaps: impl Fn(usize, u64) -> bool,
) {
    rescue();
    readers.wait(overlaps);
}

/// Pages that are not marked, but freed, have been punched. `tell` says that they are holes, for
/// whoever looks before they read; then all who may have looked before that have read. `overlaps`
/// is given what `tell` returns.
pub fn after_punch<T>(
    readers: &Readers, tell: impl FnOnce() -> T, overlaps: impl Fn(&T, usize, u64) -> bool,
) {
    let told = tell();
    readers.wait(|index, word| overlaps(&told, index, word));
}

/// Nothing is pending any more. Before all protection is given up, whoever took the last of it has
/// read.
pub fn before_unregister(readers: &Readers) {
    readers.wait(|_, _| true);
}
