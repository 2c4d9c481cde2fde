//! What nobody waits for yet.
//!
//! The working set comes first: from before the VMM loads its state, at the priority of all else,
//! in the order of the file. All workers do it. What is left comes when the guest runs, follows its
//! faults, and steps back behind whatever is waited for.

use super::lazy_restore::LazyRestore;
use crate::image::PageBuffer;
use crate::image::chain::in_extents;
use crate::job::{JobError, add};
use crate::memory::runs::{NEAR, join_near_runs};
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// The working set in the pieces that it is read in, handed out once each.
#[derive(Debug)]
pub struct WorkingSetPieces {
    pieces: Vec<(usize, PageRange)>,
    next: AtomicUsize,
}

impl WorkingSetPieces {
    /// These: index of the block, and pages.
    pub fn new(pieces: Vec<(usize, PageRange)>) -> Self {
        Self { pieces, next: AtomicUsize::new(0) }
    }

    fn claim(&self) -> Option<(usize, PageRange)> {
        self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }
}

/// Where the workers wait until they may read what is not of the working set.
#[derive(Debug, Default)]
pub struct PrefetchGate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Shut,
    Open,
    /// There is nothing to do any more.
    Over,
}

impl PrefetchGate {
    /// They may.
    pub fn open(&self) {
        self.change(|state| {
            if *state == State::Shut {
                *state = State::Open
            }
        });
    }

    /// They are to end.
    pub fn end(&self) {
        self.change(|state| *state = State::Over);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Returns when they may; false if they are to end.
    fn wait(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.changed.wait_while(state, |state| *state == State::Shut);
        *state.unwrap_or_else(PoisonError::into_inner) == State::Open
    }
}

impl LazyRestore<'_> {
    /// Reads ahead until nothing is unread, or all is over.
    ///
    /// # Errors
    /// If the image cannot be read, or is damaged, or a page cannot be placed.
    pub fn prefetch(&self, worker: usize) -> Result<(), JobError> {
        let mut reader = Reader {
            supply: self,
            worker,
            buffer: PageBuffer::new(EXTENT_SIZE as usize),
            runs: Vec::new(),
        };
        while !self.has_ended()
            && let Some((at, pages)) = self.pieces.claim()
        {
            let placed = reader.fetch(at, self.unread.block(at).covering(pages))?;
            add(&self.job.live.working_set_pages, placed);
        }
        if !self.gate.wait() {
            return Ok(());
        }
        crate::priority::lower();
        while !self.has_ended()
            && let Some((at, host_pages)) = self.cursor.claim(&self.unread)
        {
            reader.fetch(at, host_pages)?;
        }
        Ok(())
    }
}

/// One worker.
struct Reader<'a> {
    supply: &'a LazyRestore<'a>,
    /// Its number among all threads, which is that of its place in the fence.
    worker: usize,
    buffer: PageBuffer,
    /// What was claimed: runs of host pages. Kept from one piece to the next.
    runs: Vec<PageRange>,
}

impl Reader<'_> {
    /// Reads and places what is unread, and still missing, of the host pages `host_pages`. Returns
    /// how many pages that were.
    fn fetch(&mut self, at: usize, host_pages: PageRange) -> Result<u64, JobError> {
        let Self { supply, worker, buffer, runs } = self;
        let (unread, missing) = (supply.unread.block(at), supply.missing_pages.missing().block(at));
        supply.unread.take_range(at, host_pages, |word, bits| {
            // What was discarded meanwhile need not be read.
            runs.extend(runs_of_word(word * WORD_BITS, bits & missing.bits().word(word)));
        });
        let mut placed = 0;
        for run in join_near_runs(runs.drain(..), NEAR / unread.unit()) {
            for range in in_extents(unread.pages(run)) {
                supply.job.check()?;
                supply.job.limiter.wait(range.bytes() as usize, &supply.job.cancel)?;
                if supply.has_ended() {
                    return Ok(placed);
                }
                let content = supply.read(at, range, buffer)?;
                placed += supply.place(*worker, at, range, content)?;
            }
        }
        Ok(placed)
    }
}
