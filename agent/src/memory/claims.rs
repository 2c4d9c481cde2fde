//! The two steps by which a fault and whoever takes its page agree on who answers it, each with its
//! fence. See [`super::arriving`] for all of it.
//!
//! A fault marks the page as requested and then looks whether it is owed; whoever takes the page,
//! an arrival or a discard, looks afterwards whether it is requested. Both put a sequentially
//! consistent fence between the two, so at least one sees the other.

use super::bitmap::{Bitmap, WORD_BITS, Words};
use super::sync::{Ordering, fence};

/// What a fault found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Nobody had requested the page before.
    pub fresh: bool,
    /// The page is owed: whoever takes it answers. If not, it is what its file says.
    pub owed: bool,
}

/// A fault of host page `page`. `note` is called before anyone can answer it, if it is the first;
/// `in_flight` returns when all who may have taken the page before have placed it, or given it
/// back.
pub fn request<W: Words, V: Words>(
    requested: &Bitmap<W>, owed: &Bitmap<V>, page: u64, note: impl FnOnce(),
    in_flight: impl FnOnce(),
) -> Found {
    let fresh = requested.or_word(page / WORD_BITS, 1 << (page % WORD_BITS)) != 0;
    if fresh {
        note();
    }
    fence(Ordering::SeqCst);
    // One look decides: a page that is taken between two looks would be neither waited for nor
    // asked for.
    let mut is_owed = owed.contains(page);
    if !is_owed {
        // Not owed is not placed: whoever took it may be about to. And what could not be placed is
        // owed again.
        in_flight();
        is_owed = owed.contains(page);
    }
    Found { fresh, owed: is_owed }
}

/// Those of the host pages `taken` of word `word`, which the caller has taken, that are waited for.
/// A fault that comes later sees that they are not owed.
pub fn waited_for<W: Words>(requested: &Bitmap<W>, word: u64, taken: u64) -> u64 {
    fence(Ordering::SeqCst);
    requested.word(word) & taken
}
