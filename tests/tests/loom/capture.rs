// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of a background snapshot: workers, write faults, discards and the end of the
//! snapshot act on a page at once, in every order. It runs the agent's own steps, over its own
//! fence and bitmap, with loom's atomics instead of the standard ones. The kernel is a word of
//! protected pages. The guest writes in the same step that removes the protection of its page: a
//! later write would see more of what was done before.
//!
//! The model fails if a page is read while or after it changes, if it is captured or put into the
//! image twice or not at all, or if the guest waits forever.

use crate::memory::capture_ordering::{
    before_punch, before_unregister, before_write, capture, collect,
};
use crate::memory::fence::{FAULTS, Readers, SESSION};
use crate::shm::bitmap::{Bitmap, WORD_BITS};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread::{self, JoinHandle};
use std::sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed};

/// The content of a page.
const AT_THE_INSTANT: u64 = 1;
const WRITTEN: u64 = 2;
const PUNCHED: u64 = 3;

/// Two pages of one word of the bitmap, and one of another.
const PAGE: u64 = 5;
const NEIGHBOUR: u64 = 6;
const ELSEWHERE: u64 = WORD_BITS + 7;

/// The slot of the only worker. The other two threads have the next slots.
const WORKER: usize = 0;
const SLOTS: usize = 3;

/// The page cannot be read.
#[derive(Debug, PartialEq, Eq)]
struct Unreadable;

/// A page of the guest. Its content is not a loom atomic: the model checks that accesses do not
/// overlap, and a read sees only the last value.
#[derive(Debug)]
struct Content {
    touch: UnsafeCell<()>,
    holds: Plain,
    captured: Plain,
    put: Plain,
}

impl Content {
    fn new() -> Self {
        Self {
            touch: UnsafeCell::new(()),
            holds: Plain::new(AT_THE_INSTANT),
            captured: Plain::new(0),
            put: Plain::new(0),
        }
    }

    /// Reads it into the image.
    fn read(&self) {
        self.touch.with(|_| {
            assert_eq!(self.holds.load(Relaxed), AT_THE_INSTANT, "it is not as of the instant")
        });
        assert_eq!(self.captured.fetch_add(1, Relaxed), 0, "it is captured once");
    }

    fn change(&self, to: u64) {
        self.touch.with_mut(|_| self.holds.store(to, Relaxed));
    }
}

/// The memory at the instant: these pages are pending and protected.
struct Snapshot {
    readers: Readers,
    pending: Bitmap<Vec<AtomicU64>>,
    /// The protected pages of each word.
    protected: [AtomicU64; 2],
    over: AtomicBool,
    /// True if discards must save pages before they punch.
    capturing: Mutex<bool>,
    contents: Vec<(u64, Content)>,
    /// The pages of each word that faults have captured and nobody has put.
    kept: Mutex<[u64; 2]>,
    /// The page that the guest waits to write to.
    writes: Option<u64>,
}

fn word_and_bit(page: u64) -> (u64, u64) {
    (page / WORD_BITS, 1 << (page % WORD_BITS))
}

impl Snapshot {
    fn of(pages: &[u64], writes: Option<u64>) -> Arc<Self> {
        let mut words = [0; 2];
        pages
            .iter()
            .map(|page| word_and_bit(*page))
            .for_each(|(word, bit)| words[word as usize] |= bit);
        Arc::new(Self {
            readers: Readers::new(SLOTS),
            pending: Bitmap::new(words.map(AtomicU64::new).into(), 2 * WORD_BITS),
            protected: words.map(AtomicU64::new),
            over: AtomicBool::new(false),
            capturing: Mutex::new(true),
            contents: pages.iter().map(|page| (*page, Content::new())).collect(),
            kept: Mutex::new([0; 2]),
            writes,
        })
    }

    fn content(&self, page: u64) -> &Content {
        &self.contents.iter().find(|(other, _)| *other == page).unwrap().1
    }

    fn read_all(&self, word: u64, taken: u64) {
        for (page, content) in &self.contents {
            let (of, bit) = word_and_bit(*page);
            if of == word && taken & bit != 0 {
                content.read();
            }
        }
    }

    /// The part of the kernel.
    fn lift(&self, word: u64, bits: u64) {
        let lifted = self.protected[word as usize].fetch_and(!bits, Ordering::AcqRel) & bits;
        if let Some(page) = self.writes {
            let (of, bit) = word_and_bit(page);
            if of == word && lifted & bit != 0 {
                self.content(page).change(WRITTEN);
            }
        }
    }

    /// Returns the pages whose protection must be removed.
    fn capture(&self, reader: usize, word: u64, mask: u64) -> u64 {
        let take = || self.pending.take_bits(word, mask);
        let read = |taken| {
            self.read_all(word, taken);
            Ok::<_, Unreadable>(())
        };
        capture(&self.readers, (reader, 0, word), take, read).unwrap()
    }

