// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What hands work to the threads of a lazy restore: the queue of missing host pages, the pieces of
//! the working set, and the gate before all other pages.

use crate::lock::lock;
use crate::missing_faults::HostPage;
use crossbeam_channel::{Receiver, Sender, bounded, select_biased};
use pageferry_protocol::memory::PageRange;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// Most host pages in the queue: more than guests have processors.
const QUEUE_LENGTH: usize = 1024;

/// The queue of missing host pages, from the thread that reads the faults to the fault workers.
#[derive(Debug)]
pub struct FaultQueue {
    to: Sender<HostPage>,
    from: Receiver<HostPage>,
    /// Nothing is ever sent here. This end disconnects when `open` is dropped.
    closed: Receiver<Infallible>,
    open: Mutex<Option<Sender<Infallible>>>,
}

impl Default for FaultQueue {
    fn default() -> Self {
        let (to, from) = bounded(QUEUE_LENGTH);
        let (open, closed) = bounded(0);
        Self { to, from, closed, open: Mutex::new(Some(open)) }
    }
}

impl FaultQueue {
    /// Adds a host page. Waits while the queue is full. Does nothing once the queue is closed.
    pub(super) fn push(&self, page: HostPage) {
        select_biased! {
            recv(self.closed) -> _ => {}
            // Cannot fail: `self` holds the receiver.
            send(self.to, page) -> _ => {}
        }
    }

    /// Waits for a host page. Returns `None` once the queue is closed.
    pub(super) fn next(&self) -> Option<HostPage> {
        select_biased! {
            recv(self.closed) -> _ => None,
            recv(self.from) -> page => page.ok(),
        }
    }

    /// Closes the queue: the waiting threads return, and no page is handed out any more.
    pub fn close(&self) {
        lock(&self.open).take();
    }
}

/// The working set as a list of pieces. Each piece is handed out once.
#[derive(Debug)]
pub struct WorkingSetPieces {
    pieces: Vec<(usize, PageRange)>,
    next: AtomicUsize,
}

impl WorkingSetPieces {
    /// The pieces, in the order in which they are read: index of the block, and pages.
    pub fn new(pieces: Vec<(usize, PageRange)>) -> Self {
        Self { pieces, next: AtomicUsize::new(0) }
    }

    /// All of them.
    pub(super) fn all(&self) -> &[(usize, PageRange)] {
        &self.pieces
    }

    pub(super) fn claim(&self) -> Option<(usize, PageRange)> {
        self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }
}

/// Where the workers wait until they may prefetch pages outside of the working set.
#[derive(Debug, Default)]
pub struct PrefetchGate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Closed,
    Open,
    /// The restore has ended.
    Ended,
}

impl PrefetchGate {
    /// Lets the workers prefetch. Does nothing once the restore has ended.
    pub fn open(&self) {
        self.change(|state| {
            if *state == State::Closed {
                *state = State::Open
            }
        });
    }

    /// Tells the workers to end.
    pub fn end(&self) {
        self.change(|state| *state = State::Ended);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// Waits for the gate. Returns true if the worker may prefetch, and false if it must end.
    pub(super) fn wait(&self) -> bool {
        let state = lock(&self.state);
        let state = self.changed.wait_while(state, |state| *state == State::Closed);
        *state.unwrap_or_else(PoisonError::into_inner) == State::Open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::fault_reads::FAULT_WORKERS;
    use std::collections::BTreeSet;

    #[test]
    fn each_page_is_handed_out_once_until_the_queue_is_closed() {
        let queue = FaultQueue::default();
        let found = Mutex::new(BTreeSet::new());
        std::thread::scope(|scope| {
            for _ in 0..FAULT_WORKERS {
                scope.spawn(|| {
                    while let Some(page) = queue.next() {
                        assert!(found.lock().unwrap().insert(page), "{page:?} came twice");
                    }
                });
            }
            let pages = (0..5 * QUEUE_LENGTH as u64).map(|page| (page as usize % 3, page << 5));
            pages.for_each(|page| queue.push(page));
            while found.lock().unwrap().len() < 5 * QUEUE_LENGTH {
                std::thread::yield_now();
            }
            queue.close();
        });
    }
}
