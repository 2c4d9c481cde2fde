//! The two steps by which a fault and whoever takes its page agree on who answers it, each with its
//! fence. See [`super::missing_pages`] for all of it.
//!
//! A fault marks the page as requested and then looks whether it is missing; whoever takes the
//! page, an arrival or a discard, looks afterwards whether it is requested. Both put a sequentially
//! consistent fence between the two, so at least one sees the other.

use super::bitmap::{Bitmap, WORD_BITS, Words};
use super::sync::{Ordering, fence};

/// What a fault found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requested {
    /// Nobody had requested the page before.
    pub is_first: bool,
    /// The page is missing: whoever takes it answers. If not, it is what its file says.
    pub is_missing: bool,
}

/// A fault of host page `page`. `note` is called before anyone can answer it, if it is the first;
/// `in_flight` returns when all who may have taken the page before have placed it, or given it
/// back.
pub fn request<W: Words, V: Words>(
    requested: &Bitmap<W>, missing: &Bitmap<V>, page: u64, note: impl FnOnce(),
    in_flight: impl FnOnce(),
) -> Requested {
    let fresh = requested.or_word(page / WORD_BITS, 1 << (page % WORD_BITS)) != 0;
    if fresh {
        note();
    }
    fence(Ordering::SeqCst);
    // One look decides: a page that is taken between two looks would be neither waited for nor
    // asked for.
    let mut is_missing = missing.contains(page);
    if !is_missing {
        // Not missing is not placed: whoever took it may be about to. And what could not be placed
        // is missing again.
        in_flight();
        is_missing = missing.contains(page);
    }
    Requested { is_first: fresh, is_missing }
}

/// Those of the host pages `taken` of word `word`, which the caller has taken, that are waited for.
/// A fault that comes later sees that they are not missing.
pub fn requested_of<W: Words>(requested: &Bitmap<W>, word: u64, taken: u64) -> u64 {
    fence(Ordering::SeqCst);
    requested.word(word) & taken
}
