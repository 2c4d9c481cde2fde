//! Work on the extents of an image, shared out among threads.

use super::Image;
use pageferry_protocol::image::EXTENT_PAGES;
use pageferry_protocol::memory::PageRange;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, available_parallelism};

/// How many threads work where nobody says.
pub fn processors() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// Claims that there are at least for each worker, so that none is left with the last of the work.
const CLAIMS: usize = 4;

/// How many of `items` items in a row a worker takes at once, of `workers` that share them: `most`,
/// unless some of them would have little to do then, or nothing; at least 1.
pub(crate) fn at_once(items: usize, workers: usize, most: usize) -> usize {
    (items / workers.max(1) / CLAIMS).clamp(1, most)
}

/// How much is done of what there is to do, for whoever wants to see it.
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
    /// Of `total` pages. `show` is called by all threads, with the pages that are done and all; not
    /// always in order.
    pub fn new(total: u64, show: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        Self { done: AtomicU64::new(0), total, show }
    }

    /// So many pages more are done.
    pub fn add(&self, pages: u64) {
        let before = self.done.fetch_add(pages, Ordering::Relaxed);
        (self.show)(before + pages, self.total);
    }

    /// Pages that are done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// Does `work` for each of `items` items, in no order, on this thread and as many more as make
/// `threads`. Each has something of its own, made by `new`. The first error that is met ends all.
///
/// # Errors
/// One of those of `work`.
pub(super) fn share<Own, E: Send>(
    threads: usize, items: u64, new: impl Fn() -> Own + Sync,
    work: impl Fn(&mut Own, u64) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // Who takes an item adds one: nobody else has it. What the items do to each other is not
    // ordered by it.
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
        // If the kernel gives no more threads, those that there are do it.
        let spawn = |_| Builder::new().name("image".into()).spawn_scoped(scope, run).ok();
        let others: Vec<_> = (1..useful).map_while(spawn).collect();
        let own = run();
        let join = |outcome: Result<(), E>, other: std::thread::ScopedJoinHandle<'_, _>| {
            outcome.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        };
        others.into_iter().fold(own, join)
    })
}

/// Extents of all blocks, counted through as they lie in the file.
#[derive(Debug)]
pub(super) struct Extents {
    /// The first of each block.
    first: Vec<u64>,
    /// Pages of each block.
    pages: Vec<u64>,
    /// How many there are.
    pub(super) count: u64,
}

impl Extents {
    /// Those of an image.
    pub(super) fn of(image: &Image) -> Self {
        let (blocks, layout) = (image.contents().table.blocks(), image.layout());
        let first = (0..blocks.len()).map(|at| layout.extent(at, 0)).collect();
        let pages = blocks.iter().map(|block| block.pages()).collect();
        Self { first, pages, count: layout.all_extents() }
    }

    /// The block that extent `number` is of, as an index of the table, and which of its extents it
    /// is.
    pub(super) fn locate(&self, number: u64) -> (usize, u64) {
        let at = self.first.partition_point(|first| *first <= number).saturating_sub(1);
        (at, number - self.first[at])
    }

    /// The pages of that extent that the block has.
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
    fn each_item_is_done_once_whoever_does_it() {
        for threads in [0, 1, 3, 100] {
            let done = Mutex::new(Vec::new());
            let work = |_: &mut (), item| {
                done.lock().unwrap().push(item);
                Ok::<_, ()>(())
            };
            share(threads, 50, || (), work).unwrap();
            let mut done = done.into_inner().unwrap();
            done.sort_unstable();
            assert_eq!(done, (0..50).collect::<Vec<u64>>(), "{threads} threads");
        }
    }

    #[test]
    fn each_worker_has_something_to_do() {
        for workers in [1, 2, 7, 64] {
            for items in (0..300).chain([100_000]) {
                let at_once = at_once(items, workers, 32);
                assert!((1..=32).contains(&at_once));
                let claims = items.div_ceil(at_once);
                assert!(
                    claims >= items.min(CLAIMS * workers),
                    "{items} items, {workers} workers: {claims} claims"
                );
            }
        }
        assert_eq!((at_once(100_000, 8, 32), at_once(0, 0, 32)), (32, 1));
    }

    #[test]
    fn an_error_ends_all() {
        let done = AtomicU64::new(0);
        let work = |_: &mut (), item| match item {
            10 => Err(item),
            _ => {
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        };
        assert_eq!(share(1, u64::MAX, || (), work), Err(10));
        assert_eq!(done.into_inner(), 10);
        assert_eq!(
            share(4, 1 << 40, || (), |_: &mut (), item| if item > 100 { Err(()) } else { Ok(()) }),
            Err(())
        );
    }
}
