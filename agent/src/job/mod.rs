//! What all jobs share.
//!
//! - [`cancel`]: stopping a job wherever it waits, and the line after which it cannot be stopped;
//! - [`error`]: why a job failed;
//! - this file: [`Job`], what the session and the job's threads both see.

pub mod cancel;
pub mod error;

pub use cancel::{Cancel, TooLate};
pub use error::JobError;

use crate::hooks::Hooks;
use crate::memory::GuestMemory;
use pageferry_protocol::control::job::{Counters, JobKind, JobStatus, OutgoingOptions, Phase};
use rustix::event::EventfdFlags;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Figures that several workers count at once.
#[derive(Debug, Default)]
pub struct LiveCounters {
    /// See [`Counters::pages_sent`].
    pub pages_sent: AtomicU64,
    /// See [`Counters::zero_pages`].
    pub zero_pages: AtomicU64,
    /// See [`Counters::discarded_pages`].
    pub discarded_pages: AtomicU64,
    /// See [`Counters::stray_pages`].
    pub stray_pages: AtomicU64,
    /// See [`Counters::wire_bytes`].
    pub wire_bytes: AtomicU64,
    /// See [`Counters::pass_pages_done`].
    pub pass_pages_done: AtomicU64,
}

/// Adds to a figure that only people and estimates read.
pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// Reads such a figure.
pub fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// A job, as the session and the job's threads see it.
#[derive(Debug)]
pub struct Job {
    /// Counted from 1.
    pub id: u64,
    /// What it is.
    pub kind: JobKind,
    /// The memory it started with.
    pub memory: Arc<GuestMemory>,
    /// The VMM.
    pub hooks: Arc<Hooks>,
    /// Stops it.
    pub cancel: Cancel,
    /// Figures that workers count.
    pub live: LiveCounters,
    started: Instant,
    state: Mutex<State>,
    /// Readable for the session when something changed that is worth an event.
    notify: Arc<OwnedFd>,
}

#[derive(Debug)]
struct State {
    status: JobStatus,
    options: OutgoingOptions,
    /// Populates are refused: the last sync is near or over.
    frozen: bool,
}

impl Job {
    /// A job that starts now.
    pub fn new(
        id: u64, kind: JobKind, memory: Arc<GuestMemory>, hooks: Arc<Hooks>, options: OutgoingOptions,
        notify: Arc<OwnedFd>,
    ) -> std::io::Result<Self> {
        let status = JobStatus { job: id, kind, phase: Phase::Connecting, ..JobStatus::default() };
        Ok(Self {
            id,
            kind,
            memory,
            hooks,
            cancel: Cancel::new()?,
            live: LiveCounters::default(),
            started: Instant::now(),
            state: Mutex::new(State { status, options, frozen: false }),
            notify,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it stands.
    pub fn status(&self) -> JobStatus {
        let mut status = self.state().status.clone();
        let counters = &mut status.counters;
        counters.pages_sent = get(&self.live.pages_sent);
        counters.zero_pages = get(&self.live.zero_pages);
        counters.discarded_pages = get(&self.live.discarded_pages);
        counters.stray_pages = get(&self.live.stray_pages);
        counters.wire_bytes = get(&self.live.wire_bytes);
        counters.pass_pages_done = get(&self.live.pass_pages_done);
        if !status.phase.is_final() {
            counters.total_us = micros(self.started.elapsed());
        }
        status
    }

    /// Changes figures.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.state().status.counters);
    }

    /// Enters a phase, and tells the VMM and all who watch.
    pub fn enter(&self, phase: Phase) {
        log::info!("job {}: {}", self.id, phase.name());
        self.state().status.phase = phase;
        self.announce();
    }

    /// Tells the VMM and all who watch how the job stands.
    pub fn announce(&self) {
        self.hooks.tell(&self.status());
        // A full eventfd is readable already.
        let _ = rustix::io::write(&self.notify, &1u64.to_ne_bytes());
    }

    /// Ends the job.
    pub fn finish(&self, outcome: &Result<(), JobError>) {
        self.cancel.release();
        let (phase, error) = match outcome {
            Ok(()) => (Phase::Completed, String::new()),
            Err(error @ JobError::Cancelled) => (Phase::Cancelled, error.to_string()),
            Err(error @ JobError::Unconfirmed { .. }) => (Phase::Unconfirmed, crate::error::chain(error)),
            Err(error) => (Phase::Failed, crate::error::chain(error)),
        };
        if !error.is_empty() {
            log::error!("job {} {}: {error}", self.id, phase.name());
        }
        let mut state = self.state();
        state.status.counters.total_us = micros(self.started.elapsed());
        state.status.error = error;
        // A guest that was handed over, or perhaps was, is not this side's to change any more.
        let here = self.kind == JobKind::Incoming || matches!(phase, Phase::Failed | Phase::Cancelled);
        state.frozen = state.frozen && !here;
        drop(state);
        self.enter(phase);
    }

    /// The options as they are now.
    pub fn options(&self) -> OutgoingOptions {
        self.state().options.clone()
    }

    /// Changes what may be changed while it runs.
    pub fn set_parameters(&self, new: &OutgoingOptions) {
        let mut state = self.state();
        let OutgoingOptions { streams, compression, peer_timeout, hook_timeout, .. } = state.options;
        state.options = OutgoingOptions { streams, compression, peer_timeout, hook_timeout, ..new.clone() };
    }

    /// Runs a populate, unless the last sync is near: what it marks would not be seen any more.
    ///
    /// # Errors
    /// If it is.
    pub fn unless_frozen<T>(&self, populate: impl FnOnce() -> T) -> Result<T, Frozen> {
        // Held while populating, so that the freeze waits for it.
        let state = self.state();
        if state.frozen { Err(Frozen { job: self.id }) } else { Ok(populate()) }
    }

    /// Refuses populates from now on.
    pub fn freeze(&self) {
        self.state().frozen = true;
    }
}

/// A populate while a job cannot take it.
#[derive(Debug, thiserror::Error)]
#[error("job {job} is past its last sync: populate again if it ends with the guest here")]
pub struct Frozen {
    job: u64,
}

/// A duration in whole microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The event descriptor by which jobs wake the session.
///
/// # Errors
/// If the kernel has none.
pub fn notifier() -> std::io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
}
