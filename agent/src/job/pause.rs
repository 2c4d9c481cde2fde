//! The guest is paused, for as long as somebody holds it. A guest that its operator had paused
//! before stays so afterwards: its VMM knows that, whatever this process knows.

use super::{Job, JobError, micros};
use crate::hooks::HookError;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// The guest never left: its VMM knows what it goes back to.
const RESUME_TIMEOUT: Hook = Hook::Resume { force: false, paused: false };

/// The VMM's state as it hands it over: sizes, and the file.
pub struct SavedState {
    /// What the guest was before the job paused it.
    pub guest: RunState,
    /// Names and lengths of the pieces.
    pub pieces: Vec<PieceSize>,
    /// The pieces one after another; none if they are empty.
    pub file: Option<OwnedFd>,
}

impl SavedState {
    /// Has the VMM save its state. That may dirty memory, so the last sync comes after.
    pub fn of(job: &Job) -> Result<Self, JobError> {
        let (hook_reply::SavedState { guest, pieces }, file) =
            job.hooks.save_state(job.hook_timeout())?;
        job.set_guest_state(guest);
        Ok(Self { guest, pieces, file })
    }
}

/// A guest that was asked to pause. It is resumed on drop, unless it was handed over: whatever
/// fails on the way, the guest goes on as before.
pub struct PausedGuest {
    pub(crate) job: Arc<Job>,
    pub(crate) asked: Instant,
    /// What it was before; not known until its state is saved.
    before: RunState,
    /// It is to be resumed here. False once a commit may have gone out, or it runs.
    pub(crate) ours: bool,
}

impl SavedState {
    /// Bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.length).sum()
    }
}

impl PausedGuest {
    /// Pauses the guest.
    pub fn pause(job: &Arc<Job>) -> Result<Self, JobError> {
        // Made before the answer: a pause that timed out may still happen, and must be undone.
        let (asked, before) = (Instant::now(), RunState::Running);
        let paused = Self { job: job.clone(), asked, before, ours: true };
        job.hooks.ask(&Hook::Pause, job.hook_timeout())?;
        job.cancel.check()?;
        Ok(paused)
    }

    /// As [`SavedState::of`].
    pub fn save_state(&mut self) -> Result<SavedState, JobError> {
        let saved = SavedState::of(&self.job)?;
        self.before = saved.guest;
        Ok(saved)
    }

    /// Counts how long the guest was paused. A guest that was paused before has lost no time.
    pub(crate) fn count_downtime(&self) {
        if !self.before.is_paused() {
            self.job.count(|counters| counters.downtime_us = micros(self.asked.elapsed()));
        }
    }

    /// True until the commit may have gone out: the guest can be resumed here.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// Lets it go on as before, and counts how long it was paused.
    ///
    /// # Errors
    /// If the VMM does not resume it. It was asked to once more then.
    pub fn resume(mut self) -> Result<(), JobError> {
        self.job.hooks.ask(&RESUME_TIMEOUT, self.job.options().hook_timeout)?;
        self.ours = false;
        self.count_downtime();
        Ok(())
    }
}

impl Drop for PausedGuest {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        match self.job.hooks.undo(&RESUME_TIMEOUT, self.job.options().hook_timeout) {
            Ok(()) => {
                log::info!("job {}: the guest is {} as before", self.job.id, self.before.name())
            }
            // The request is in the socket: a VMM that is late resumes the guest when it comes to
            // it, one that lost us does so by itself.
            Err(HookError::Socket { source, .. }) => {
                log::warn!("the VMM was asked to resume the guest, and is late: {source}")
            }
            Err(error) => {
                log::error!("the VMM did not resume the guest: {}", crate::error::chain(&error))
            }
        }
    }
}
