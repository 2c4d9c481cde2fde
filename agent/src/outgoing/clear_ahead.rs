// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clearing the VMM's tracker during a pass, ahead of the workers
//! ([`clear-then-read`](crate::invariants#clear-then-read)).
//!
//! KVM's dirty log is not cleared by a sync but by a hook, right before the pages are read. All
//! hooks go through one socket and one thread of the VMM. So a worker that needs a clear has a
//! *stretch* cleared: 64 MiB for each worker, from the end of the stretch before. The chunks of the
//! other workers lie in it, too, since chunks are claimed in order. With many workers there are as
//! few hooks a second as with one, and a page is read as soon after its clear.
//!
//! A clear ahead of the reads loses no write: the pages are still dirty in the agent's own bitmap
//! ([`round-safely`](crate::invariants#round-safely)), and a write after the clear is reported by
//! the next sync. That page is sent twice, at worst.

use super::fixup::DirtyState;
use super::pass::FirstPass;
use crate::job::JobError;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::memory::chunks::position;
use crate::tracking::LazyClear;
use pageferry_protocol::control::hook::MAX_CLEAR_PAGES;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages that are cleared ahead for each worker: 64 MiB.
pub(super) const UNIT: u64 = (64 << 20) / PAGE_SIZE;

/// What was cleared in a pass.
pub(super) struct ClearAhead<'a> {
    memory: &'a GuestMemory,
    dirty: &'a DirtyState,
    clear: &'a LazyClear,
    /// In pass 0: finds the pages to send, right before they are cleared.
    first: Option<FirstPass<'a>>,
    /// Pages of a stretch, at most what one hook carries.
    stretch: u64,
    /// Where the next stretch begins: the index of a block, and a page; `None` after a failure.
    /// Locked during a hook: all who wait for the lock need what is being cleared.
    next: Mutex<Option<(usize, u64)>>,
    /// The same place, for threads that do not need the next stretch.
    done: AtomicU64,
}

impl<'a> ClearAhead<'a> {
    /// Nothing was cleared.
    pub(super) fn new(
        memory: &'a GuestMemory, dirty: &'a DirtyState, clear: &'a LazyClear, workers: usize,
        first: Option<FirstPass<'a>>,
    ) -> Self {
        let stretch = (UNIT * workers as u64).min(MAX_CLEAR_PAGES);
        let (next, done) = (Mutex::new(Some((0, 0))), AtomicU64::new(0));
        Self { memory, dirty, clear, first, stretch, next, done }
    }

    /// Returns true once the dirty pages of a chunk are cleared in the tracker. Call it before the
    /// first of them is taken or read. Returns false if another worker has failed to clear them,
    /// and has the reason: a VMM that hangs is not asked once more for each worker.
    ///
    /// # Errors
    /// If the VMM does not clear them, or a file cannot be examined.
    pub(super) fn reach(&self, at: usize, chunk: PageRange) -> Result<bool, JobError> {
        let end = position(at, chunk.end());
        // Acquire: who has cleared the pages has found them before.
        if self.done.load(Ordering::Acquire) >= end {
            return Ok(true);
        }
        let mut next = lock(&self.next);
        // Not set again if this fails.
        while let Some((at, page)) = next.take() {
            if position(at, page) < end {
                *next = Some(self.clear_stretch(at, page)?);
                continue;
            }
            *next = Some((at, page));
            return Ok(true);
        }
        Ok(false)
    }

