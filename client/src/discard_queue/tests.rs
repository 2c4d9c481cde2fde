// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;

const KINDS: [DiscardKind; 3] =
    [DiscardKind::Discard(Punch::Yes), DiscardKind::Discard(Punch::No), DiscardKind::Free];

/// No limit on bytes.
const ANY: u64 = u64::MAX;

fn page(page: u64) -> BlockRange {
    BlockRange { block: 0, offset: page << 12, length: 1 << 12 }
}

fn push(queue: &DiscardQueue, ranges: &[BlockRange], kind: DiscardKind, most: u64) -> Pushed {
    queue.push(ranges, kind, most, |_| Ok(())).unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Push(DiscardKind, Vec<BlockRange>),
    /// Takes all entries, and puts some of them back.
    TakeAndPutBack(usize),
    /// What a full queue does.
    Merge,
}

fn any_step() -> impl Strategy<Value = Step> {
    let range = (0u32..3, 0u64..64, 0u64..16).prop_map(|(block, offset, length)| BlockRange {
        block,
        offset,
        length,
    });
    let push =
        (0usize..3, vec(range, 0..4)).prop_map(|(kind, ranges)| Step::Push(KINDS[kind], ranges));
    prop_oneof![
        8 => push,
        1 => (0usize..8).prop_map(Step::TakeAndPutBack),
        1 => Just(Step::Merge),
    ]
}

/// All bytes of an entry, with its kind and block.
fn bytes_of(entry: &Entry) -> impl Iterator<Item = (DiscardKind, u32, u64)> + use<> {
    let Entry { kind, block, offset, length } = *entry;
    (offset..offset + length).map(move |byte| (kind, block, byte))
}

proptest! {
    #[test]
    fn queue_agrees_with_a_set_of_bytes(steps in vec(any_step(), 0..40)) {
        let queue = DiscardQueue::default();
        let mut naive = BTreeSet::new();
        for step in steps {
            match step {
                Step::Push(kind, ranges) => {
                    prop_assert_eq!(push(&queue, &ranges, kind, ANY), Pushed::All);
                    let entries = ranges.iter().map(|range| Entry::new(kind, range));
                    naive.extend(entries.flat_map(|entry| bytes_of(&entry)));
                }
                Step::TakeAndPutBack(count) => {
                    let taken = queue.take();
                    prop_assert!(queue.is_empty());
                    let found: BTreeSet<_> = taken.iter().flat_map(bytes_of).collect();
                    prop_assert_eq!(&found, &naive);
                    let gone = &taken[..count.min(taken.len())];
                    for byte in gone.iter().flat_map(bytes_of) {
                        naive.remove(&byte);
                    }
                    queue.put_back(taken[gone.len()..].iter().copied());
                }
                Step::Merge => queue.lock().merge(),
            }
            let queued = queue.lock();
            let lengths = queued.entries.iter().map(|entry| entry.length);
            prop_assert_eq!(queued.bytes, lengths.sum::<u64>());
        }
        let taken = queue.take();
        prop_assert_eq!(taken.iter().flat_map(bytes_of).collect::<BTreeSet<_>>(), naive);
        // Sorted, and nothing is left to merge.
        for pair in taken.windows(2) {
            prop_assert!(pair[0] < pair[1] && pair[0].union(&pair[1]).is_none(), "{:?}", pair);
        }
    }
}

#[test]
fn a_full_queue_takes_nothing_more_and_loses_nothing() {
    let queue = DiscardQueue::default();
    let most = MAX_QUEUED as u64;
    for even in 0..most {
        assert_eq!(push(&queue, &[page(2 * even)], DiscardKind::Free, ANY), Pushed::All);
    }
    // The first of them closes a gap, which wins too little.
    for ranges in [vec![page(1)], vec![page(0), page(1 << 20)]] {
        assert_eq!(push(&queue, &ranges, DiscardKind::Free, ANY), Pushed::Nothing);
    }
    let taken = queue.take();
    assert_eq!((taken.len(), taken[0].range()), (MAX_QUEUED, page(0)));
    assert_eq!(push(&queue, &[page(1)], DiscardKind::Free, ANY), Pushed::All);
}

#[test]
fn neighbours_in_any_order_never_fill_the_queue() {
    let queue = DiscardQueue::default();
    let count = 32_000;
    for turn in 0..count {
        let order = turn / 1000 * 1000 + turn * 7 % 1000;
        let pushed = push(&queue, &[page(order % count)], DiscardKind::Free, ANY);
        assert_eq!(pushed, Pushed::All, "{turn}");
    }
    let whole = BlockRange { block: 0, offset: 0, length: count << 12 };
    assert_eq!(queue.take(), [Entry::new(DiscardKind::Free, &whole)]);
}

#[test]
fn the_queue_holds_so_many_bytes_and_no_more() {
    let queue = DiscardQueue::default();
    let most = 4 << 12;
    assert_eq!(push(&queue, &[page(0), page(1), page(9)], DiscardKind::Free, most), Pushed::All);
    // Twice the same is not more.
    assert_eq!(push(&queue, &[page(4)], DiscardKind::Free, most), Pushed::All);
    assert_eq!(push(&queue, &[page(9)], DiscardKind::Free, most), Pushed::Nothing);
    assert_eq!(queue.take().len(), 3);
    assert_eq!(push(&queue, &[page(9), page(9)], DiscardKind::Free, most), Pushed::All);
    assert_eq!(queue.lock().bytes, 1 << 12);
}

#[test]
fn a_wrong_range_keeps_the_whole_list_out() {
    let queue = DiscardQueue::default();
    let check = |range: &BlockRange| match range.offset {
        0 => Ok(()),
        _ => Err(Error::UnknownBlock { id: range.block }),
    };
    queue.push(&[page(0), page(1)], DiscardKind::Free, ANY, check).unwrap_err();
    assert!(queue.is_empty());
}
