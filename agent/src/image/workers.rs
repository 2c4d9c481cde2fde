// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sharing work on the extents of an image among threads.
//!
//! `share_among_threads` calls a function for each item. Each thread claims the next item until
//! none is left. The first error ends the work on all threads.

use super::reader::Image;
use crate::sandbox::{ThreadKind, enter_thread};
use pageferry_protocol::image::EXTENT_PAGES;
use pageferry_protocol::memory::PageRange;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Builder;

/// Claims for each worker, at least. With fewer claims, one worker could be left with a large last
/// part while the others have nothing to do.
const CLAIMS: usize = 4;

/// How many items in a row one claim has, if `workers` share `items` items: at most `most`, at
/// least 1, and so few that there are [`CLAIMS`] claims for each worker.
pub(crate) fn items_per_claim(items: usize, workers: usize, most: usize) -> usize {
    (items / workers.max(1) / CLAIMS).clamp(1, most)
}

/// Counts the pages that are done, and reports them to a callback.
pub struct Progress<'a> {
    done: AtomicU64,
    total: u64,
    show: &'a (dyn Fn(u64, u64) + Sync),
}

impl std::fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress")
            .field("done", &self.done)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

impl<'a> Progress<'a> {
    /// Progress over `total` pages. All threads call `show` with the number of pages that are done
    /// and with `total`. The calls are not always in order.
    pub fn new(total: u64, show: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        Self { done: AtomicU64::new(0), total, show }
    }

    /// Counts `pages` more pages as done.
    pub fn add(&self, pages: u64) {
        let before = self.done.fetch_add(pages, Ordering::Relaxed);
        (self.show)(before + pages, self.total);
    }

    /// The number of pages that are done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// Calls `work` once for each of `items` items, in no fixed order, on `threads` threads including
/// this one. Each thread has its own value, made by `new`, such as a buffer. After an error no
/// thread claims another item.
///
/// # Errors
/// One of the errors of `work`.
pub(super) fn share_among_threads<Own, E: Send>(
    threads: usize, items: u64, new: impl Fn() -> Own + Sync,
    work: impl Fn(&mut Own, u64) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // A thread claims an item by adding one, so no other thread gets the same item. Relaxed is
    // enough: the counter orders no memory between the items.
    let next = AtomicU64::new(0);
    let run = || {
        let mut own = new();
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return Ok(());
            }
            if let Err(error) = work(&mut own, item) {
                next.store(items, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    let useful = threads.min(usize::try_from(items).unwrap_or(usize::MAX));
    std::thread::scope(|scope| {
        // If the kernel refuses a thread, the threads that exist do the work.
        let work = || {
            enter_thread(ThreadKind::Pages);
            run()
        };
        let spawn = |_| Builder::new().name("image".into()).spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..useful).map_while(spawn).collect();
        let own = run();
        let join = |outcome: Result<(), E>, other: std::thread::ScopedJoinHandle<'_, _>| {
            outcome.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        };
        others.into_iter().fold(own, join)
    })
}

/// The extents of all blocks, numbered in the order of the file.
#[derive(Debug)]
pub(super) struct Extents {
    /// Number of the first extent of each block.
    first: Vec<u64>,
    /// Pages of each block.
    pages: Vec<u64>,
    /// Number of all extents.
    pub(super) count: u64,
}

impl Extents {
    /// The extents of an image.
    pub(super) fn of(image: &Image) -> Self {
        let (blocks, layout) = (image.contents().table.blocks(), image.layout());
        let first = (0..blocks.len()).map(|at| layout.extent(at, 0)).collect();
        let pages = blocks.iter().map(|block| block.pages()).collect();
        Self { first, pages, count: layout.all_extents() }
    }

    /// The index of the block that extent `number` belongs to, and the number of the extent within
    /// that block.
    pub(super) fn locate(&self, number: u64) -> (usize, u64) {
        let at = self.first.partition_point(|first| *first <= number).saturating_sub(1);
        (at, number - self.first[at])
    }

    /// The pages of an extent, given as [`Extents::locate`] returns it. The last extent of a block
    /// may have fewer than [`EXTENT_PAGES`].
    pub(super) fn pages(&self, (at, extent): (usize, u64)) -> PageRange {
        PageRange::new(extent * EXTENT_PAGES, EXTENT_PAGES)
            .intersection(&PageRange::new(0, self.pages[at]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn each_item_is_done_once_with_any_number_of_threads() {
        for threads in [0, 1, 3, 100] {
            let done = Mutex::new(Vec::new());
            let work = |_: &mut (), item| {
                done.lock().unwrap().push(item);
                Ok::<_, ()>(())
            };
            share_among_threads(threads, 50, || (), work).unwrap();
            let mut done = done.into_inner().unwrap();
            done.sort_unstable();
            assert_eq!(done, (0..50).collect::<Vec<u64>>(), "{threads} threads");
        }
    }

    #[test]
    fn each_worker_has_several_claims() {
        for workers in [1, 2, 7, 64] {
            for items in (0..300).chain([100_000]) {
                let items_per_claim = items_per_claim(items, workers, 32);
                assert!((1..=32).contains(&items_per_claim));
                let claims = items.div_ceil(items_per_claim);
                assert!(
                    claims >= items.min(CLAIMS * workers),
                    "{items} items, {workers} workers: {claims} claims"
                );
            }
        }
        assert_eq!((items_per_claim(100_000, 8, 32), items_per_claim(0, 0, 32)), (32, 1));
    }

    #[test]
    fn an_error_ends_the_work_of_all_threads() {
        let done = AtomicU64::new(0);
        let work = |_: &mut (), item| match item {
            10 => Err(item),
            _ => {
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        };
        assert_eq!(share_among_threads(1, u64::MAX, || (), work), Err(10));
        assert_eq!(done.into_inner(), 10);
        assert_eq!(
            share_among_threads(
                4,
                1 << 40,
                || (),
                |_: &mut (), item| if item > 100 { Err(()) } else { Ok(()) }
            ),
            Err(())
        );
    }
}
