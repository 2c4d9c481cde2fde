// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The order of "protect a page" and "note that it is protected" before the instant. See
//! [`super::protect`] for the reason. A model checker tries all orders of these steps.
//!
//! A thread that protects a page notes it first, and protects it then. A thread that removes the
//! protection removes it first, and then the note. So while no thread is between its two steps,
//! every noted page is protected. A protected page without a note is possible, and is simply
//! protected once more.

use crate::memory::sync::bitmap::{Bitmap, Words};
use pageferry_protocol::memory::PageRange;

/// Those of the host pages `wanted` of word `word` that are not certainly protected.
pub fn not_protected<W: Words>(noted: &Bitmap<W>, word: u64, wanted: u64) -> u64 {
    wanted & !noted.word(word)
}

/// Protects host pages. If that fails, pages are noted that may not be protected: the notes cannot
/// be used any more.
pub fn protect<W: Words, E>(
    noted: &Bitmap<W>, host_pages: PageRange, protect: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    noted.set(host_pages);
    protect()
}

/// Removes the protection of host pages.
pub fn unprotect<W: Words, E>(
    noted: &Bitmap<W>, host_pages: PageRange, lift: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    lift()?;
    noted.clear(host_pages);
    Ok(())
}
