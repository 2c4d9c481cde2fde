// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two steps by which a fault and an event that takes its page agree on who answers the fault.
//! Each step has its memory fence. [`super::missing_pages`] tells the whole story.
//!
//! A fault marks the page as requested, then looks whether the page is missing. An arrival or a
//! discard takes the page, then looks whether it is requested. Both put a sequentially consistent
//! fence between their two accesses, so at least one of them sees the other.

use super::sync::bitmap::{Bitmap, WORD_BITS, Words};
use super::sync::{Ordering, fence};

/// What a fault found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requested {
    /// This is the first request for the page.
    pub is_first: bool,
    /// The page is missing: the thread that takes it answers the fault. If false, the page is what
    /// its file says.
    pub is_missing: bool,
}

/// Handles a fault of host page `page`. `note` is called if this is the first request; an arrival
/// may answer the fault even before that. `in_flight` must return only when all threads that took
/// the page before have placed it, or made it missing again.
pub fn request<W: Words, V: Words>(
    requested: &Bitmap<W>, missing: &Bitmap<V>, page: u64, note: impl FnOnce(),
    in_flight: impl FnOnce(),
) -> Requested {
    let is_first = requested.or_word(page / WORD_BITS, 1 << (page % WORD_BITS)) != 0;
    if is_first {
        note();
    }
    fence(Ordering::SeqCst);
    // Look once and keep the answer: if the page was taken between two looks, the fault would
    // neither wait for the page nor ask for it.
    let mut is_missing = missing.contains(page);
    if !is_missing {
        // "Not missing" does not mean "placed": the thread that took the page may still place it,
        // or fail and make it missing again.
        in_flight();
        is_missing = missing.contains(page);
    }
    Requested { is_first, is_missing }
}

/// Returns those of the host pages `taken` of word `word` that are requested. The caller has taken
/// them before. A fault that comes later sees that they are not missing.
pub fn requested_of<W: Words>(requested: &Bitmap<W>, word: u64, taken: u64) -> u64 {
    fence(Ordering::SeqCst);
    requested.word(word) & taken
}