    /// Clears a stretch. Returns where the next one begins.
    fn clear_stretch(&self, at: usize, page: u64) -> Result<(usize, u64), JobError> {
        let block = &self.memory.blocks()[at];
        let stretch = PageRange::new(page, self.stretch).intersection(&block.all());
        if let Some(first) = &self.first {
            first.find(at, stretch)?;
        }
        self.clear.clear(block.geometry.id, self.dirty.pages.block(at), stretch)?;
        let ends_block = stretch.end() == block.geometry.pages();
        let next = if ends_block { (at + 1, 0) } else { (at, stretch.end()) };
        self.done.store(position(next.0, next.1), Ordering::Release);
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::balloon::hints::FreePages;
    use crate::hooks::Hooks;
    use crate::job::Deadline;
    use crate::memory::chunks::Chunks;
    use crate::memory::test_support::memory;
    use crate::tracking::{TrackerChoice, Trackers};
    use pageferry_protocol::control::frame::{FLAG_REPLY, Frame};
    use pageferry_protocol::control::hook::Hook;
    use pageferry_protocol::control::hook_reply::encode_hook_reply;
    use pageferry_protocol::control::{FrameSocket, Trackers as Declared};
    use pageferry_protocol::shm::bitmap::WORD_BITS;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    const LONG: Duration = Duration::from_secs(60);

    /// What a VMM has been asked to clear: the pages of each hook, and the id of their block.
    type Cleared = Arc<Mutex<Vec<(u32, BTreeSet<u64>)>>>;

    /// A VMM that clears what it is asked to, and the trackers that ask it.
    fn vmm(cleared: &Cleared) -> (Trackers, std::thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cleared = cleared.clone();
        let thread = std::thread::spawn(move || {
            let mut socket = FrameSocket::from(OwnedFd::from(theirs));
            while let Ok(Frame { request, body, .. }) = socket.recv(Instant::now() + LONG) {
                let (sequence, hook) = Hook::decode(request, &body).unwrap().unwrap();
                let Hook::ClearTracker { block, first, bitmap } = hook else { panic!("{hook:?}") };
                let is_set =
                    |bit: &u64| bitmap[(bit / WORD_BITS) as usize] >> (bit % WORD_BITS) & 1 == 1;
                let bits = (0..bitmap.len() as u64 * WORD_BITS).filter(is_set);
                cleared.lock().unwrap().push((block, bits.map(|bit| first + bit).collect()));
                let reply = encode_hook_reply(sequence, &Ok(()));
                let far = Instant::now() + LONG;
                socket.send_parts(request, FLAG_REPLY, &reply, &[], far).unwrap();
            }
        });
        let hooks = Arc::new(Hooks::new(Some(ours.into())));
        let choice = TrackerChoice { declared: Declared::HOOKS, pagemap: None };
        (Trackers::new(&choice, &hooks, LONG, &Deadline::default()), thread)
    }

    fn is_cleared(cleared: &Cleared, block: u32, page: u64) -> bool {
        cleared.lock().unwrap().iter().any(|(id, pages)| *id == block && pages.contains(&page))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the chunks, the stretches and the number of workers: a worker finds the pages
        /// of its chunk cleared, nothing is cleared twice or without being dirty, and no stretch
        /// takes more than one hook.
        #[test]
        fn each_dirty_page_is_cleared_once_and_before_it_is_taken(
            lengths in prop::collection::vec(1u64..900, 1..4),
            wanted in prop::collection::btree_set((0usize..4, 0u64..900), 0..60),
            words in 1u64..6,
            stretch in 1u64..6,
            workers in 1usize..5,
            first_pass in any::<bool>(),
            free in prop::collection::btree_set((0usize..4, 0u64..900), 0..60),
        ) {
            let memory = Arc::new(memory(&lengths));
            let dirty = DirtyState::new(&memory).unwrap();
            let mut expected = BTreeSet::new();
            for (at, page) in wanted {
                if lengths.get(at).is_none_or(|pages| page >= *pages) {
                    continue;
                }
                if !first_pass || !free.contains(&(at, page)) {
                    expected.insert((at as u32, page));
                }
                if first_pass {
                    memory.blocks()[at].backing.write(page * PAGE_SIZE, &[1]).unwrap();
                } else {
                    dirty.pages.block(at).set(PageRange::new(page, 1));
                }
            }
            let cleared = Cleared::default();
            let (trackers, vmm) = vmm(&cleared);
            let clear = trackers.lazy_clear().unwrap();
            let hinted = free.iter().filter(|(at, page)| lengths.get(*at).is_some_and(|end| page < end));
            let hinted = FreePages::of(&memory, hinted.copied());
            let first = FirstPass { memory: &memory, dirty: &dirty, free: Some(&hinted) };
            let first = first_pass.then_some(first);
            let mut ahead = ClearAhead::new(&memory, &dirty, clear, workers, first);
            ahead.stretch = stretch * WORD_BITS;
            let chunks = Chunks::new(&memory, words * WORD_BITS);
            let taken = Mutex::new(BTreeSet::new());
            let outcome = chunks.share(workers, |at, chunk| {
                assert!(ahead.reach(at, chunk).map_err(|error| error.to_string())?);
                dirty.pages.block(at).take(chunk, |word, bits| {
                    for page in (0..WORD_BITS).filter(|bit| bits >> bit & 1 == 1) {
                        let page = word * WORD_BITS + page;
                        assert!(is_cleared(&cleared, at as u32, page), "page {page} is dirty");
                        taken.lock().unwrap().insert((at as u32, page));
                    }
                });
                Ok::<(), String>(())
            });
            prop_assert_eq!(outcome, Ok(()));
            drop(trackers);
            vmm.join().unwrap();
            let taken = taken.into_inner().unwrap();
            if first_pass {
                // Neighbours of what was written may be allocated, too.
                prop_assert!(taken.is_superset(&expected));
                let of_free = taken.iter().filter(|(at, page)| free.contains(&(*at as usize, *page)));
                prop_assert_eq!(of_free.count(), 0);
            } else {
                prop_assert_eq!(&taken, &expected);
            }
            let hooks = cleared.lock().unwrap();
            let of_hook = |(id, pages): &(u32, BTreeSet<u64>)| -> Vec<(u32, u64)> {
                pages.iter().map(|page| (*id, *page)).collect()
            };
            let pages: Vec<_> = hooks.iter().flat_map(of_hook).collect();
            prop_assert_eq!(pages.len(), taken.len());
            prop_assert_eq!(pages.into_iter().collect::<BTreeSet<_>>(), taken);
            let stretches: u64 = lengths.iter().map(|pages| pages.div_ceil(stretch * 64)).sum();
            prop_assert!(hooks.len() as u64 <= stretches);
        }
    }

    #[test]
    fn vmm_that_does_not_clear_is_asked_once() {
        let memory = memory(&[640]);
        let dirty = DirtyState::new(&memory).unwrap();
        dirty.pages.block(0).set(PageRange::new(0, 640));
        let hooks = Arc::new(Hooks::new(None));
        let choice = TrackerChoice { declared: Declared::HOOKS, pagemap: None };
        let trackers = Trackers::new(&choice, &hooks, LONG, &Deadline::default());
        let clear = trackers.lazy_clear().unwrap();
        let ahead = ClearAhead::new(&memory, &dirty, clear, 4, None);
        assert!(ahead.reach(0, PageRange::new(0, 64)).is_err());
        assert!(!ahead.reach(0, PageRange::new(64, 64)).unwrap());
        assert!(!ahead.reach(0, PageRange::new(0, 64)).unwrap());
    }

    #[test]
    fn a_stretch_has_a_chunk_for_each_worker_and_fits_a_hook() {
        let memory = memory(&[64]);
        let dirty = DirtyState::new(&memory).unwrap();
        let (trackers, _vmm) = vmm(&Cleared::default());
        let clear = trackers.lazy_clear().unwrap();
        let stretch = |workers| ClearAhead::new(&memory, &dirty, clear, workers, None).stretch;
        assert_eq!((stretch(1), stretch(4)), (UNIT, 4 * UNIT));
        assert_eq!(stretch(64), MAX_CLEAR_PAGES);
    }
}
