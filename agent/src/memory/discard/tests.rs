// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::memory::test_support::{let_others_run, memory};
use pageferry_protocol::memory::PAGE_SIZE;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::yield_now;
use std::time::Duration;

const PAGES: u64 = 5 * WORD_BITS;

fn page(block: u32, page: u64) -> BlockRange {
    BlockRange { block, offset: page * PAGE_SIZE, length: PAGE_SIZE }
}

/// `never-read`, with no snapshot and no missing pages: the reader is a worker of a pass.
#[test]
fn discard_waits_for_readers_of_its_pages() {
    let memory = memory(&[PAGES, PAGES]);
    for (at, block) in memory.blocks().iter().enumerate() {
        let id = at as u32;
        for word in 0..PAGES / WORD_BITS {
            for discarded in [word * WORD_BITS, (word + 1) * WORD_BITS - 1] {
                block.backing.write(discarded * PAGE_SIZE, &[7]).unwrap();
                let reading = memory.readers.reading(3, at, word);
                std::thread::scope(|scope| {
                    let discard =
                        scope.spawn(|| memory.discard(&[page(id, discarded)], true).unwrap());
                    while !block.discarded.contains(discarded) {
                        yield_now();
                    }
                    let_others_run();
                    assert!(
                        !discard.is_finished(),
                        "block {id}, page {discarded:#x}, word {word} is being read"
                    );
                    let mut byte = [0];
                    block.backing.read(discarded * PAGE_SIZE, &mut byte).unwrap();
                    assert_eq!(byte, [7], "freed while it was read");
                    drop(reading);
                    assert_eq!(discard.join().unwrap(), 1);
                });
                assert_eq!(block.backing.first_data(block.all()).unwrap(), None);
            }
        }
    }
}

#[test]
fn discard_does_not_wait_for_readers_of_other_pages() {
    const STUCK: Duration = Duration::from_secs(30);
    let memory = memory(&[PAGES, PAGES]);
    for at in 0..2 {
        for word in 0..PAGES / WORD_BITS {
            let reading = memory.readers.reading(3, at, word);
            let (finished, done) = channel();
            std::thread::scope(|scope| {
                let memory = &memory;
                scope.spawn(move || {
                    let others = (0..2).flat_map(|block| (0..PAGES).map(move |page| (block, page)));
                    for (block, other) in others
                        .filter(|place| *place != (at, place.1) || place.1 / WORD_BITS != word)
                    {
                        memory.discard(&[page(block as u32, other)], false).unwrap();
                    }
                    finished.send(()).unwrap();
                });
                let outcome = done.recv_timeout(STUCK);
                drop(reading);
                assert_ne!(
                    outcome,
                    Err(RecvTimeoutError::Timeout),
                    "word {word} of block {at} is being read"
                );
            });
        }
    }
}

#[test]
fn neighbouring_ranges_of_one_block_are_merged() {
    let range = |block: usize, first, count| (block, PageRange::new(first, count));
    let ranges = [
        range(0, 3, 2),
        range(0, 5, 1),
        range(0, 7, 1),
        range(1, 8, 1),
        range(1, 20, 0),
        range(1, 9, 2),
        range(0, 11, 1),
    ];
    let expected = [range(0, 3, 3), range(0, 7, 1), range(1, 8, 3), range(0, 11, 1)];
    assert_eq!(merged(&ranges).collect::<Vec<_>>(), expected);
}

/// A thread that has walked the bitmaps need not walk them again while the memory is unchanged.
#[test]
fn memory_is_unchanged_between_discards_and_populates() {
    let memory = memory(&[PAGES]);
    let before = memory.changes();
    assert!(memory.is_unchanged(before));
    memory.discard(&[page(0, 3)], true).unwrap();
    let discarded = memory.changes();
    assert!(!memory.is_unchanged(before) && memory.is_unchanged(discarded));
    memory.populate(&[page(0, 3)]).unwrap();
    let populated = memory.changes();
    assert!(!memory.is_unchanged(discarded) && memory.is_unchanged(populated));
    let change = memory.change();
    assert!(!memory.is_unchanged(populated) && !memory.is_unchanged(memory.changes()));
    drop(change);
    assert!(memory.is_unchanged(memory.changes()));
}

#[test]
fn a_refused_range_is_described_once() {
    let memory = memory(&[64]);
    let id = memory.blocks()[0].geometry.id;
    let range = BlockRange { block: id, offset: 64 * PAGE_SIZE, length: PAGE_SIZE };
    let error = memory.discard(&[range], false).unwrap_err();
    let DiscardError::Range { source, .. } = &error else { panic!("{error}") };
    let expected = format!("range 0 of block {id}: {source}");
    assert_eq!(crate::error::chain(&error), expected);
}
