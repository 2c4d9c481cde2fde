// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests made of threads. Each thread is a vCPU that adds 1 to its word of each page that it
//! visits.
//!
//! Each page belongs to one thread. So every page has one writer, and once the guest is paused it
//! is known exactly what each page must hold. The counts are part of the VMM's state
//! ([`Usage::save`]), so the destination continues to count where the source stopped.

use super::Guest;
use crate::Error;
use crate::gate::Gate;
use crate::random::Random;
use crate::usage::{Path, Usage, Writer};
use pageferry_client::StatePiece;
use pageferry_protocol::memory::PageRange;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most pages written between two passes of the gate.
const BATCH: u64 = 64;
/// Longest time outside the gate between two batches.
const LONGEST_IDLE: Duration = Duration::from_millis(5);

/// How the next page is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// In order, and again from the first page.
    Sequential,
    /// At random, each page with the same probability.
    Uniform,
    /// `writes_percent` of the writes go to the first `pages_percent` of the pages.
    Hot {
        /// Size of the hot set.
        pages_percent: u64,
        /// Percentage of the writes that go there.
        writes_percent: u64,
    },
}

/// Pages of several blocks, with consecutive numbers.
#[derive(Debug, Clone, Default)]
pub struct PageSet {
    /// Block, pages, and the number of the first of them.
    runs: Vec<(u32, PageRange, u64)>,
    pages: u64,
}

impl FromIterator<(u32, PageRange)> for PageSet {
    fn from_iter<T: IntoIterator<Item = (u32, PageRange)>>(runs: T) -> Self {
        let mut set = Self::default();
        for (block, run) in runs {
            set.runs.push((block, run, set.pages));
            set.pages += run.count;
        }
        set
    }
}

impl PageSet {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The block of this page number, and the page's index there.
    pub fn page(&self, number: u64) -> Option<(u32, u64)> {
        let run = self.runs.partition_point(|(_, _, start)| *start <= number).checked_sub(1)?;
        let (block, pages, start) = self.runs.get(run)?;
        (number - start < pages.count).then(|| (*block, pages.first + number - start))
    }
}

/// How a guest of threads behaves.
#[derive(Debug, Clone)]
pub struct ThreadGuestOptions {
    /// Number of threads.
    pub threads: u64,
    /// Writes per second of all threads together. `None` is no limit.
    pub rate: Option<u64>,
    /// How the next page is chosen.
    pub pattern: Pattern,
    /// The pages that it uses. `None` is all memory.
    pub pages: Option<PageSet>,
    /// The seed of its random numbers.
    pub seed: u64,
    /// How it writes: [`Path::Mapping`], or [`Path::MappingAndLog`] if there is no other tracker.
    pub path: Path,
}

impl Default for ThreadGuestOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            rate: Some(10_000),
            pattern: Pattern::Uniform,
            pages: None,
            seed: 1,
            path: Path::MappingAndLog,
        }
    }
}

/// State that all threads of a guest share.
#[derive(Debug)]
struct Shared {
    options: ThreadGuestOptions,
    pages: PageSet,
    writer: Writer,
    gate: Gate,
    throttle: AtomicU32,
    writes: AtomicU64,
}

/// A guest of threads. They end when it is dropped.
#[derive(Debug)]
pub struct ThreadGuest {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadGuest {
    /// A guest that does not run yet.
    ///
    /// # Errors
    /// If there is no memory for its ledger.
    pub fn new(usage: &Arc<Usage>, options: ThreadGuestOptions) -> Result<Self, Error> {
        Self::named(usage, "guest", options)
    }

    /// Like [`ThreadGuest::new`], with another name: for a second guest in the same memory.
    ///
    /// # Errors
    /// If there is no memory for its ledger.
    pub fn named(
        usage: &Arc<Usage>, name: &str, options: ThreadGuestOptions,
    ) -> Result<Self, Error> {
        if options.threads == 0 {
            return Err(Error::Argument("a guest of 0 threads".into()));
        }
        let writer = usage.writer(name, options.path)?;
        let all =
            || usage.memory().blocks().iter().map(|block| (block.id(), block.all())).collect();
        let pages = options.pages.clone().unwrap_or_else(all);
        let (throttle, writes) = (AtomicU32::new(0), AtomicU64::new(0));
        let shared = Shared { options, pages, writer, gate: Gate::default(), throttle, writes };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new() })
    }

    /// Writes since it was made.
    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// Returns a function that gives [`ThreadGuest::writes`] also while a VMM owns the guest.
    pub fn watch_writes(&self) -> impl Fn() -> u64 + Send + Sync + use<> {
        let shared = self.shared.clone();
        move || shared.writes.load(Ordering::Relaxed)
    }
}

