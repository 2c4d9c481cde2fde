//! An outgoing migration.
//!
//! [`run`] is the list of its phases; each takes what the last one returned.
//!
//! - [`connect`]: connections and the handshake;
//! - [`fixup`]: asking the trackers, and clearing what is discarded (law 5);
//! - [`pass`]: one walk over the dirty pages by all workers;
//! - [`sender`]: reading pages and batching records (laws 1 and 7);
//! - [`compress`]: compressing them, where that is wanted;
//! - [`zero`]: finding zero pages;
//! - [`converge`]: when to stop the guest;
//! - [`handover`]: the stopped guest, and the line of law 9.

pub mod compress;
pub mod connect;
pub mod converge;
pub mod fixup;
pub mod handover;
pub mod pass;
pub mod sender;
pub mod zero;

use crate::hooks::HookError;
use crate::job::{Job, JobError};
use crate::tracking::{TrackerChoice, Trackers};
use crate::transport::{Limiter, TransportError};
use connect::{Streams, Target};
use converge::Pace;
use fixup::DirtyState;
use handover::PausedGuest;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::Phase;
use std::sync::Arc;

/// Everything that a running migration owns. Dropping it leaves the VMM as it was found: trackers off, throttle off.
struct Migration {
    job: Arc<Job>,
    limiter: Limiter,
    streams: Streams,
    trackers: Trackers,
    dirty: DirtyState,
    pace: Pace,
    throttled: bool,
}

/// Migrates the guest of `job` to `target`, and ends the job.
pub fn run(job: &Arc<Job>, target: Target, trackers: &TrackerChoice) {
    let outcome = migrate(job, target, trackers);
    // A cancelled job fails in many ways, where it happened to be; what the user wants to read is that it was cancelled.
    let outcome = if outcome.is_err() && job.cancel.is_cancelled() { Err(JobError::Cancelled) } else { outcome };
    job.finish(&outcome);
}

fn migrate(job: &Arc<Job>, target: Target, choice: &TrackerChoice) -> Result<(), JobError> {
    let streams = connect::connect(job, target)?;
    let mut migration = Migration::new(job, streams, choice)?;
    let outcome = migration.passes().and_then(|()| migration.hand_over());
    migration.clean_up();
    outcome.map_err(|error| migration.explain(error))
}

impl Migration {
    fn new(job: &Arc<Job>, streams: Streams, choice: &TrackerChoice) -> Result<Self, JobError> {
        let options = job.options();
        Ok(Self {
            job: job.clone(),
            limiter: Limiter::new(options.bandwidth),
            streams,
            trackers: Trackers::new(choice, &job.hooks, options.hook_timeout),
            dirty: DirtyState::new(&job.memory)?,
            pace: Pace::default(),
            throttled: false,
        })
    }

    /// The passes over the running guest.
    fn passes(&mut self) -> Result<(), JobError> {
        self.job.enter(Phase::Tracking);
        self.start_tracking()?;
        self.job.enter(Phase::Passes);
        loop {
            self.run_pass()?;
            self.sync()?;
            match self.pace.decide(&self.job.options(), self.dirty.remaining())? {
                converge::Next::Stop => return Ok(()),
                converge::Next::Pass => {}
                converge::Next::Throttle(percent) => self.throttle(percent)?,
            }
        }
    }

    /// The stopped guest.
    fn hand_over(&mut self) -> Result<(), JobError> {
        self.job.enter(Phase::Stopping);
        self.job.freeze();
        let mut paused = PausedGuest::pause(&self.job)?;
        let state = paused.save_state()?;
        self.send_state(&state)?;
        self.sync()?;
        self.run_pass()?;
        self.send_end()?;
        self.job.enter(Phase::Loading);
        self.wait_loaded()?;
        self.job.enter(Phase::Committing);
        paused.commit(&mut self.streams)
    }

    fn throttle(&mut self, percent: u32) -> Result<(), JobError> {
        self.throttled = true;
        match self.job.hooks.ask(&Hook::Throttle { percent }, self.job.options().hook_timeout) {
            Ok(()) => self.job.count(|counters| counters.throttle_percent = percent.into()),
            // A VMM that cannot is no worse than one that was not asked: the passes go on.
            Err(error @ HookError::Refused { .. }) => log::warn!("{}", crate::error::chain(&error)),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Leaves the VMM as it was found. The guest itself was resumed, if it was to be, when the [`PausedGuest`] went.
    fn clean_up(&mut self) {
        let timeout = self.job.options().hook_timeout;
        if std::mem::take(&mut self.throttled)
            && let Err(error) = self.job.hooks.undo(&Hook::Throttle { percent: 0 }, timeout)
        {
            log::warn!("the guest stays throttled: {}", crate::error::chain(&error));
        }
        self.trackers.stop();
    }

    /// If the peer failed it said why before it closed: that is the error to report.
    fn explain(&mut self, error: JobError) -> JobError {
        match &error {
            // Who was silent for so long has said nothing that could still be on its way.
            JobError::Transport(TransportError::Silent(_)) => error,
            JobError::Transport(_) if !self.job.cancel.is_cancelled() => {
                self.streams.last_words().map_or(error, JobError::Peer)
            }
            JobError::Unconfirmed { .. } | JobError::Peer(_) | JobError::Cancelled => error,
            _ => {
                self.streams.say_error(&error.to_remote());
                error
            }
        }
    }
}
