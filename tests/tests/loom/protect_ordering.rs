// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model check of the protection ahead of a snapshot's instant, while the guest writes: walks that
//! protect, faults that let a write through, and the instant, which trusts the notes. It runs the
//! agent's own order of notes and protection, over its own bitmap, with loom's atomics instead of
//! the standard ones. The kernel is a word of protected pages.

use crate::shm::bitmap::{Bitmap, runs_of_word};
use crate::snapshot::protect_ordering;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex, MutexGuard};
use loom::thread::{self, JoinHandle};
use pageferry_protocol::memory::PageRange;
use std::convert::Infallible;

/// Two pages of one word.
const PAGE: u64 = 5;
const NEIGHBOUR: u64 = 6;
const BOTH: u64 = 1 << PAGE | 1 << NEIGHBOUR;

struct Watch {
    noted: Bitmap<Vec<AtomicU64>>,
    protected: AtomicU64,
    /// Held while a fault is answered. True after the instant: from then on a fault removes the
    /// protection but no note.
    mode: Mutex<bool>,
}

fn mask(pages: PageRange) -> u64 {
    (pages.first..pages.end()).fold(0, |mask, page| mask | 1 << page)
}

impl Watch {
    fn begin() -> Arc<Self> {
        let noted = Bitmap::new(vec![AtomicU64::new(0)], 64);
        Arc::new(Self { noted, protected: AtomicU64::new(0), mode: Mutex::new(false) })
    }

    fn mode(&self) -> MutexGuard<'_, bool> {
        self.mode.lock().unwrap()
    }

    /// Protects the pages of `wanted` that are not noted.
    fn walk(&self, wanted: u64) {
        for run in runs_of_word(0, protect_ordering::not_protected(&self.noted, 0, wanted)) {
            let protect = || {
                self.protected.fetch_or(mask(run), Ordering::AcqRel);
                Ok::<_, Infallible>(())
            };
            protect_ordering::protect(&self.noted, run, protect).unwrap();
        }
    }

    /// Lets a write through, if it comes before the instant.
    fn fault(&self, page: u64) {
        let after = self.mode();
        if *after {
            return;
        }
        let lift = || {
            self.protected.fetch_and(!(1 << page), Ordering::AcqRel);
            Ok::<_, Infallible>(())
        };
        protect_ordering::unprotect(&self.noted, PageRange::new(page, 1), lift).unwrap();
    }

    /// The VMM discards a page, punches it itself, so that the kernel drops its protection, and
    /// populates it again.
    fn free_and_populate(&self, page: u64) {
        let page = PageRange::new(page, 1);
        self.noted.clear(page);
        self.protected.fetch_and(!mask(page), Ordering::AcqRel);
        self.noted.clear(page);
    }

    /// The guest is paused.
    fn instant(&self) {
        let mut after = self.mode();
        let protected = self.protected.load(Ordering::Acquire);
        assert_eq!(self.noted.word(0) & !protected, 0, "what is noted is protected");
        self.walk(BOTH);
        assert_eq!(self.protected.load(Ordering::Acquire), BOTH, "all is protected at the instant");
        *after = true;
    }

    #[track_caller]
    fn check_protected(&self) {
        assert_eq!(
            self.protected.load(Ordering::Acquire),
            BOTH,
            "no fault of before lifts what the instant relies on"
        );
    }
}

fn spawn(watch: &Arc<Watch>, act: impl FnOnce(&Watch) + 'static) -> JoinHandle<()> {
    let watch = watch.clone();
    thread::spawn(move || act(&watch))
}

#[test]
fn after_two_walks_and_two_faults_what_is_noted_is_protected() {
    loom::model(|| {
        let watch = Watch::begin();
        let faults = spawn(&watch, |watch| {
            watch.fault(PAGE);
            watch.fault(NEIGHBOUR);
        });
        watch.walk(BOTH);
        watch.walk(BOTH);
        watch.instant();
        faults.join().unwrap();
        watch.check_protected();
    });
}

#[test]
fn a_page_written_again_and_again_is_protected_at_the_instant() {
    loom::model(|| {
        let watch = Watch::begin();
        watch.walk(BOTH);
        let faults = spawn(&watch, |watch| {
            watch.fault(PAGE);
            watch.fault(PAGE);
        });
        watch.walk(BOTH);
        watch.instant();
        faults.join().unwrap();
        watch.check_protected();
    });
}

#[test]
fn walks_at_once_leave_nothing_noted_that_is_not_protected() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let watch = Watch::begin();
        let walk = spawn(&watch, |watch| watch.walk(BOTH));
        let faults = spawn(&watch, |watch| watch.fault(PAGE));
        watch.walk(1 << PAGE);
        walk.join().unwrap();
        watch.instant();
        faults.join().unwrap();
        watch.check_protected();
    });
}

#[test]
fn a_page_freed_meanwhile_does_not_count_as_protected() {
    loom::model(|| {
        let watch = Watch::begin();
        watch.walk(1 << NEIGHBOUR);
        let vmm = spawn(&watch, |watch| watch.free_and_populate(PAGE));
        // The walk looked at the page before the discard.
        watch.walk(BOTH);
        watch.walk(BOTH);
        vmm.join().unwrap();
        watch.instant();
        watch.check_protected();
    });
}
