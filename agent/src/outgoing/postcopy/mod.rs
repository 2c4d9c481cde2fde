//! Postcopy, seen from the source: the guest runs at the destination, and its memory follows.
//!
//! - [`remaining`]: what the destination is still missing when the guest stops, and telling it;
//! - [`page_sender`]: sending that, on all streams at once, until the destination has it;
//! - [`recover`]: after a lost connection;
//! - this file: the phases, and the line of `one-owner`.
//!
//! The destination may touch memory as soon as it loads the state of its devices, so what it asks
//! for is answered from before the commit on. If anything fails until then, the guest runs on here,
//! and what was sent is worth nothing. After the commit nothing but its memory is left of the guest
//! here, and it is kept until the destination has it.

pub mod page_sender;
pub mod recover;
pub mod remaining;

use super::Migration;
use super::handover::wait_loaded;
use crate::job::JobError;
use crate::job::deadline::Stop;
use crate::job::pause::PausedGuest;
use crate::memory::host_page_set::HostPageSet;
use page_sender::PostcopySource;
use pageferry_protocol::control::job::Phase;

/// How the guest comes to be moved before its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// Nothing was sent before: all that is allocated remains.
    TheStart,
    /// After passes: what is dirty remains.
    Passes,
}

impl Migration {
    /// The stopped guest goes first.
    pub(super) fn hand_over_first(&mut self, since: Since) -> Result<(), JobError> {
        self.job.enter(Phase::Stopping);
        self.job.freeze();
        let mut stop = Stop::begin(&self.job.stop, &self.job.options());
        let mut paused = PausedGuest::pause(&self.job)?;
        let missing = self
            .send_state_and_remaining(&mut paused, since, &mut stop)
            .map_err(|error| stop.explain(error))?;
        let kept = missing.try_clone()?;
        let mut supply =
            PostcopySource::new(&self.job, self.session, self.address.clone(), missing, Some(kept));
        let mut confirmed = false;
        let outcome = supply.serve(&mut self.streams, |primary| {
            supply.job.enter(Phase::Loading);
            wait_loaded(&supply.job, primary, &stop)?;
            supply.job.enter(Phase::Committing);
            paused.commit(primary, supply.session)?;
            confirmed = true;
            // ---- Past the line: whatever happens, the guest may run there, and what it lacks is
            // here.
            supply.job.enter(Phase::Postcopy);
            Ok(())
        });
        match outcome {
            Err(error) if paused.is_ours() => Err(stop.explain(error)),
            // Another stream may have been the first to see what happened, and does not know what
            // it means.
            Err(error) if !confirmed && !matches!(error, JobError::Unconfirmed { .. }) => {
                supply.recover(JobError::Unconfirmed { source: Box::new(error) })
            }
            Err(error) => supply.recover(error),
            Ok(()) => Ok(()),
        }
    }

    fn send_state_and_remaining(
        &mut self, paused: &mut PausedGuest, since: Since, stop: &mut Stop,
    ) -> Result<HostPageSet, JobError> {
        let state = paused.save_state()?;
        let arrives = self.run_state_there(&state);
        self.expect_state(stop, &state);
        self.send_state(&state)?;
        let missing = self.find_remaining(since)?;
        self.send_remaining(&missing)?;
        if since == Since::Passes {
            self.send_late_frees()?;
        }
        self.send_end(Some(missing.remaining_pages()), arrives)?;
        Ok(missing)
    }
}
