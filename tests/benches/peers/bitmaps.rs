// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bitmaps compared with vm-memory's `AtomicBitmap`, which counts bits one by one, and with the
//! speed of the memory.

use super::Bench;
use super::table::{Better, Table};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::{DirtyLog, MappedBitmap};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Instant;
use vm_memory::bitmap::AtomicBitmap;

const GIB: u64 = 1 << 30;
const OURS: &str = "pageferry";
const THEIRS: &str = "vm-memory";

fn micros(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64() * 1e6
}

fn log(size: u64) -> DirtyLog {
    let fd: OwnedFd = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    let bytes = size / PAGE_SIZE / 8;
    ftruncate(&fd, bytes).unwrap();
    DirtyLog::map_sparse(fd, 0, bytes).unwrap()
}

fn theirs(size: u64) -> AtomicBitmap {
    let page = NonZeroUsize::new(PAGE_SIZE as usize).unwrap();
    AtomicBitmap::new(size as usize, page)
}

/// Measures two ways to do the same, in turns.
fn race(
    table: &mut Table, work: &str, rounds: usize, mut ours: impl FnMut() -> f64,
    mut theirs: impl FnMut() -> f64,
) {
    let (mut own, mut other) = (Vec::new(), Vec::new());
    // The first round of each is a warm-up.
    for round in 0..=rounds {
        let (one, two) = (ours(), theirs());
        if round > 0 {
            own.push(one);
            other.push(two);
        }
    }
    table.add(work, OURS, "us", &own, String::new());
    table.add(work, THEIRS, "us", &other, String::new());
    table.compare(work, OURS, THEIRS, Better::Less);
}

/// Marking, harvesting, walking.
pub fn bitmaps(bench: &Bench, table: &mut Table) {
    let rounds = bench.rounds * 4;
    mark(bench, table, rounds);
    for size in [64 * GIB, 1024 * GIB] {
        for (state, every) in [
            ("that was never dirty", None),
            ("whose pages were all dirty once, idle", Some(0)),
            ("with 1 page of 100 dirty", Some(100)),
        ] {
            harvest(
                table,
                size / bench.shrink,
                &format!("bitmaps: harvest a log of {} GiB {state}", size / GIB),
                every,
                rounds,
            );
        }
    }
    runs(bench, table, rounds);
}

fn mark(bench: &Bench, table: &mut Table, rounds: usize) {
    let size = GIB / bench.shrink;
    let (ours, theirs) = (log(size), theirs(size));
    let pages = PageRange::new(0, size / PAGE_SIZE);
    race(
        table,
        "bitmaps: mark 1 GiB",
        rounds,
        || {
            ours.bits().clear(pages);
            micros(|| ours.mark(black_box(pages)))
        },
        || {
            theirs.reset();
            micros(|| theirs.set_addr_range(black_box(0), size as usize))
        },
    );
}

/// `every`: one page in this many is dirty before each harvest. With 0 none is, except that all
/// were before the first.
fn harvest(table: &mut Table, size: u64, work: &str, every: Option<u64>, rounds: usize) {
    let (log, theirs) = (log(size), theirs(size));
    let pages = PageRange::new(0, size / PAGE_SIZE);
    let into = MappedBitmap::private(pages.count).unwrap();
    if every == Some(0) {
        log.mark(pages);
        log.drain_into(pages, &into);
        theirs.set_addr_range(0, size as usize);
        black_box(theirs.get_and_reset());
    }
    let dirty = |set: &dyn Fn(u64)| {
        if let Some(every) = every.filter(|every| *every > 0) {
            (0..pages.count).step_by(every as usize).for_each(set);
        }
    };
    race(
        table,
        work,
        rounds.min(10),
        || {
            into.clear(pages);
            dirty(&|page| log.mark(PageRange::new(page, 1)));
            micros(|| {
                black_box(log.drain_into(pages, &into));
            })
        },
        || {
            dirty(&|page| theirs.set_addr_range((page * PAGE_SIZE) as usize, 1));
            micros(|| {
                black_box(theirs.get_and_reset());
            })
        },
    );
}

fn runs(bench: &Bench, table: &mut Table, rounds: usize) {
    let pages = 64 * GIB / bench.shrink / PAGE_SIZE;
    let bitmap = MappedBitmap::private(pages).unwrap();
    let theirs = theirs(pages * PAGE_SIZE);
    for first in (0..pages).step_by(100) {
        bitmap.set(PageRange::new(first, 3));
        theirs.set_addr_range((first * PAGE_SIZE) as usize, 3 * PAGE_SIZE as usize);
    }
    let all = bitmap.all();
    race(
        table,
        "bitmaps: walk the runs of 64 GiB, 3 pages of 100 set",
        rounds.min(10),
        || {
            micros(|| {
                black_box(
                    bitmap.runs(all).map(|run| run.first ^ run.count).fold(0, |sum, run| sum ^ run),
                );
            })
        },
        || {
            // It has no other walk than a query for each bit.
            micros(|| {
                let mut sum = 0;
                let mut start = None;
                for page in 0..pages {
                    match (theirs.is_bit_set(page as usize), start) {
                        (true, None) => start = Some(page),
                        (false, Some(first)) => {
                            sum ^= first ^ (page - first);
                            start = None;
                        }
                        _ => {}
                    }
                }
                black_box(sum);
            })
        },
    );
}
