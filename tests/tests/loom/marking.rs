// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of the instant of a snapshot during discards and populates: every order in which
//! they mark, check and read. It runs the agent's own lock of the marks and its own steps of a
//! capture, with loom's atomics and locks instead of the standard ones.

use crate::memory::capture_ordering::{before_punch, capture};
use crate::memory::fence::{Readers, SESSION};
use crate::memory::marking::Marking;
use crate::shm::bitmap::Bitmap;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread::{self, JoinHandle};
use pageferry_protocol::memory::PageRange;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed};

type Bits = Bitmap<Vec<AtomicU64>>;

const PAGE: u64 = 5;
const BIT: u64 = 1 << PAGE;
const WORKER: usize = 0;

/// A guest of one page.
struct Guest {
    marking: Marking<Bits>,
    readers: Readers,
    discarded: Bits,
    log: Bits,
    /// The model fails if two accesses of the page overlap.
    touch: UnsafeCell<()>,
    /// Changes since the base. These are not loom atomics: only the last value is seen.
    punched: Plain,
    at_instant: Plain,
    captured: Plain,
}

/// The state of the page in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Saved {
    Discarded,
    /// Pending, like every page that may have changed.
    Content,
    AsInTheBase,
}

fn bits(word: u64) -> Bits {
    Bitmap::new(vec![AtomicU64::new(word)], 64)
}

impl Guest {
    fn new(discarded: u64) -> Arc<Self> {
        Arc::new(Self {
            marking: Marking::default(),
            readers: Readers::new(3),
            discarded: bits(discarded),
            log: bits(0),
            touch: UnsafeCell::new(()),
            punched: Plain::new(0),
            at_instant: Plain::new(0),
            captured: Plain::new(0),
        })
    }

    fn read(&self) -> u64 {
        self.touch.with(|_| self.punched.load(Relaxed))
    }

    fn capture(&self, reader: usize, pending: &Bits) {
        let read = |_| {
            assert_eq!(
                self.read(),
                self.at_instant.load(Relaxed),
                "it was punched before it was captured"
            );
            self.captured.fetch_add(1, Relaxed);
            Ok::<_, Infallible>(())
        };
        capture(&self.readers, (reader, 0, 0), || pending.take_bits(0, BIT), read).unwrap();
    }

    /// The instant, and then a worker. With `all` every page is saved, otherwise the pages in the
    /// log.
    fn save(&self, all: bool) -> Saved {
        let (mut saved, mut pending) = (Saved::Discarded, None);
        let find = || {
            let changed = self.log.take_word(0) & BIT != 0 || all;
            if self.discarded.word(0) & BIT == 0 {
                // The page is populated, so no discard punches it now.
                self.at_instant.store(self.read(), Relaxed);
                saved = if changed { Saved::Content } else { Saved::AsInTheBase };
            }
            let found = Arc::new(bits(if saved == Saved::Content { BIT } else { 0 }));
            pending = Some(found.clone());
            Ok::<_, Infallible>(found)
        };
        self.marking.take_instant(find).unwrap();
        let as_in_base = saved == Saved::AsInTheBase;
        assert!(!as_in_base || self.at_instant.load(Relaxed) == 0, "it is not as in the base");
        self.capture(WORKER, &pending.unwrap());
        saved
    }

    fn discard(&self) {
        let (_, capturing) =
            self.marking.mark_discarded(|| self.discarded.set(PageRange::new(PAGE, 1)));
        let rescue = || {
            if let Some(pending) = &capturing {
                self.capture(SESSION, pending);
            }
        };
        before_punch(&self.readers, rescue, |_, _| true);
        self.touch.with_mut(|_| self.punched.store(1, Relaxed));
    }

    fn populate(&self) {
        let _marking = self.marking.lock();
        self.discarded.take(PageRange::new(PAGE, 1), |word, bits| {
            self.log.or_word(word, bits);
        });
    }

    fn captured(&self) -> u64 {
        self.captured.load(Relaxed)
    }
}

fn spawn(guest: &Arc<Guest>, act: impl FnOnce(&Guest) + 'static) -> JoinHandle<()> {
    let guest = guest.clone();
    thread::spawn(move || act(&guest))
}

#[test]
fn a_discard_at_the_instant_is_saved_so_or_captured_first() {
    loom::model(|| {
        let guest = Guest::new(0);
        let discard = spawn(&guest, Guest::discard);
        let saved = guest.save(true);
        discard.join().unwrap();
        match saved {
            Saved::Discarded => assert_eq!(guest.captured(), 0, "no discarded page is read"),
            Saved::Content => assert_eq!(guest.captured(), 1),
            Saved::AsInTheBase => panic!("every page is saved"),
        }
    });
}

#[test]
fn a_populate_at_the_instant_is_discarded_or_in_the_log() {
    loom::model(|| {
        let guest = Guest::new(BIT);
        let populate = spawn(&guest, Guest::populate);
        let saved = guest.save(false);
        populate.join().unwrap();
        assert_ne!(saved, Saved::AsInTheBase);
    });
}

#[test]
fn a_page_is_as_in_the_base_only_before_discard_and_populate() {
    loom::model(|| {
        let guest = Guest::new(0);
        let both = spawn(&guest, |guest| {
            guest.discard();
            guest.populate();
        });
        // Checks a page that it takes for unchanged.
        guest.save(false);
        both.join().unwrap();
    });
}
