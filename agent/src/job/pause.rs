//! The guest stands still, for as long as somebody holds it.

use super::{Job, JobError, micros};
use crate::hooks::HookError;
use pageferry_protocol::control::hook::{Hook, PieceSize};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// The VMM's state as it hands it over: sizes, and the file.
pub struct SavedState {
    /// Names and lengths of the pieces.
    pub pieces: Vec<PieceSize>,
    /// The pieces one after another; none if they are empty.
    pub file: Option<OwnedFd>,
}

/// A guest that was asked to pause. It is resumed on drop, unless it was handed over: whatever fails on the way, the guest runs on.
pub struct PausedGuest {
    pub(crate) job: Arc<Job>,
    pub(crate) asked: Instant,
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
        let paused = Self { job: job.clone(), asked: Instant::now(), ours: true };
        job.hooks.ask(&Hook::Pause, job.hook_timeout())?;
        job.cancel.check()?;
        Ok(paused)
    }

    /// Has the VMM save its state. That may dirty memory, so the last sync comes after.
    pub fn save_state(&self) -> Result<SavedState, JobError> {
        let (pieces, file) = self.job.hooks.save_state(self.job.hook_timeout())?;
        Ok(SavedState { pieces, file })
    }

    /// True until the commit may have gone out: the guest can be resumed here.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// Lets it run on, and counts how long it stood still.
    ///
    /// # Errors
    /// If the VMM does not resume it. It was asked to once more then.
    pub fn resume(mut self) -> Result<(), JobError> {
        self.job.hooks.ask(&Hook::Resume { force: false }, self.job.options().hook_timeout)?;
        self.ours = false;
        self.job.count(|counters| counters.downtime_us = micros(self.asked.elapsed()));
        Ok(())
    }
}

impl Drop for PausedGuest {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        match self.job.hooks.undo(&Hook::Resume { force: false }, self.job.options().hook_timeout) {
            Ok(()) => log::info!("job {}: the guest runs on", self.job.id),
            // The request is in the socket: a VMM that is late resumes the guest when it comes to it, one that lost us does so by itself.
            Err(HookError::Socket { source, .. }) => {
                log::warn!("the VMM was asked to resume the guest, and is late: {source}")
            }
            Err(error) => log::error!("the VMM did not resume the guest: {}", crate::error::chain(&error)),
        }
    }
}
