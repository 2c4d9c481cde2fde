// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that writes, checks and reports pages: each page is in use, or free, or in a report that
//! the device has not returned yet.
//!
//! A thread of the guest locks a page while it touches it. The driver locks the pages that it puts
//! into a report only to mark them, so the guest does not wait for the device.

use pageferry_client::StatePiece;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::front_end::{BalloonDriver, Piece};
use pageferry_tests::gate::Gate;
use pageferry_tests::guest::Guest;
use pageferry_tests::memory::{TestBlock, TestMemory};
use pageferry_tests::random::Random;
use pageferry_tests::scenario::{SOON, lock};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest run of pages in one piece of a report.
const LONGEST: u64 = 64;
/// Pieces of a report.
const PIECES: usize = 32;

/// The first word of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The guest has written this.
    Written(u64),
    /// The page was reported when it had this.
    Free(u64),
    /// It is in a report that was not returned.
    Reported(u64),
}

impl Word {
    /// Whether the guest may read this there.
    pub fn may_read(self, found: u64) -> bool {
        match self {
            Self::Written(value) => found == value,
            Self::Free(old) | Self::Reported(old) => found == old || found == 0,
        }
    }

    fn last(self) -> u64 {
        match self {
            Self::Written(value) | Self::Free(value) | Self::Reported(value) => value,
        }
    }
}

/// The pages of a guest.
pub struct Pool {
    memory: Arc<TestMemory>,
    first: u64,
    pages: Vec<Mutex<Word>>,
    gate: Gate,
    /// The words when the guest was paused last.
    instant: Mutex<BTreeMap<u64, Word>>,
    /// What is wrong.
    wrong: Mutex<Option<String>>,
    writes: AtomicU64,
    reused: AtomicU64,
    reports: AtomicU64,
    reported: AtomicU64,
}

impl Pool {
    fn of(memory: &Arc<TestMemory>, words: impl Iterator<Item = (u64, Word)>) -> Arc<Self> {
        let words: Vec<_> = words.collect();
        Arc::new(Self {
            memory: memory.clone(),
            first: words.first().unwrap().0,
            pages: words.into_iter().map(|(_, word)| Mutex::new(word)).collect(),
            gate: Gate::default(),
            instant: Mutex::default(),
            wrong: Mutex::default(),
            writes: AtomicU64::new(0),
            reused: AtomicU64::new(0),
            reports: AtomicU64::new(0),
            reported: AtomicU64::new(0),
        })
    }

    /// Pages whose first words are their numbers.
    pub fn new(memory: &Arc<TestMemory>, pages: PageRange) -> Arc<Self> {
        Self::of(memory, (pages.first..pages.end()).map(|page| (page, Word::Written(page))))
    }

    /// The same pages in the memory to which the guest has moved.
    pub fn moved_to(&self, memory: &Arc<TestMemory>) -> Arc<Self> {
        Self::of(memory, self.words().into_iter())
    }

    /// These words, in another memory. What was in a report is free.
    pub fn as_of(&self, words: &BTreeMap<u64, Word>, memory: &Arc<TestMemory>) -> Arc<Self> {
        let settled = |word: Word| match word {
            Word::Reported(old) => Word::Free(old),
            other => other,
        };
        Self::of(memory, words.iter().map(|(page, word)| (*page, settled(*word))))
    }

    fn words(&self) -> BTreeMap<u64, Word> {
        (self.first..).zip(self.pages.iter().map(|word| *lock(word))).collect()
    }

    /// The words when the guest was paused last.
    pub fn instant(&self) -> BTreeMap<u64, Word> {
        lock(&self.instant).clone()
    }

    /// The guest of a mock VMM: it runs while the gate is open.
    pub fn guest(self: &Arc<Self>) -> impl Guest + use<> {
        PoolGuest(self.clone())
    }

    fn block(&self) -> &TestBlock {
        self.memory.block(0).unwrap()
    }

    /// Checks all pages, without a guest.
    #[track_caller]
    pub fn check_all(&self) {
        for (page, word) in self.words() {
            let found = self.block().read_word(page * PAGE_SIZE).unwrap();
            assert!(word.may_read(found), "page {page:#x} has {found:#x}: {word:?}");
        }
    }

