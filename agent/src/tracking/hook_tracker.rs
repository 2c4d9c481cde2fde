// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own tracker, which the agent asks through hooks.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::tracker::Tracker;
use crate::hooks::{HookError, Hooks};
use crate::job::Deadline;
use crate::memory::GuestMemory;
use crate::memory::host_page_set::words_of;
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::{Hook, MAX_CLEAR_PAGES};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::WORD_BITS;
use std::sync::Arc;
use std::time::Duration;

/// The VMM's own tracker, such as KVM's dirty log. A sync clears nothing there. See [`LazyClear`].
pub(super) struct HookTracker {
    hooks: Arc<Hooks>,
    timeout: Duration,
    stop: Deadline,
    started: bool,
}

impl HookTracker {
    /// A hook gets `timeout`; a sync gets no longer than until `stop`.
    pub(super) fn new(hooks: Arc<Hooks>, timeout: Duration, stop: Deadline) -> Self {
        Self { hooks, timeout, stop, started: false }
    }
}

impl Tracker for HookTracker {
    fn start(&mut self, _memory: &GuestMemory) -> Result<(), TrackingError> {
        // Set before the answer is known: a start that timed out may still happen.
        self.started = true;
        Ok(self.hooks.ask(&Hook::StartTracking { sources: Declared::HOOKS }, self.timeout)?)
    }

    fn sync(
        &mut self, _memory: &GuestMemory, _dirty: &DirtyPages, _threads: usize,
    ) -> Result<(), TrackingError> {
        Ok(self.hooks.ask(&Hook::SyncTracker, self.stop.cap_timeout(self.timeout))?)
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.started)
            && let Err(error) =
                self.hooks.undo(&Hook::StopTracking { sources: Declared::HOOKS }, self.timeout)
        {
            log::warn!("cannot stop the VMM's tracker: {}", crate::error::chain(&error));
        }
    }
}

/// Clears pages in a tracker whose sync does not clear them. A worker calls this for a chunk right
/// before it reads there for the first time
/// ([`clear-then-read`](crate::invariants#clear-then-read)).
///
/// Exactly the given pages are cleared and no others, so no write to a neighbour is lost
/// ([`round-safely`](crate::invariants#round-safely)).
#[derive(Debug)]
pub struct LazyClear {
    hooks: Arc<Hooks>,
    timeout: Duration,
    stop: Deadline,
}

impl LazyClear {
    /// A hook gets `timeout`, but not longer than until `stop`.
    pub(super) fn new(hooks: Arc<Hooks>, timeout: Duration, stop: Deadline) -> Self {
        Self { hooks, timeout, stop }
    }

