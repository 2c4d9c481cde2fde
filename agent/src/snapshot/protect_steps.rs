//! What is protected ahead of the instant, and noted: the order of the two. See [`super::protect`]
//! for what it is for; a model checker goes through all orders of these steps.
//!
//! Whoever protects notes first and protects then; whoever lifts, lifts first and takes the note
//! away then. So while nobody is between the two steps, what is noted is protected. What is
//! protected need not be noted: it is protected once more.

use super::bitmap::{Bitmap, Words};
use pageferry_protocol::memory::PageRange;

/// Those of the host pages `wanted` of word `word` that are not protected for sure.
pub fn not_protected<W: Words>(noted: &Bitmap<W>, word: u64, wanted: u64) -> u64 {
    wanted & !noted.word(word)
}

/// Host pages are protected. If that fails they are noted and may not be: nothing that is noted
/// holds any more.
pub fn protect<W: Words, E>(
    noted: &Bitmap<W>, host_pages: PageRange, protect: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    noted.set(host_pages);
    protect()
}

/// The protection of host pages is lifted.
pub fn unprotect<W: Words, E>(
    noted: &Bitmap<W>, host_pages: PageRange, lift: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    lift()?;
    noted.clear(host_pages);
    Ok(())
}