impl Guest for ThreadGuest {
    fn start(&mut self) -> Result<(), Error> {
        let count =
            if self.shared.options.rate == Some(0) { 0 } else { self.shared.options.threads };
        while (self.threads.len() as u64) < count {
            let number = self.threads.len() as u64;
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name(format!("guest-{number}"));
            let thread = thread
                .spawn(move || run(&shared, number))
                .map_err(Error::io("start a guest's thread"))?;
            self.threads.push(thread);
        }
        self.shared.gate.open();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.shared.gate.close();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.start()
    }

    /// Its ledger is part of the usage's state.
    fn save_state(&mut self) -> Result<Vec<StatePiece>, Error> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _state: &[StatePiece]) -> Result<(), Error> {
        Ok(())
    }

    fn throttle(&mut self, percent: u32) -> Result<(), Error> {
        self.shared.throttle.store(percent.min(99), Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for ThreadGuest {
    fn drop(&mut self) {
        self.shared.gate.end();
        for thread in self.threads.drain(..) {
            // A thread that panicked has printed its message already.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, thread: u64) {
    let mut walk = Walk::new(shared, thread);
    while let Some(inside) = shared.gate.enter() {
        let started = Instant::now();
        for _ in 0..walk.batch {
            if let Err(error) = walk.step() {
                log::error!("guest thread {thread}: {}", error.sentence());
                return;
            }
        }
        drop(inside);
        shared.gate.idle(walk.pause_after(started.elapsed()));
    }
}

/// One thread and its share of the pages: those whose number is `thread` modulo the number of
/// threads.
struct Walk<'a> {
    shared: &'a Shared,
    thread: u64,
    /// Pages in the share.
    share: u64,
    next: u64,
    batch: u64,
    random: Random,
}

impl<'a> Walk<'a> {
    fn new(shared: &'a Shared, thread: u64) -> Self {
        let options = &shared.options;
        let share =
            (shared.pages.pages() + options.threads - 1).saturating_sub(thread) / options.threads;
        // At a low rate, a batch has the writes of the longest time outside, so that writes are
        // spread evenly.
        let due = options
            .rate
            .map(|rate| rate * LONGEST_IDLE.as_millis() as u64 / 1000 / options.threads);
        let batch = due.unwrap_or(BATCH).clamp(1, BATCH);
        Self { shared, thread, share, next: 0, batch, random: Random::derive(options.seed, thread) }
    }

    fn step(&mut self) -> Result<(), Error> {
        let share = self.share;
        let number = match self.shared.options.pattern {
            Pattern::Sequential => {
                self.next = (self.next + 1) % share.max(1);
                self.next
            }
            Pattern::Uniform => self.random.below(share),
            Pattern::Hot { pages_percent, writes_percent } => {
                let hot = (share * pages_percent / 100).clamp(1, share.max(1));
                if self.random.percent(writes_percent) {
                    self.random.below(hot)
                } else {
                    self.random.below(share)
                }
            }
        };
        let Some((block, page)) =
            self.shared.pages.page(number * self.shared.options.threads + self.thread)
        else {
            return Ok(());
        };
        if self.shared.writer.touch(block, page)? {
            self.shared.writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// How long to stay outside after a batch that took `worked`, for the rate and the throttle.
    fn pause_after(&self, worked: Duration) -> Duration {
        let options = &self.shared.options;
        let held_back = f64::from(self.shared.throttle.load(Ordering::Relaxed)) / 100.0;
        let seconds = match options.rate {
            Some(rate) => {
                let due = self.batch as f64 * options.threads as f64
                    / (rate.max(1) as f64 * (1.0 - held_back));
                (due - worked.as_secs_f64()).max(0.0)
            }
            None => worked.as_secs_f64() * held_back / (1.0 - held_back),
        };
        Duration::from_secs_f64(seconds.min(60.0))
    }
}