    /// A worker sweeps a word.
    fn work(&self, word: u64) {
        self.lift(word, self.capture(WORKER, word, u64::MAX));
    }

    /// A worker saves a piece: a word.
    fn save(&self, word: u64) {
        let taken = self.capture(WORKER, word, u64::MAX);
        self.lift(word, taken);
        let kept = collect(&self.readers, |_, other| other == word, || self.leave(word));
        self.put(word, taken | kept);
    }

    /// The pages of a word that faults have captured leave.
    fn leave(&self, word: u64) -> u64 {
        std::mem::take(&mut self.kept.lock().unwrap()[word as usize])
    }

    /// They leave in a batch, without the rest of their piece.
    fn put_batch(&self) {
        (0..2).for_each(|word| self.put(word, self.leave(word)));
    }

    fn put(&self, word: u64, pages: u64) {
        for (page, content) in &self.contents {
            let (of, bit) = word_and_bit(*page);
            if of == word && pages & bit != 0 {
                assert_eq!(content.captured.load(Relaxed), 1, "only what was read is put");
                assert_eq!(content.put.fetch_add(1, Relaxed), 0, "it is put once");
            }
        }
    }

    /// A worker cannot read the pages that it takes of a word.
    fn work_fails(&self, word: u64) {
        let take = || self.pending.take_bits(word, u64::MAX);
        let captured = capture(&self.readers, (WORKER, 0, word), take, |_| Err(Unreadable));
        assert!(matches!(captured, Ok(0) | Err(Unreadable)));
    }

    fn fault_with(&self, page: u64, readable: Result<(), Unreadable>) -> Result<u64, Unreadable> {
        let (word, bit) = word_and_bit(page);
        let take = || {
            if self.over.load(Ordering::Acquire) { 0 } else { self.pending.take_bits(word, bit) }
        };
        let read = |taken| {
            readable.map(|()| {
                self.read_all(word, taken);
                self.kept.lock().unwrap()[word as usize] |= taken;
            })
        };
        let lift = || {
            self.lift(word, bit);
            Ok(())
        };
        before_write(&self.readers, (FAULTS, 0, word), take, read, |_, other| other == word, lift)
    }

    /// The guest's write is reported.
    fn fault(&self, page: u64) {
        self.fault_with(page, Ok(())).unwrap();
    }

    fn discard(&self, page: u64) {
        let (word, bit) = word_and_bit(page);
        let capturing = *self.capturing.lock().unwrap();
        let rescue = || {
            if capturing {
                self.lift(word, self.capture(SESSION, word, bit));
            }
        };
        before_punch(&self.readers, rescue, |_, other| other == word);
        self.content(page).change(PUNCHED);
    }

    /// A worker found nothing pending, so the registration is removed.
    fn end(&self) {
        before_unregister(&self.readers);
        self.over.store(true, Ordering::Release);
        (0..2).for_each(|word| self.lift(word, u64::MAX));
    }

    /// The snapshot failed.
    fn abort(&self) {
        self.over.store(true, Ordering::Release);
        *self.capturing.lock().unwrap() = false;
    }

    #[track_caller]
    fn check_captured(&self) {
        self.contents.iter().for_each(|(page, content)| {
            assert_eq!(content.captured.load(Relaxed), 1, "page {page}")
        });
        self.check_written();
    }

    #[track_caller]
    fn check_put(&self) {
        assert_eq!(*self.kept.lock().unwrap(), [0; 2], "the worker has collected all");
        self.contents
            .iter()
            .for_each(|(page, content)| assert_eq!(content.put.load(Relaxed), 1, "page {page}"));
        self.check_captured();
    }

    #[track_caller]
    fn check_written(&self) {
        let written =
            self.writes.is_none_or(|page| self.content(page).holds.load(Relaxed) == WRITTEN);
        assert!(written, "the guest waits forever");
    }
}

fn spawn(snapshot: &Arc<Snapshot>, act: impl FnOnce(&Snapshot) + 'static) -> JoinHandle<()> {
    let snapshot = snapshot.clone();
    thread::spawn(move || act(&snapshot))
}

fn join<const N: usize>(threads: [JoinHandle<()>; N]) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Limits the number of preemptions, because all orders would take too long.
fn model(preemptions: impl Into<Option<usize>>, check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions.into();
    // A wait for a reader spins, and each turn counts.
    model.max_branches = 20_000;
    model.check(check);
}

#[test]
fn worker_or_fault_captures_before_the_guest_writes() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], Some(PAGE));
        let worker = spawn(&snapshot, |snapshot| snapshot.work(0));
        snapshot.fault(PAGE);
        join([worker]);
        snapshot.check_captured();
    });
}

#[test]
fn a_worker_has_read_what_a_fault_lets_be_written() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE, ELSEWHERE], Some(PAGE));
        let worker = spawn(&snapshot, |snapshot| {
            let taken = [0, 1].map(|word| snapshot.capture(WORKER, word, u64::MAX));
            // The worker fills its batch first.
            (0..).zip(taken).for_each(|(word, taken)| snapshot.lift(word, taken));
        });
        snapshot.fault(PAGE);
        join([worker]);
        snapshot.check_captured();
    });
}

