// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use pageferry_protocol::memory::PAGE_SIZE;
use proptest::prelude::*;

const PIECE: u64 = 8;
const SIZE: usize = PAGE_SIZE as usize;

fn room(captured: &CapturedPages) -> Option<Room<'_>> {
    captured.room(SIZE, Duration::ZERO).unwrap()
}

/// Captures a page whose content is its number.
fn capture(captured: &CapturedPages, at: usize, page: u64) {
    let mut room = room(captured).unwrap();
    room.bytes().fill(page as u8);
    room.keep(at, PageRange::new(page, 1));
}

fn pages(leaving: &Leaving<'_>) -> Vec<(usize, u64)> {
    for page in leaving.pages() {
        assert!(page.bytes.iter().all(|byte| *byte == page.pages.first as u8));
    }
    leaving.pages().iter().map(|page| (page.at, page.pages.first)).collect()
}

#[test]
fn room_is_allocated_when_it_is_needed_and_used_again() {
    let captured = CapturedPages::new(3 * SIZE, PIECE);
    let allocated = || {
        let state = lock(&captured.state);
        state.used + state.spare_bytes()
    };
    assert_eq!(allocated(), 0);
    drop(room(&captured).unwrap());
    assert_eq!(allocated(), SIZE);
    (0..3).for_each(|page| capture(&captured, 0, page));
    assert_eq!(allocated(), 3 * SIZE);
    assert!(room(&captured).is_none());
    drop(captured.take((0, 0)));
    assert_eq!(allocated(), 3 * SIZE);
    // Room for a larger host page: what is spare must not be in its way.
    let large = captured.room(3 * SIZE, Duration::ZERO).unwrap().unwrap();
    assert_eq!((large.bytes.len(), allocated()), (3 * SIZE, 3 * SIZE));
}

#[test]
fn a_wait_for_room_ends_when_pages_leave() {
    let captured = CapturedPages::new(SIZE, PIECE);
    capture(&captured, 0, 9);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| captured.room(SIZE, Duration::from_secs(60)).unwrap());
        // Room is scarce, so the page leaves.
        let leaving = captured.take_scarce(PIECE as usize * SIZE).unwrap();
        assert_eq!(pages(&leaving), [(0, 9)]);
        drop(leaving);
        assert!(waiting.join().unwrap().is_some());
    });
}

#[test]
fn nothing_leaves_in_batches_while_there_is_room() {
    let captured = CapturedPages::new(32 * SIZE, PIECE);
    (0..28).for_each(|page| capture(&captured, 0, page));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| captured.take_scarce(SIZE).map(|leaving| pages(&leaving)));
        crate::memory::test_support::let_others_run();
        assert!(!waiting.is_finished());
        capture(&captured, 0, 28);
        assert!(waiting.join().unwrap().is_some());
        captured.close();
        assert!(captured.take_scarce(SIZE).is_none());
    });
}

proptest! {
    /// Whatever the order, each page leaves once, in order within what leaves at once, and batches
    /// come to all pieces.
    #[test]
    fn each_captured_page_leaves_once(
        steps in prop::collection::vec((0..2usize, 0..64u64, 0..6u8), 1..200),
    ) {
        let captured = CapturedPages::new(1000 * SIZE, PIECE);
        let mut model = std::collections::BTreeSet::new();
        let left = |model: &mut std::collections::BTreeSet<_>, leaving: Leaving<'_>| {
            let pages = pages(&leaving);
            assert!(pages.is_sorted());
            pages.iter().for_each(|page| assert!(model.remove(page), "{page:?}"));
            pages.len()
        };
        for (at, page, step) in steps {
            match step {
                0 => {
                    let piece = (at, page / PIECE);
                    left(&mut model, captured.take(piece));
                    let rest = model.iter().filter(|(of, page)| (*of, page / PIECE) == piece);
                    prop_assert_eq!(rest.count(), 0);
                }
                1 => {
                    let found = captured.fullest(|piece| piece.0 == at);
                    let count = |piece: Piece| {
                        model.iter().filter(|(of, page)| (*of, page / PIECE) == piece).count()
                    };
                    let most = (0..8).map(|number| count((at, number))).max().unwrap();
                    prop_assert_eq!(found.map_or(0, count), most);
                }
                2 => {
                    let is_empty = model.is_empty();
                    let batch = captured.take_batch(12 * SIZE);
                    prop_assert!(batch.pages().len() <= 12);
                    prop_assert_eq!(left(&mut model, batch) == 0, is_empty);
                }
                _ if model.insert((at, page)) => capture(&captured, at, page),
                _ => {}
            }
        }
    }
}
