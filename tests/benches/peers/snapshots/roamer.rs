// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest of threads that write everywhere, and measure how long each write takes.
//!
//! Like a vCPU, and unlike guests with a ledger, it pauses at its next write and has no state to
//! save. So the bench measures only the part of the agent.

use pageferry_client::{HookError, Hooks, RunState, StatePiece};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::gate::Gate;
use pageferry_tests::memory::TestMemory;
use pageferry_tests::random::Random;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages that are written between two readings of the clock.
const BATCH: u64 = 64;
/// A write that takes longer than this is recorded.
const SLOW: Duration = Duration::from_micros(5);

/// The number of writers, and their rate.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Number of threads. With none the guest is idle.
    pub threads: u64,
    /// Writes per second of all threads together. `None` is no limit.
    pub rate: Option<u64>,
}

/// The guest. Clones are the same.
#[derive(Debug, Clone)]
pub struct Roamer(Arc<Shared>);

/// The threads of a guest. They end when this is dropped.
#[derive(Debug)]
pub struct Running {
    guest: Roamer,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    memory: Arc<TestMemory>,
    gate: Gate,
    pausing: AtomicBool,
    ending: AtomicBool,
    writes: AtomicU64,
    noting: AtomicBool,
    slow: Mutex<Vec<Duration>>,
    /// When the last pause was requested, and how long it lasted.
    pause: Mutex<(Option<Instant>, Duration)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Roamer {
    /// A guest that uses all of the first block, and is idle.
    pub fn new(memory: &Arc<TestMemory>) -> Self {
        let gate = Gate::default();
        gate.open();
        Self(Arc::new(Shared {
            memory: memory.clone(),
            gate,
            pausing: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            noting: AtomicBool::new(false),
            slow: Mutex::default(),
            pause: Mutex::default(),
        }))
    }

    /// Sets its pace.
    pub fn run(&self, pace: Pace) -> Running {
        self.0.ending.store(false, Ordering::Relaxed);
        let thread = |number| {
            let shared = self.0.clone();
            std::thread::spawn(move || shared.roam(pace, number))
        };
        Running { guest: self.clone(), threads: (0..pace.threads).map(thread).collect() }
    }

    /// Writes so far.
    pub fn writes(&self) -> u64 {
        self.0.writes.load(Ordering::Relaxed)
    }

    /// Measures writes per second for this time.
    pub fn rate(&self, time: Duration) -> f64 {
        let (before, started) = (self.writes(), Instant::now());
        std::thread::sleep(time);
        (self.writes() - before) as f64 / started.elapsed().as_secs_f64()
    }

    /// Starts or stops to record slow writes. Returns those that were recorded.
    pub fn note(&self, on: bool) -> Vec<Duration> {
        self.0.noting.store(on, Ordering::Relaxed);
        std::mem::take(&mut *lock(&self.0.slow))
    }

    /// Length of the last pause: from the request to the VMM until all threads may continue.
    pub fn last_pause(&self) -> Duration {
        lock(&self.0.pause).1
    }
}

impl Shared {
    fn ends(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    fn roam(&self, pace: Pace, thread: u64) {
        let block = &self.memory.blocks()[0];
        let mut random = Random::derive(7, thread);
        let leave = || self.pausing.load(Ordering::Relaxed) || self.ends();
        while let Some(pass) = self.gate.enter().filter(|_| !self.ends()) {
            let (entered, mut written) = (Instant::now(), 0);
            let mut ahead = Duration::ZERO;
            while !leave() && ahead.is_zero() {
                for _ in 0..BATCH {
                    let page = random.below(block.pages());
                    let started = Instant::now();
                    block.store(page * PAGE_SIZE + 8, random.next()).unwrap();
                    let time = started.elapsed();
                    if time > SLOW && self.noting.load(Ordering::Relaxed) {
                        lock(&self.slow).push(time);
                    }
                    self.writes.fetch_add(1, Ordering::Relaxed);
                    written += 1;
                    if leave() {
                        break;
                    }
                }
                if let Some(rate) = pace.rate {
                    let due = (written * pace.threads) as f64 / rate as f64;
                    ahead = Duration::from_secs_f64(due).saturating_sub(entered.elapsed());
                }
            }
            drop(pass);
            if !ahead.is_zero() {
                self.gate.idle(ahead);
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.guest.0.ending.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has printed its message already.
            let _ = thread.join();
        }
    }
}

/// The hooks of the VMM with this guest.
#[derive(Debug)]
pub struct Roams(pub Roamer);

impl Hooks for Roams {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        let guest = &self.0.0;
        lock(&guest.pause).0 = Some(Instant::now());
        guest.pausing.store(true, Ordering::Relaxed);
        guest.gate.close();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        let guest = &self.0.0;
        guest.pausing.store(false, Ordering::Relaxed);
        guest.gate.open();
        let mut pause = lock(&guest.pause);
        if let Some(since) = pause.0.take() {
            pause.1 = since.elapsed();
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}
