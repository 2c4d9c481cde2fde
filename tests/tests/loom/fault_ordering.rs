// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of a host page in postcopy: a fault, an arrival and a discard act on it at once, in
//! every order. It runs the agent's own code of the two steps by which they agree, over its own
//! fence and bitmap, with loom's atomics instead of the standard ones. The kernel is a word that
//! says what the page holds.

use crate::memory::fault_ordering::{request, requested_of};
use crate::memory::fence::Readers;
use crate::shm::bitmap::Bitmap;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

/// The state of the page in the kernel.
const MISSING: u64 = 0;
const ZERO: u64 = 1;
const CONTENT: u64 = 2;

const PAGE: u64 = 5;
const BIT: u64 = 1 << PAGE;

/// A missing page, and the threads that act on it.
struct Page {
    readers: Readers,
    missing: Bitmap<Vec<AtomicU64>>,
    requested: Bitmap<Vec<AtomicU64>>,
    held: AtomicU64,
    /// How often a waiting thread was woken.
    answers: AtomicU64,
}

impl Page {
    fn missing() -> Arc<Self> {
        let bitmap = |word| Bitmap::new(vec![AtomicU64::new(word)], 64);
        let (missing, requested) = (bitmap(BIT), bitmap(0));
        let (held, answers) = (AtomicU64::new(MISSING), AtomicU64::new(0));
        Arc::new(Self { readers: Readers::new(2), missing, requested, held, answers })
    }

    /// The part of the kernel: fills a missing page, refuses a present one, and wakes waiters in
    /// both cases.
    fn place(&self, what: u64) {
        let _ = self.held.compare_exchange(MISSING, what, Ordering::AcqRel, Ordering::Relaxed);
        self.answers.fetch_add(1, Ordering::AcqRel);
    }

    /// The fault thread. True if the page must be requested from the source.
    fn fault(&self) -> bool {
        let found = request(
            &self.requested,
            &self.missing,
            PAGE,
            || {},
            || self.readers.wait(|_, word| word == 0),
        );
        if !found.is_missing {
            self.requested.take_bits(0, BIT);
            self.place(ZERO);
        }
        found.is_missing && found.is_first
    }

    /// Content arrived on the stream of `worker`.
    fn content_arrives(&self, worker: usize) {
        let _reading = self.readers.reading(worker, 0, 0);
        if self.missing.take_bits(0, BIT) != 0 {
            self.place(CONTENT);
            self.requested.take_bits(0, BIT);
        }
    }

    /// The source reports that the page is zero.
    fn zero_arrives(&self, worker: usize) {
        let _reading = self.readers.reading(worker, 0, 0);
        let taken = self.missing.take_bits(0, BIT);
        if taken != 0 && requested_of(&self.requested, 0, taken) != 0 {
            self.place(ZERO);
        }
    }

    /// Content arrived and could not be placed.
    fn placing_fails(&self, worker: usize) {
        let _reading = self.readers.reading(worker, 0, 0);
        let taken = self.missing.take_bits(0, BIT);
        self.missing.or_word(0, taken);
    }

    fn discard(&self) {
        self.missing.take_bits(0, BIT);
        self.readers.wait(|_, word| word == 0);
        self.missing.take_bits(0, BIT);
        self.held.store(MISSING, Ordering::Release);
        if requested_of(&self.requested, 0, BIT) != 0 {
            self.requested.take_bits(0, BIT);
            self.place(ZERO);
        }
    }

    fn held(&self) -> u64 {
        self.held.load(Ordering::Acquire)
    }
}

fn spawn<T: 'static>(
    page: &Arc<Page>, act: impl FnOnce(&Page) -> T + 'static,
) -> thread::JoinHandle<T> {
    let page = page.clone();
    thread::spawn(move || act(&page))
}

#[test]
fn a_fault_never_places_zero_over_content() {
    loom::model(|| {
        let page = Page::missing();
        let arrival = spawn(&page, |page| page.content_arrives(0));
        page.fault();
        arrival.join().unwrap();
        assert_eq!(page.held(), CONTENT);
        assert_ne!(page.answers.load(Ordering::Acquire), 0, "the waiting thread was woken");
    });
}

#[test]
fn of_a_fault_and_a_page_that_turns_out_to_be_zero_one_answers() {
    loom::model(|| {
        let page = Page::missing();
        let arrival = spawn(&page, |page| page.zero_arrives(0));
        page.fault();
        arrival.join().unwrap();
        assert_eq!(page.held(), ZERO, "no thread waits forever");
    });
}

#[test]
fn of_two_faults_of_a_page_one_asks() {
    loom::model(|| {
        let page = Page::missing();
        let other = spawn(&page, Page::fault);
        let asked = page.fault();
        assert!(asked != other.join().unwrap(), "once, and not twice");
    });
}

#[test]
fn of_a_fault_and_a_discard_one_answers() {
    loom::model(|| {
        let page = Page::missing();
        let discard = spawn(&page, Page::discard);
        page.fault();
        discard.join().unwrap();
        assert_ne!(page.answers.load(Ordering::Acquire), 0);
        assert_ne!(page.held(), CONTENT);
    });
}

#[test]
fn what_arrives_beside_a_discard_is_not_there_after_it() {
    loom::model(|| {
        let page = Page::missing();
        let arrival = spawn(&page, |page| page.content_arrives(0));
        page.discard();
        assert_eq!(page.held(), MISSING, "acknowledged");
        arrival.join().unwrap();
        assert_eq!(page.held(), MISSING);
    });
}

#[test]
fn a_failed_placing_beside_a_discard_is_not_owed() {
    loom::model(|| {
        let page = Page::missing();
        let arrival = spawn(&page, |page| page.placing_fails(0));
        page.discard();
        arrival.join().unwrap();
        assert!(!page.missing.contains(PAGE), "the source would never answer for it");
    });
}

#[test]
fn a_fault_beside_a_failed_placing_asks_the_source() {
    loom::model(|| {
        let page = Page::missing();
        let arrival = spawn(&page, |page| page.placing_fails(0));
        let asked = page.fault();
        arrival.join().unwrap();
        assert!(asked && page.held() == MISSING, "it is missing still, and was asked for");
    });
}

#[test]
fn fault_arrival_and_discard_leave_nobody_waiting() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    // A wait for a worker spins, and each turn counts.
    model.max_branches = 20_000;
    model.check(|| {
        let page = Page::missing();
        let arrival = spawn(&page, |page| page.content_arrives(0));
        let discard = spawn(&page, Page::discard);
        page.fault();
        arrival.join().unwrap();
        discard.join().unwrap();
        assert_ne!(page.held(), CONTENT);
        assert_ne!(page.answers.load(Ordering::Acquire), 0);
    });
}
