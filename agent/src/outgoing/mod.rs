// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An outgoing migration.
//!
//! [`run`] runs its phases. A phase takes what the one before it returned.
//!
//! - [`job`]: the job, as the session and the threads see it;
//! - [`migration`]: what a running migration owns;
//! - [`connect`]: the handshake;
//! - `reach`: connects the streams for it, until the destination answers;
//! - [`fixup`]: syncs the trackers, and clears discarded pages
//!   ([`fix-up-after-sync`](crate::invariants#fix-up-after-sync));
//! - [`pass`]: one walk of all workers over the dirty pages;
//! - [`clear_ahead`]: clears the VMM's tracker before the workers read;
//! - [`sender`]: reads pages and sends them in batches
//!   ([`never-read`](crate::invariants#never-read) and
//!   [`clear-then-read`](crate::invariants#clear-then-read));
//! - [`compress`]: compresses pages, if the operator wants that;
//! - [`unannounced_frees`]: finds memory that was freed without a request after it was sent;
//! - [`converge`]: decides when to stop the guest;
//! - [`stop`]: how long the guest may be paused for it;
//! - [`handover`]: sends the stopped guest, with the commit point
//!   ([`one-owner`](crate::invariants#one-owner));
//! - [`postcopy`]: the guest moves first, and its memory follows;
//! - [`error`]: why a source does not migrate its guest.
//!
//! If the migration fails before the commit point, the guest continues here, and the trackers and
//! the throttle are off again.

pub mod clear_ahead;
pub mod compress;
pub mod connect;
pub mod converge;
pub mod error;
pub mod fixup;
pub mod handover;
pub mod job;
pub mod migration;
pub mod pass;
pub mod postcopy;
mod reach;
pub mod sender;
pub mod stop;
pub mod unannounced_frees;

pub use error::OutgoingError;

use crate::job::JobError;
use crate::job::pause::PausedGuest;
use crate::tracking::TrackerChoice;
use connect::{SessionId, Target};
use handover::{commit, wait_loaded};
use job::OutgoingJob;
use migration::{Migration, check_throttle};
use pageferry_protocol::control::job::{Mode, Phase};
use postcopy::remaining::AlreadySent;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stop::Stop;

/// Longest delay before a wait between passes notices a request for postcopy.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What follows the passes.
enum AfterPasses {
    /// Precopy: the rest of the memory moves, and then the guest.
    HandOver,
    /// Postcopy: the guest moves, and then the rest of its memory.
    Postcopy,
}

/// Migrates the guest of `job` to `target`, and ends the job.
pub fn run(job: &Arc<OutgoingJob>, target: Target, trackers: &TrackerChoice) {
    let outcome = migrate(job, target, trackers);
    job.finish(outcome);
}

fn migrate(job: &Arc<OutgoingJob>, target: Target, choice: &TrackerChoice) -> Result<(), JobError> {
    let session = connect::new_session()?;
    let address = match &target {
        Target::Address(address) => Some(address.clone()),
        Target::Socket(_) => None,
    };
    // Before the destination hears of it.
    check_throttle(job)?;
    let streams = connect::connect(job, target, session)?;
    log::info!("job {}: sends by {} streams", job.id, streams.senders.len());
    let mut migration = Migration::new(job, session, address, streams, choice)?;
    let outcome = migration.move_guest();
    migration.clean_up();
    outcome.map_err(|error| migration.explain(error))
}

impl Migration {
    fn move_guest(&mut self) -> Result<(), JobError> {
        if self.job.options().mode == Mode::Postcopy {
            return self.run_postcopy(AlreadySent::Nothing);
        }
        let after = self.passes()?;
        // What was to be known about the passes.
        self.job.note("");
        match after {
            AfterPasses::HandOver => self.hand_over(),
            AfterPasses::Postcopy => self.run_postcopy(AlreadySent::Passes),
        }
    }

    /// Runs passes while the guest runs, until the guest is to be stopped.
    fn passes(&mut self) -> Result<AfterPasses, JobError> {
        self.job.enter(Phase::Tracking);
        self.start_tracking()?;
        // Not before: a tracker must see what the guest writes to a page that it says is free.
        self.free_pages = self.job.devices.ask_for_free_pages(&self.job.memory);
        self.job.enter(Phase::Passes);
        loop {
            self.update_throttle()?;
            self.run_pass()?;
            self.sync()?;
            let next = self.measurements.decide(&self.job.options(), self.dirty.remaining());
            // A request for postcopy comes before the policy. But if the rest fits the downtime
            // limit, the migration ends as precopy.
            let after =
                if self.job.is_postcopy_requested() && !matches!(next, Ok(converge::Next::Stop)) {
                    Some(AfterPasses::Postcopy)
                } else {
                    self.follow(next?)
                };
            match after {
                None => self.wait_before_next_pass()?,
                Some(AfterPasses::Postcopy) => {
                    self.find_unannounced_frees()?;
                    return Ok(AfterPasses::Postcopy);
                }
                // What was freed moves in one more pass.
                Some(AfterPasses::HandOver) if self.find_unannounced_frees()? > 0 => {}
                Some(AfterPasses::HandOver) => return Ok(AfterPasses::HandOver),
            }
        }
    }

    /// What follows if the passes are over.
    fn follow(&mut self, next: converge::Next) -> Option<AfterPasses> {
        match next {
            converge::Next::Stop => Some(AfterPasses::HandOver),
            converge::Next::Postcopy => Some(AfterPasses::Postcopy),
            converge::Next::Pass => None,
            converge::Next::Throttle(percent) => {
                self.policy_throttle = percent;
                None
            }
        }
    }

    /// Waits before the next pass, or until postcopy is requested.
    fn wait_before_next_pass(&self) -> Result<(), JobError> {
        let until = Instant::now() + self.measurements.delay_before_next_pass();
        while !self.job.is_postcopy_requested() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.job.cancel.sleep(left.min(POLL_INTERVAL))?;
        }
        Ok(())
    }

    /// Hands the stopped guest over (precopy).
    fn hand_over(&mut self) -> Result<(), JobError> {
        self.job.enter(Phase::Stopping);
        self.job.refuse_populates();
        let mut stop = Stop::begin(&self.job.stop, &self.job.options());
        let outcome = self.hand_over_within(&mut stop);
        outcome.map_err(|error| stop.explain(error))
    }

    fn hand_over_within(&mut self, stop: &mut Stop) -> Result<(), JobError> {
        let mut paused = PausedGuest::pause(self.job.common())?;
        let state = paused.save_state()?;
        let arrives = self.run_state_there(&state);
        self.expect_state_and_pages(stop, &state);
        self.send_state(&state)?;
        self.sync()?;
        self.expect_state_and_pages(stop, &state);
        self.run_pass()?;
        self.job.count(|counters| counters.remaining_pages = 0);
        // The discards and frees that came during the last pass.
        self.send_discards()?;
        self.send_late_frees()?;
        self.send_end(None, arrives)?;
        self.job.enter(Phase::Loading);
        wait_loaded(&self.job, &mut self.streams.primary, stop)?;
        self.job.enter(Phase::Committing);
        commit(&self.job, &mut paused, &mut self.streams.primary, SessionId::default())
    }
}
