// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The order in which the workers of a snapshot save the pieces of the memory.
//!
//! Pieces with captured pages come first, the fullest before the others: they give back room, and
//! the guest is likely to write there again. The others follow in the order of the memory, from the
//! last piece on. A piece is aligned in its block, and so in the image. It is saved by one worker,
//! so that it is one write.

use super::captured_pages::{CapturedPages, Piece};
use super::host_page_set::HostPageSet;
use crate::lock::lock;
use pageferry_protocol::memory::PageRange;
use std::sync::Mutex;

/// Which piece is next.
#[derive(Debug)]
pub struct SweepOrder {
    /// Pages of a piece: a power of two.
    piece: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Where the search for the next piece begins.
    next: Piece,
    /// The pieces that are being saved.
    claimed: Vec<Piece>,
}

/// A piece that belongs to one worker until this is dropped.
#[derive(Debug)]
pub struct Claim<'a> {
    of: &'a SweepOrder,
    /// The piece.
    pub piece: Piece,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.of.state).claimed.retain(|piece| *piece != self.piece);
    }
}

impl SweepOrder {
    /// From the first piece on. A piece has `piece` pages.
    pub fn new(piece: u64) -> Self {
        Self { piece, state: Mutex::default() }
    }

    /// The pages of a piece, also those after the end of the block.
    pub fn pages(&self, (_, number): Piece) -> PageRange {
        PageRange::new(number * self.piece, self.piece)
    }

    /// Claims the next piece. `None` if there is none that nobody has claimed: nothing is pending
    /// and captured any more, or those who have claimed the rest will save it.
    pub fn claim(&self, pending: &HostPageSet, captured: &CapturedPages) -> Option<Claim<'_>> {
        let mut state = lock(&self.state);
        let is_free = |piece: &Piece| !state.claimed.contains(piece);
        let (at, number) =
            captured.fullest(is_free).or_else(|| self.next_pending(&state, pending))?;
        state.next = (at, number + 1);
        state.claimed.push((at, number));
        Some(Claim { of: self, piece: (at, number) })
    }

    /// The next piece with a pending page that nobody has claimed.
    fn next_pending(&self, state: &State, pending: &HostPageSet) -> Option<Piece> {
        let mut next = state.next;
        // After as many claimed pieces as there are, the search has been everywhere.
        for _ in 0..=state.claimed.len() {
            let unit = pending.block(next.0).unit();
            let (at, host_page) = pending.next_from(next.0, next.1 * self.piece / unit)?;
            let found = (at, host_page * pending.block(at).unit() / self.piece);
            if !state.claimed.contains(&found) {
                return Some(found);
            }
            next = (found.0, found.1 + 1);
        }
        None
    }
}