    /// Clears those pages of `range` that are set in `bitmap`, in the block with this id. `range`
    /// begins at a multiple of 64.
    ///
    /// # Errors
    /// If the VMM does not clear them.
    pub fn clear(&self, id: u32, bitmap: &MappedBitmap, range: PageRange) -> Result<(), HookError> {
        let mut rest = range;
        // Skips clear words at both ends, so that a sparse chunk costs little.
        while let Some(first) = bitmap.next_set(rest) {
            let first = first / WORD_BITS * WORD_BITS;
            let part = PageRange::new(first, (range.end() - first).min(MAX_CLEAR_PAGES));
            let mut bitmap: Vec<u64> = words_of(part).map(|(word, _)| bitmap.word(word)).collect();
            bitmap.truncate(bitmap.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
            let timeout = self.stop.cap_timeout(self.timeout);
            self.hooks.ask(&Hook::ClearTracker { block: id, first, bitmap }, timeout)?;
            rest = PageRange::new(part.end(), range.end().saturating_sub(part.end()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use pageferry_protocol::control::FrameSocket;
    use pageferry_protocol::control::frame::{FLAG_REPLY, Frame};
    use pageferry_protocol::control::hook_reply::encode_hook_reply;
    use std::collections::BTreeSet;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    /// The hooks that `ask` sends to a VMM that agrees to everything.
    fn asked(ask: impl FnOnce(&Arc<Hooks>)) -> Vec<Hook> {
        let far = || Instant::now() + Duration::from_secs(60);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let vmm = std::thread::spawn(move || {
            let mut socket = FrameSocket::from(OwnedFd::from(theirs));
            let mut asked = Vec::new();
            while let Ok(Frame { request, body, .. }) = socket.recv(far()) {
                let (sequence, hook) = Hook::decode(request, &body).unwrap().unwrap();
                asked.push(hook);
                let reply = encode_hook_reply(sequence, &Ok(()));
                socket.send_parts(request, FLAG_REPLY, &reply, &[], far()).unwrap();
            }
            asked
        });
        let hooks = Arc::new(Hooks::new(Some(ours.into())));
        ask(&hooks);
        drop(hooks);
        vmm.join().unwrap()
    }

    /// What a clear asks the VMM: the pages, and the first page and the number of words of each
    /// hook.
    fn cleared(bitmap: &MappedBitmap, range: PageRange) -> (BTreeSet<u64>, Vec<(u64, usize)>) {
        let asked = asked(|hooks| {
            let timeout = Duration::from_secs(60);
            let clear = LazyClear::new(hooks.clone(), timeout, Deadline::default());
            clear.clear(5, bitmap, range).unwrap();
        });
        let (mut pages, mut hooks) = (BTreeSet::new(), Vec::new());
        for hook in asked {
            let Hook::ClearTracker { block: 5, first, bitmap } = hook else { panic!("{hook:?}") };
            let set = |bit: &u64| bitmap[(bit / WORD_BITS) as usize] >> (bit % WORD_BITS) & 1 == 1;
            pages.extend((0..bitmap.len() as u64 * WORD_BITS).filter(set).map(|bit| first + bit));
            hooks.push((first, bitmap.len()));
        }
        (pages, hooks)
    }

    #[test]
    fn hook_tracker_starts_syncs_and_stops_once() {
        let memory = memory(&[64]);
        let dirty = DirtyPages::none(&memory).unwrap();
        let asked = asked(|hooks| {
            let timeout = Duration::from_secs(60);
            let mut tracker = HookTracker::new(hooks.clone(), timeout, Deadline::default());
            // The tracker is not on yet.
            tracker.stop();
            tracker.start(&memory).unwrap();
            (0..2).for_each(|_| tracker.sync(&memory, &dirty, 1).unwrap());
            (0..2).for_each(|_| tracker.stop());
        });
        let sources = Declared::HOOKS;
        let expected = [
            Hook::StartTracking { sources },
            Hook::SyncTracker,
            Hook::SyncTracker,
            Hook::StopTracking { sources },
        ];
        assert_eq!(asked, expected);
    }

    /// No page is cleared that is not set in the bitmap
    /// ([`round-safely`](crate::invariants#round-safely)), and no page that is set is left out
    /// ([`clear-then-read`](crate::invariants#clear-then-read)).
    #[test]
    fn lazy_clear_clears_exactly_the_set_pages() {
        let pages = 3 * MAX_CLEAR_PAGES + 200;
        let all = PageRange::new(0, pages);
        let sparse = [
            0,
            63,
            64,
            130,
            MAX_CLEAR_PAGES - 1,
            MAX_CLEAR_PAGES,
            2 * MAX_CLEAR_PAGES + 5,
            pages - 1,
        ];
        let ranges = [
            all,
            PageRange::new(64, 64),
            PageRange::new(64, MAX_CLEAR_PAGES),
            PageRange::new(128, 2 * MAX_CLEAR_PAGES),
            PageRange::new(MAX_CLEAR_PAGES, pages - MAX_CLEAR_PAGES),
            PageRange::new(256, 1024),
        ];
        let bitmap = MappedBitmap::private(pages).unwrap();
        sparse.iter().for_each(|page| _ = bitmap.set(PageRange::new(*page, 1)));
        for range in ranges {
            let (found, hooks) = cleared(&bitmap, range);
            let expected =
                sparse.iter().copied().filter(|page| (range.first..range.end()).contains(page));
            assert_eq!(found, expected.collect(), "{range:?}");
            let too_long =
                hooks.iter().find(|(_, words)| *words as u64 * WORD_BITS > MAX_CLEAR_PAGES);
            assert_eq!(too_long, None, "a VMM accepts no more pages in one hook");
        }
        bitmap.set(all);
        let (found, hooks) = cleared(&bitmap, all);
        assert_eq!(found.len() as u64, pages);
        assert_eq!(hooks.len(), 4, "no more hooks than needed");
    }

    #[test]
    fn lazy_clear_skips_clear_words_at_both_ends() {
        let bitmap = MappedBitmap::private(1 << 16).unwrap();
        bitmap.set(PageRange::new(1000, 1));
        bitmap.set(PageRange::new(1100, 30));
        assert_eq!(cleared(&bitmap, PageRange::new(0, 1 << 16)).1, [(960, 3)]);
        assert_eq!(cleared(&bitmap, PageRange::new(1152, 1 << 15)).1, []);
    }
}
