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

/// `never-read`, where nothing is captured and nothing arrives: a worker of a pass reads.
#[test]
fn a_discard_waits_for_whoever_reads_its_pages() {
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
fn a_discard_does_not_wait_for_whoever_reads_other_pages() {
    const STUCK: Duration = Duration::from_secs(30);
    let memory = memory(&[PAGES, PAGES]);
    for at in 0..2 {
        for word in 0..PAGES / WORD_BITS {
            let reading = memory.readers.reading(3, at, word);
            let (say, done) = channel();
            std::thread::scope(|scope| {
                let memory = &memory;
                scope.spawn(move || {
                    let others = (0..2).flat_map(|block| (0..PAGES).map(move |page| (block, page)));
                    for (block, other) in others
                        .filter(|place| *place != (at, place.1) || place.1 / WORD_BITS != word)
                    {
                        memory.discard(&[page(block as u32, other)], false).unwrap();
                    }
                    say.send(()).unwrap();
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