    /// The guest looks at a page, and writes to it.
    fn touch(&self, at: u64, value: u64) {
        let mut word = lock(&self.pages[at as usize]);
        if matches!(*word, Word::Reported(_)) {
            return;
        }
        let page = self.first + at;
        let found = self.block().load(page * PAGE_SIZE).unwrap();
        if !word.may_read(found) {
            let sentence = format!("page {page:#x} has {found:#x}: {:?}", *word);
            lock(&self.wrong).get_or_insert(sentence);
        }
        if matches!(*word, Word::Free(_)) {
            self.reused.fetch_add(1, Ordering::Relaxed);
        }
        self.block().store(page * PAGE_SIZE, value).unwrap();
        self.block().mark(PageRange::new(page, 1));
        *word = Word::Written(value);
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// Marks pages from `at` as those of a report. Returns how many.
    fn take(&self, at: u64, most: u64) -> u64 {
        let mut count = 0;
        for word in self.pages[at as usize..].iter().take(most as usize) {
            let mut word = lock(word);
            if matches!(*word, Word::Reported(_)) {
                break;
            }
            *word = Word::Reported(word.last());
            count += 1;
        }
        count
    }

    /// Puts a report of free pages into the queue. Returns its runs: place in the pool, and count.
    pub fn put_report(&self, balloon: &mut BalloonDriver, random: &mut Random) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        while runs.is_empty() {
            for _ in 0..PIECES {
                // Every second run is never reported. Otherwise nothing would be left for a job.
                let run = random.below(self.pages.len() as u64 / (2 * LONGEST)) * 2 * LONGEST;
                let offset = random.below(LONGEST);
                let count = self.take(run + offset, 1 + random.below(LONGEST - offset));
                if count > 0 {
                    runs.push((run + offset, count));
                }
            }
        }
        let piece = |(at, count): &(u64, u64)| {
            Piece::writable((self.first + at) * PAGE_SIZE, (count * PAGE_SIZE) as u32)
        };
        let pieces: Vec<Piece> = runs.iter().map(piece).collect();
        let queue = balloon.report_queue();
        balloon.driver.queue(queue).put(&pieces);
        runs
    }

    /// A report was returned: its pages are free.
    pub fn returned(&self, runs: &[(u64, u64)]) {
        for (at, count) in runs {
            for word in &self.pages[*at as usize..(at + count) as usize] {
                let mut word = lock(word);
                *word = Word::Free(word.last());
            }
            self.reported.fetch_add(*count, Ordering::Relaxed);
        }
        self.reports.fetch_add(1, Ordering::Relaxed);
    }
}

struct PoolGuest(Arc<Pool>);

impl Guest for PoolGuest {
    fn start(&mut self) -> Result<(), pageferry_tests::Error> {
        self.0.gate.open();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), pageferry_tests::Error> {
        if self.0.gate.is_open() {
            self.0.gate.close();
            *lock(&self.0.instant) = self.0.words();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), pageferry_tests::Error> {
        self.start()
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, pageferry_tests::Error> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: &[StatePiece]) -> Result<(), pageferry_tests::Error> {
        Ok(())
    }
}

/// The threads of a guest.
pub struct Running {
    pool: Arc<Pool>,
    started: Instant,
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts a thread that writes and checks, and a driver that reports.
    pub fn start(pool: &Arc<Pool>, balloon: BalloonDriver) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let (ours, theirs) = ((pool.clone(), ends.clone()), (pool.clone(), ends.clone()));
        let threads = vec![
            std::thread::spawn(move || write(&ours.0, &ours.1)),
            std::thread::spawn(move || report(&theirs.0, balloon, &theirs.1)),
        ];
        Self { pool: pool.clone(), started: Instant::now(), ends, threads }
    }

    /// Starts the thread that writes and checks. The test reports.
    pub fn start_writer(pool: &Arc<Pool>) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let ours = (pool.clone(), ends.clone());
        let threads = vec![std::thread::spawn(move || write(&ours.0, &ours.1))];
        Self { pool: pool.clone(), started: Instant::now(), ends, threads }
    }

    /// Waits for this many more reports.
    pub fn wait_for_reports(&self, count: u64) {
        let reports = || self.pool.reports.load(Ordering::Relaxed);
        let wanted = reports() + count;
        wait_until("reports", SOON, || reports() >= wanted).unwrap();
    }

    /// Ends the threads, checks that they have found nothing wrong, and says what they did.
    #[track_caller]
    pub fn end(mut self, during: &str) {
        let elapsed = self.started.elapsed().as_secs_f64();
        self.ends.store(true, Ordering::Relaxed);
        self.pool.gate.end();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        let wrong = lock(&self.pool.wrong).take();
        assert_eq!(wrong, None);
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (reports, reported) = (count(&self.pool.reports), count(&self.pool.reported));
        eprintln!(
            "{during}: {reports} reports of {reported} pages in {elapsed:.1} s, {:.0} pages/s; \
             {} writes, {} of them to free pages",
            reported as f64 / elapsed,
            count(&self.pool.writes),
            count(&self.pool.reused)
        );
        assert!(reports > 0 && count(&self.pool.reused) > 0, "the scene proves nothing");
    }
}

fn write(pool: &Pool, ends: &AtomicBool) {
    let mut random = Random::new(1);
    let mut value = 1 << 32;
    while !ends.load(Ordering::Relaxed) {
        let Some(_inside) = pool.gate.enter() else { return };
        for _ in 0..16 {
            value += 1;
            pool.touch(random.below(pool.pages.len() as u64), value);
        }
    }
}

fn report(pool: &Pool, mut balloon: BalloonDriver, ends: &AtomicBool) {
    let mut random = Random::new(2);
    let queue = balloon.report_queue();
    while !ends.load(Ordering::Relaxed) {
        let Some(inside) = pool.gate.enter() else { return };
        let runs = pool.put_report(&mut balloon, &mut random);
        balloon.driver.queue(queue).kick();
        drop(inside);
        // While a job allows no change, it waits in the queue.
        while balloon.driver.queue(queue).wait_within(Duration::from_millis(50)).is_none() {
            if ends.load(Ordering::Relaxed) {
                return;
            }
        }
        pool.returned(&runs);
    }
}
