// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of an agent that takes owed pages over, while the guest gives one of them back: its
//! content is not placed any more once that is acknowledged (`never-read`).
//!
//! The steps are those of `ContinuedRestore` and `MissingPages::drop_settled` at one side, and of
//! `GuestMemory::give_back` at the other, over the agent's own fence and bitmap. What discards know
//! of missing pages is behind a lock, as there. The kernel is a word that says what the page holds.

use crate::memory::fence::Readers;
use crate::shm::bitmap::Bitmap;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// The state of the page in the kernel.
const HOLE: u64 = 0;
const CONTENT: u64 = 1;

const BIT: u64 = 1 << 5;

/// An owed page, in the VMM and in the next agent.
struct Page {
    owed: Bitmap<Vec<AtomicU64>>,
    missing: Bitmap<Vec<AtomicU64>>,
    /// True once discards know of missing pages.
    announced: Mutex<bool>,
    readers: Readers,
    held: AtomicU64,
    /// How often content was placed.
    placed: AtomicU64,
}

impl Page {
    fn owed() -> Arc<Self> {
        let bitmap = |word| Bitmap::new(vec![AtomicU64::new(word)], 64);
        Arc::new(Self {
            owed: bitmap(BIT),
            missing: bitmap(0),
            announced: Mutex::new(false),
            readers: Readers::new(1),
            held: AtomicU64::new(HOLE),
            placed: AtomicU64::new(0),
        })
    }

    /// The next agent: takes over what is owed, and places it. `looks_again` as it does.
    fn take_over(&self, looks_again: bool) {
        self.missing.or_word(0, self.owed.word(0));
        *self.announced.lock().unwrap() = true;
        if looks_again {
            self.missing.take_bits(0, self.missing.word(0) & !self.owed.word(0));
        }
        self.place();
    }

    /// A worker of an agent.
    fn place(&self) {
        let _reading = self.readers.reading(0, 0, 0);
        if self.missing.take_bits(0, BIT) != 0 {
            self.held.store(CONTENT, Ordering::Release);
            self.placed.fetch_add(1, Ordering::Relaxed);
            self.owed.take_bits(0, BIT);
        }
    }

    /// The guest gives the page back. When this returns, that is acknowledged.
    fn give_back(&self) {
        self.owed.take_bits(0, BIT);
        let is_announced = *self.announced.lock().unwrap();
        if is_announced {
            self.missing.take_bits(0, BIT);
        }
        self.readers.wait(|_, word| word == 0);
        if is_announced {
            self.missing.take_bits(0, BIT);
        }
        self.held.store(HOLE, Ordering::Release);
    }
}

/// True if stale content is there in one of the orders.
fn leaves_content(looks_again: bool) -> bool {
    let found = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = found.clone();
    loom::model(move || {
        let page = Page::owed();
        let next = page.clone();
        let agent = thread::spawn(move || next.take_over(looks_again));
        page.give_back();
        agent.join().unwrap();
        if page.held.load(Ordering::Acquire) == CONTENT {
            seen.store(true, Ordering::SeqCst);
        }
    });
    found.load(Ordering::SeqCst)
}

#[test]
fn what_is_given_back_during_a_take_over_does_not_come_any_more() {
    assert!(!leaves_content(true));
    // The second look is needed.
    assert!(leaves_content(false));
}

/// The agent before has placed the page, and died before it cleared the bit.
#[test]
fn a_page_that_is_owed_comes_and_is_settled() {
    loom::model(|| {
        let page = Page::owed();
        let next = page.clone();
        thread::spawn(move || next.take_over(true)).join().unwrap();
        assert_eq!(page.held.load(Ordering::Acquire), CONTENT);
        assert_eq!((page.placed.load(Ordering::Relaxed), page.owed.word(0)), (1, 0));
    });
}
