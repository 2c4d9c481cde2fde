// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of the lock-free parts of the bitmap: every interleaving, and every value that the
//! memory orders allow a load to see.
//!
//! `bitmap.rs` is compiled here a second time, with loom's atomics instead of the standard ones.
//! `never-read`, `never-populate` and `same-memory` depend on these checks: no bit is lost, none is
//! taken twice, and the thread that takes a bit sees what was written before it was set.

use crate::shm::bitmap::Bitmap;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use pageferry_protocol::memory::PageRange;

type Shared = Arc<Bitmap<Vec<AtomicU64>>>;

/// A bitmap whose first word is `word`.
fn bitmap(pages: u64, word: u64) -> Shared {
    let mut words: Vec<AtomicU64> = vec![AtomicU64::new(word)];
    words.extend((1..pages.div_ceil(64)).map(|_| AtomicU64::new(0)));
    Arc::new(Bitmap::new(words, pages))
}

/// Runs `f` on a thread of the model.
fn spawn<T: 'static>(
    shared: &Shared, f: impl FnOnce(&Shared) -> T + 'static,
) -> thread::JoinHandle<T> {
    let shared = shared.clone();
    thread::spawn(move || f(&shared))
}

fn page(first: u64) -> PageRange {
    PageRange::new(first, 1)
}

/// The guest writes `value` to `memory`, which is page `page`. The store is as weak as a plain one:
/// only the bitmap orders it.
fn write(
    dirty: &Shared, page: PageRange, memory: &Arc<AtomicU64>, value: u64,
) -> thread::JoinHandle<u64> {
    let memory = memory.clone();
    spawn(dirty, move |dirty| {
        memory.store(value, Ordering::Relaxed);
        dirty.set(page)
    })
}

#[test]
fn a_bit_set_while_its_word_is_taken_is_taken_or_still_there() {
    loom::model(|| {
        let dirty = bitmap(64, 0b1);
        let setter = spawn(&dirty, |dirty| dirty.set(page(5)));
        let taken = dirty.take_word(0);
        assert_eq!(setter.join().unwrap(), 1, "the bit was clear in either order");
        let left = dirty.word(0);
        assert_eq!(taken | left, 0b10_0001, "nothing is lost");
        assert_eq!(taken & left, 0, "nothing is there twice");
        assert_eq!(taken & 1, 1, "what was set before is taken");
    });
}

#[test]
fn a_bit_set_again_while_it_is_taken_is_never_lost() {
    loom::model(|| {
        let dirty = bitmap(64, 0b1);
        let setter = spawn(&dirty, |dirty| dirty.set(page(0)));
        let taken = dirty.take_bits(0, 0b1);
        let newly = setter.join().unwrap();
        assert_eq!(taken, 1);
        // If the mark came before the bit was taken, it was a repetition. If it came after, it is a
        // new mark, which the next pass finds.
        assert_eq!(dirty.word(0), newly);
    });
}

#[test]
fn two_setters_of_one_word_count_each_page_once() {
    loom::model(|| {
        let dirty = bitmap(128, 0);
        let other = spawn(&dirty, |dirty| dirty.set(PageRange::new(60, 6)));
        let here = dirty.set(PageRange::new(62, 8));
        let there = other.join().unwrap();
        assert_eq!(here + there, 10, "60 to 69, each counted by the one that set it");
        assert_eq!(dirty.count(dirty.all()), 10);
        assert_eq!(dirty.runs(dirty.all()).collect::<Vec<_>>(), [PageRange::new(60, 10)]);
    });
}

#[test]
fn two_takers_never_both_get_a_bit() {
    loom::model(|| {
        let dirty = bitmap(64, 0b111);
        let other = spawn(&dirty, |dirty| dirty.take_bits(0, 0b011));
        let here = dirty.take_word(0);
        let there = other.join().unwrap();
        assert_eq!(here & there, 0, "a page is read by one worker only");
        assert_eq!(here | there, 0b111);
        assert_eq!(dirty.word(0), 0);
    });
}

#[test]
fn taking_some_bits_leaves_those_beside_them() {
    loom::model(|| {
        let dirty = bitmap(64, 0b0110);
        let setter = spawn(&dirty, |dirty| dirty.set(page(0)));
        let taken = dirty.take_bits(0, 0b0100);
        setter.join().unwrap();
        assert_eq!(taken, 0b0100);
        assert_eq!(dirty.word(0), 0b0011);
    });
}

#[test]
fn clearing_and_setting_at_once_agree_on_the_counts() {
    loom::model(|| {
        let discarded = bitmap(64, 0b1100);
        let populate = spawn(&discarded, |discarded| discarded.clear(PageRange::new(1, 3)));
        let set = discarded.set(PageRange::new(0, 3));
        let cleared = populate.join().unwrap();
        let left = discarded.count(discarded.all());
        // A discard and a populate that race have no order, but their results add up to the final
        // state.
        assert_eq!(2 + set - cleared, left);
        assert!(discarded.contains(0), "only one of the two spoke of page 0");
        assert!(!discarded.contains(3), "only one of the two spoke of page 3");
    });
}

#[test]
fn a_write_before_the_set_is_seen_after_the_take() {
    loom::model(|| {
        let dirty = bitmap(64, 0);
        let memory = Arc::new(AtomicU64::new(0));
        let guest = write(&dirty, page(3), &memory, 7);
        if dirty.take_word(0) != 0 {
            assert_eq!(memory.load(Ordering::Relaxed), 7, "clear, then read (`clear-then-read`)");
        }
        guest.join().unwrap();
    });
}

#[test]
fn a_write_logged_after_the_take_comes_with_the_next_pass() {
    loom::model(|| {
        let dirty = bitmap(64, 0b1);
        let version = Arc::new(AtomicU64::new(1));
        let guest = write(&dirty, page(0), &version, 2);
        let taken = dirty.take_word(0);
        assert_eq!(taken, 1);
        let mut sent = version.load(Ordering::Relaxed);
        guest.join().unwrap();
        // The guest is paused: the last pass.
        if dirty.take_word(0) != 0 {
            sent = version.load(Ordering::Relaxed);
        }
        assert_eq!(sent, 2, "the old version was sent, and the bit was gone");
    });
}

#[test]
fn a_page_or_ed_in_over_two_words_meets_takers_of_both() {
    loom::model(|| {
        let dirty = bitmap(128, 0);
        let sync = spawn(&dirty, |dirty| dirty.or_at(62, 0b1111));
        let (low, high) = (dirty.take_word(0), dirty.take_word(1));
        sync.join().unwrap();
        assert_eq!(low | dirty.word(0), 0b11 << 62);
        assert_eq!(high | dirty.word(1), 0b11);
        assert_eq!(low & dirty.word(0), 0);
        assert_eq!(high & dirty.word(1), 0);
    });
}