#[test]
fn a_fault_beside_another_page_of_its_word_takes_its_own() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE, NEIGHBOUR], Some(NEIGHBOUR));
        let worker = spawn(&snapshot, |snapshot| snapshot.work(0));
        snapshot.fault(PAGE);
        snapshot.fault(NEIGHBOUR);
        join([worker]);
        snapshot.check_captured();
    });
}

#[test]
fn a_discard_is_captured_before_it_is_punched() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], None);
        let worker = spawn(&snapshot, |snapshot| snapshot.work(0));
        snapshot.discard(PAGE);
        join([worker]);
        snapshot.check_captured();
    });
}

#[test]
fn a_discard_waits_for_a_fault_that_took_its_page() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], None);
        let fault = spawn(&snapshot, |snapshot| snapshot.fault(PAGE));
        snapshot.discard(PAGE);
        join([fault]);
        snapshot.check_captured();
    });
}

#[test]
fn worker_fault_and_discard_capture_each_page_once() {
    model(2, || {
        let snapshot = Snapshot::of(&[PAGE, NEIGHBOUR], Some(PAGE));
        let worker = spawn(&snapshot, |snapshot| snapshot.work(0));
        let discard = spawn(&snapshot, |snapshot| snapshot.discard(NEIGHBOUR));
        snapshot.fault(PAGE);
        join([worker, discard]);
        snapshot.check_captured();
    });
}

#[test]
fn a_fault_reads_the_last_page_before_protection_ends() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], Some(PAGE));
        let fault = spawn(&snapshot, |snapshot| snapshot.fault(PAGE));
        snapshot.work(0);
        snapshot.end();
        join([fault]);
        snapshot.check_captured();
    });
}

#[test]
fn a_guest_whose_page_a_worker_took_and_could_not_read_goes_on() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], Some(PAGE));
        let worker = spawn(&snapshot, |snapshot| snapshot.work_fails(0));
        snapshot.fault(PAGE);
        join([worker]);
        snapshot.check_written();
    });
}

#[test]
fn a_guest_whose_page_cannot_be_read_goes_on() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], Some(PAGE));
        assert_eq!(snapshot.fault_with(PAGE, Err(Unreadable)), Err(Unreadable));
        snapshot.check_written();
    });
}

#[test]
fn a_discard_as_a_snapshot_fails_is_not_read_after() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], None);
        let fault = spawn(&snapshot, |snapshot| snapshot.fault(PAGE));
        let discard = spawn(&snapshot, |snapshot| snapshot.discard(PAGE));
        snapshot.abort();
        join([fault, discard]);
    });
}

#[test]
fn a_worker_collects_what_faults_captured_of_its_piece() {
    model(None, || {
        let snapshot = Snapshot::of(&[PAGE], Some(PAGE));
        let worker = spawn(&snapshot, |snapshot| snapshot.save(0));
        snapshot.fault(PAGE);
        join([worker]);
        snapshot.check_put();
    });
}

#[test]
fn a_worker_collects_a_page_beside_those_that_it_takes() {
    model(3, || {
        let snapshot = Snapshot::of(&[PAGE, NEIGHBOUR, ELSEWHERE], Some(NEIGHBOUR));
        let worker = spawn(&snapshot, |snapshot| {
            snapshot.save(1);
            snapshot.save(0);
        });
        snapshot.fault(ELSEWHERE);
        snapshot.fault(NEIGHBOUR);
        join([worker]);
        snapshot.check_put();
    });
}

#[test]
fn worker_and_batch_put_each_captured_page_once() {
    model(2, || {
        let snapshot = Snapshot::of(&[PAGE, NEIGHBOUR], Some(PAGE));
        let worker = spawn(&snapshot, |snapshot| snapshot.save(0));
        let batch = spawn(&snapshot, Snapshot::put_batch);
        snapshot.fault(PAGE);
        join([worker, batch]);
        snapshot.check_put();
    });
}

#[test]
fn a_page_that_a_batch_has_is_not_read_again_by_its_discard() {
    model(2, || {
        let snapshot = Snapshot::of(&[PAGE], None);
        let fault = spawn(&snapshot, |snapshot| snapshot.fault(PAGE));
        let batch = spawn(&snapshot, Snapshot::put_batch);
        snapshot.discard(PAGE);
        join([fault, batch]);
        snapshot.check_captured();
    });
}

#[test]
fn a_guest_goes_on_if_the_snapshot_fails_while_a_batch_leaves() {
    model(2, || {
        let snapshot = Snapshot::of(&[PAGE], Some(PAGE));
        let fault = spawn(&snapshot, |snapshot| snapshot.fault(PAGE));
        let batch = spawn(&snapshot, Snapshot::put_batch);
        snapshot.abort();
        join([fault, batch]);
        snapshot.check_written();
    });
}
