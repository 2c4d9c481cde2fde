// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Postcopy at the source: the guest runs at the destination, and its memory follows.
//!
//! - [`remaining`]: finds the pages that remain when the guest stops, and announces them;
//! - [`page_sender`]: sends these pages on all streams until the destination has all of them;
//! - [`recover`]: sends the rest after a lost connection;
//! - this file: the phases, and the commit point ([`one-owner`](crate::invariants#one-owner)).
//!
//! 1. The guest is paused. The source sends its state and announces the pages that remain.
//! 2. The source answers requests. This begins before the commit, because the destination's VMM may
//!    touch memory while it loads the state of its devices.
//! 3. The destination has loaded the state. The source commits.
//! 4. The source pushes the remaining pages, and keeps its memory until the destination has all.
//!
//! If anything fails before the commit, the guest continues here, and what was sent is of no use.
//! After the commit only the guest's memory is left here. If a connection breaks then, the job is
//! paused until somebody recovers it.

pub mod page_sender;
pub mod recover;
pub mod remaining;

use super::handover::{commit, wait_loaded};
use super::migration::Migration;
use super::stop::Stop;
use crate::job::JobError;
use crate::job::pause::PausedGuest;
use crate::memory::host_page_set::HostPageSet;
use page_sender::PostcopySource;
use pageferry_protocol::control::job::Phase;
use remaining::AlreadySent;

impl Migration {
    /// Hands the stopped guest over before the rest of its memory.
    pub(super) fn run_postcopy(&mut self, since: AlreadySent) -> Result<(), JobError> {
        self.job.enter(Phase::Stopping);
        self.job.refuse_populates();
        let mut stop = Stop::begin(&self.job.stop, &self.job.options());
        let mut paused = PausedGuest::pause(self.job.common())?;
        let missing = self
            .send_state_and_remaining(&mut paused, since, &mut stop)
            .map_err(|error| stop.explain(error))?;
        let kept = missing.try_clone()?;
        let destination = (self.session, self.streams.peer());
        let mut source =
            PostcopySource::new(&self.job, destination, self.address.clone(), missing, Some(kept));
        let mut confirmed = false;
        let outcome = source.serve(&mut self.streams, |primary| {
            source.job.enter(Phase::Loading);
            wait_loaded(&source.job, primary, &stop)?;
            source.job.enter(Phase::Committing);
            commit(&source.job, &mut paused, primary, source.session)?;
            confirmed = true;
            // ---- Past the commit point: the guest may run at the destination, and its missing
            // pages are here.
            source.job.enter(Phase::Postcopy);
            Ok(())
        });
        match outcome {
            Err(error) if paused.is_ours() => Err(stop.explain(error)),
            // The commit was sent and not confirmed. Another stream may have failed first, and
            // its error does not say that.
            Err(error) if !confirmed && !matches!(error, JobError::Unconfirmed { .. }) => {
                source.recover(JobError::Unconfirmed { source: Box::new(error) })
            }
            Err(error) => source.recover(error),
            Ok(()) => Ok(()),
        }
    }

    fn send_state_and_remaining(
        &mut self, paused: &mut PausedGuest, since: AlreadySent, stop: &mut Stop,
    ) -> Result<HostPageSet, JobError> {
        let state = paused.save_state()?;
        let arrives = self.run_state_there(&state);
        self.expect_state(stop, &state);
        self.send_state(&state)?;
        let missing = self.find_remaining(since)?;
        self.send_remaining(&missing)?;
        if since == AlreadySent::Passes {
            self.send_late_frees()?;
        }
        self.send_end(Some(missing.remaining_pages()), arrives)?;
        Ok(missing)
    }
}
