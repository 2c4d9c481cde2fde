// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of the fence between workers that read and discards that punch (`never-read` and
//! `clear-then-read`): every interleaving of both. A freed page has no mark that a worker could see
//! before the punch. For a free the fence comes after the punch, see `agent/src/memory/freed.rs`.

use crate::memory::capture_ordering::{after_punch, before_punch};
use crate::memory::fence::Readers;
use crate::shm::bitmap::Bitmap;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};

/// The state that a discard and a worker share: the mark, and whether the page is punched.
struct Page {
    readers: Readers,
    discarded: AtomicU64,
    punched: AtomicU64,
}

impl Page {
    fn new(workers: usize) -> Arc<Self> {
        Arc::new(Self {
            readers: Readers::new(workers),
            discarded: AtomicU64::new(0),
            punched: AtomicU64::new(0),
        })
    }

    /// A worker's step on word 5 of block 2. True if it read.
    fn work(&self, worker: usize) -> bool {
        let _reading = self.readers.reading(worker, 2, 5);
        if self.discarded.load(Ordering::Relaxed) != 0 {
            return false;
        }
        assert_eq!(
            self.punched.load(Ordering::Relaxed),
            0,
            "the page was punched while a worker reads it"
        );
        true
    }

    fn discard(&self) {
        self.discarded.fetch_or(1, Ordering::AcqRel);
        self.readers.wait(|block, word| block == 2 && word == 5);
        self.punched.store(1, Ordering::Relaxed);
    }
}

#[test]
fn a_page_is_never_read_after_its_discard_was_acknowledged() {
    loom::model(|| {
        let page = Page::new(1);
        let worker = {
            let page = page.clone();
            loom::thread::spawn(move || page.work(0))
        };
        page.discard();
        worker.join().unwrap();
        // Acknowledged: a worker that comes later does not read.
        assert!(!page.work(0));
    });
}

#[test]
fn two_workers_are_both_waited_for() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let page = Page::new(2);
        let workers: Vec<_> = (0..2)
            .map(|worker| {
                let page = page.clone();
                loom::thread::spawn(move || page.work(worker))
            })
            .collect();
        page.discard();
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

#[test]
fn a_worker_elsewhere_is_not_waited_for() {
    loom::model(|| {
        let readers = Arc::new(Readers::new(1));
        let _elsewhere = readers.reading(0, 2, 6);
        // This would never return if it waited.
        readers.wait(|block, word| block == 2 && word == 5);
    });
}

#[test]
fn a_worker_that_is_seen_elsewhere_has_read_what_it_was_at() {
    loom::model(|| {
        let page = Page::new(1);
        // The model fails if two accesses of the page overlap, whatever values they see.
        let content = Arc::new(UnsafeCell::new(()));
        let worker = {
            let (page, content) = (page.clone(), content.clone());
            loom::thread::spawn(move || {
                {
                    let _reading = page.readers.reading(0, 2, 5);
                    if page.discarded.load(Ordering::Relaxed) == 0 {
                        content.with(|_| ());
                    }
                }
                let _elsewhere = page.readers.reading(0, 2, 6);
            })
        };
        page.discard();
        content.with_mut(|_| ());
        worker.join().unwrap();
    });
}

/// A page that the guest frees: whether its file has a hole there, and the hint that it may.
struct Freed {
    readers: Readers,
    hints: Bitmap<Vec<AtomicU64>>,
    hole: AtomicU64,
    /// The model fails if the page is read while the guest, which knows that the free is done,
    /// writes.
    content: UnsafeCell<()>,
}

/// Of word 5 of block 2.
const BIT: u64 = 1 << 3;

impl Freed {
    fn new() -> Arc<Self> {
        let hints = Bitmap::new((0..6).map(|_| AtomicU64::new(0)).collect(), 6 * 64);
        Arc::new(Self {
            readers: Readers::new(1),
            hints,
            hole: AtomicU64::new(0),
            content: UnsafeCell::new(()),
        })
    }

    /// A worker's step. True if it read.
    fn work(&self) -> bool {
        let _reading = self.readers.reading(0, 2, 5);
        let hint = self.hints.take_bits(5, BIT);
        // The kernel does this in one step.
        if hint != 0 && self.hole.load(Ordering::Acquire) != 0 {
            self.hints.or_word(5, hint);
            return false;
        }
        self.content.with(|_| ());
        true
    }

    fn free(&self) {
        before_punch(&self.readers, || (), |block, word| block == 2 && word == 5);
        self.hole.fetch_or(1, Ordering::AcqRel);
        after_punch(
            &self.readers,
            || self.hints.or_word(5, BIT),
            |_, block, word| block == 2 && word == 5,
        );
    }
}

#[test]
fn a_freed_page_is_not_read_until_it_is_written() {
    loom::model(|| {
        let page = Freed::new();
        let worker = {
            let page = page.clone();
            loom::thread::spawn(move || {
                let first = page.work();
                (first, page.work())
            })
        };
        page.free();
        // Acknowledged: no worker is reading the page when the guest writes it.
        page.content.with_mut(|_| ());
        let (first, second) = worker.join().unwrap();
        assert!(first || !second, "once it was found to be a hole it stays one");
        assert!(!page.work());
        // The guest writes. The page is ordinary memory.
        page.hole.store(0, Ordering::Release);
        assert!(page.work() && page.hints.word(5) == 0);
    });
}
