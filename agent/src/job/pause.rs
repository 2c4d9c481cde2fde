// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that a job has paused, and the VMM's state that is saved meanwhile.
//!
//! [`PausedGuest::pause`] has the VMM pause the guest. The guest stays paused until
//! [`PausedGuest::resume`] or the drop, so a job that fails resumes it, too. If the guest was
//! handed over, it is not resumed here ([`one-owner`](crate::invariants#one-owner)).
//!
//! A guest that its operator had paused before stays paused afterwards. The VMM keeps that run
//! state, so a resume hook only asks for the state before the pause.
//!
//! If the VMM does not answer the resume hook, the request is still in its socket, and the log says
//! that the VMM is late.

use super::{Job, JobError, micros};
use crate::devices::state_pieces;
use crate::hooks::HookError;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply;
use pageferry_protocol::control::job::RunState;
use pageferry_protocol::control::state_pieces::PieceSize;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// The resume hook for a guest that never left its VMM. The VMM gives it the run state that it had
/// before the pause.
const RESUME: Hook = Hook::Resume { force: false, paused: false };

/// The VMM's state as the save hook returns it.
pub struct SavedState {
    /// The run state of the guest before the job paused it.
    pub guest: RunState,
    /// Names and lengths of the pieces.
    pub pieces: Vec<PieceSize>,
    /// The file with the pieces, one after another; may be `None` if all are empty.
    pub file: Option<OwnedFd>,
}

impl SavedState {
    /// Has the VMM save its state. That may dirty memory, so the last sync must come after it.
    pub fn of(job: &Job) -> Result<Self, JobError> {
        let (hook_reply::SavedState { guest, pieces }, file) =
            job.hooks.save_state(job.hook_timeout_in_stop())?;
        job.set_guest_state(guest);
        let mut pieces = pieces;
        let file = state_pieces::add(&job.devices, &mut pieces, file)
            .map_err(JobError::from_io("keep the state of the devices"))?;
        Ok(Self { guest, pieces, file })
    }
}

/// A guest whose VMM was asked to pause it. The drop resumes it, unless it was handed over: if a
/// job fails at any step, the guest continues as before.
pub struct PausedGuest {
    job: Arc<Job>,
    /// When the VMM was asked to pause the guest.
    asked: Instant,
    /// The run state of the guest before the pause. Counts as running until the state is saved.
    before: RunState,
    /// True while the drop must resume the guest here. False once a commit may have been sent, or
    /// the guest runs.
    ours: bool,
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
        // This exists before the VMM answers: if the hook times out, the VMM may still pause the
        // guest, and the drop must undo that.
        let (asked, before) = (Instant::now(), RunState::Running);
        let paused = Self { job: job.clone(), asked, before, ours: true };
        job.hooks.ask(&Hook::Pause, job.hook_timeout_in_stop())?;
        job.cancel.check()?;
        Ok(paused)
    }

    /// As [`SavedState::of`].
    pub fn save_state(&mut self) -> Result<SavedState, JobError> {
        let saved = SavedState::of(&self.job)?;
        self.before = saved.guest;
        Ok(saved)
    }

    /// Counts the downtime. A guest that its operator had paused before the job has none.
    pub(crate) fn count_downtime(&self) {
        if !self.before.is_paused() {
            self.job.count(|counters| counters.downtime_us = micros(self.asked.elapsed()));
        }
    }

    /// Records that a commit may be sent from now on. The guest is never resumed here again.
    pub fn give_up(&mut self) {
        self.ours = false;
    }

    /// True while the guest can be resumed here: no commit was sent.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// Resumes the guest with the run state that it had before, and counts the downtime.
    ///
    /// # Errors
    /// If the VMM does not resume the guest. Then the drop has asked the VMM a second time.
    pub fn resume(mut self) -> Result<(), JobError> {
        self.job.hooks.ask(&RESUME, self.job.hook_timeout)?;
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
        return_guest(&self.job, &format!("the guest is {} as before", self.before.name()));
    }
}

/// Has the VMM bring its own guest back into the run state that it had before this job. `done` says
/// so in words.
pub(super) fn return_guest(job: &Job, done: &str) {
    let undone = job.hooks.undo(&RESUME, job.hook_timeout);
    if undone.is_err() {
        job.set_guest_uncertain();
    }
    match undone {
        Ok(()) => log::info!("job {}: {done}", job.id),
        // The request is in the socket: a VMM that is late resumes the guest when it reads the
        // request. A VMM that has lost this agent resumes the guest by itself.
        Err(error @ (HookError::Late { .. } | HookError::Socket { .. })) => {
            let why = crate::error::chain(&error);
            log::warn!("the VMM was asked to resume the guest, but is late: {why}")
        }
        Err(error) => {
            log::error!("the VMM did not resume the guest: {}", crate::error::chain(&error))
        }
    }
}
