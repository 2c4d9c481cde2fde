// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Resume for an operator.
//!
//! A guest that a job has left paused here (`--resume never`) belongs to this VMM, so any operator
//! may resume it.
//!
//! A guest that was handed over may be resumed by force, if the destination did not confirm that it
//! runs there ([`one-owner`](crate::invariants#one-owner)). The agent cannot know whether the guest
//! runs at the destination. So only an operator may decide, who has looked at both sides. The
//! steps:
//!
//! 1. A paused postcopy is abandoned, and the agent waits for its end (`ABANDON_TIMEOUT`).
//! 2. The agent checks that the guest is left paused or the job unconfirmed, and that no other
//!    request is resuming the guest.
//! 3. The agent asks the VMM to resume the guest, without holding the session's lock, and waits for
//!    the answer (`RESUME_TIMEOUT`).
//!
//! If the VMM does not answer in time, the operator gets an error, and the VMM may still resume the
//! guest later.

use super::Session;
use super::native_requests::{Answer, Success};
use super::session_job::SessionJob;
use super::shared::SharedSession;
use crate::hooks::Hooks;
use crate::job::RecoveryRequest;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{JobKind, Phase};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM may take to resume a guest by force. The operator's command waits 10 seconds for
/// the agent, and must get the VMM's error before that.
const RESUME_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a paused job may take to end after it was abandoned.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(5);

impl SharedSession {
    /// Has the VMM resume a guest that was left paused here, or, with `force`, one that was handed
    /// over; see the header.
    pub(super) fn resume(&self, force: bool) -> Answer {
        let abandoned = if force { self.lock().abandon_paused()? } else { None };
        if let Some(job) = abandoned {
            // A paused job waits for nothing but this request, so it ends at once.
            if !job.wait_until_final(ABANDON_TIMEOUT) {
                let sentence =
                    format!("job {} was abandoned, and has not ended yet: try again", job.id);
                return Err(RemoteError::new(ErrorCode::Busy, sentence));
            }
        }
        let (hooks, job) = self.lock().begin_resume(force)?;
        // Forced in both cases: no job has paused the guest, so the VMM has nothing to undo.
        let asked = hooks.ask(&Hook::Resume { force: true, paused: false }, RESUME_TIMEOUT);
        let mut session = self.lock();
        // The VMM may be gone meanwhile, and the session may be that of the next one.
        if session.job.as_ref().is_some_and(|(own, _)| own.is(&job)) {
            session.resuming = false;
            if asked.is_ok() && was_handed_over(&job) {
                job.set_resumed_by_force();
                session.retire_job();
            } else if asked.is_ok() {
                session.left_paused = false;
                job.set_resumed();
            }
        }
        asked.map_err(|error| {
            let sentence = format!(
                "the VMM did not confirm that it has resumed the guest, and may still resume it: {}",
                crate::error::chain(&error)
            );
            RemoteError::new(ErrorCode::Other, sentence)
        })?;
        Ok(Success::Done)
    }
}

impl Session {
    /// Checks that the guest may be resumed, and that no other request is resuming it. Returns the
    /// hooks of the VMM, and the last job.
    fn begin_resume(&mut self, force: bool) -> Result<(Arc<Hooks>, SessionJob), RemoteError> {
        // Checked again: if the job was not paused at the first check, it may have released pages
        // since then.
        if force && let Some((job, _)) = &self.job {
            check_complete(job)?;
        }
        if let Some(job) = self.paused().filter(|_| !force) {
            let sentence = format!(
                "job {} is paused in postcopy: recover it; if its destination is gone for good, resume by force, \
                 after the steps of docs/postcopy.md, \"When the source is unconfirmed\"",
                job.id
            );
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        self.check_idle("the guest cannot be resumed")?;
        let refused = |sentence: &str| Err(RemoteError::new(ErrorCode::State, sentence));
        let last = self.job.as_ref().map(|(job, _)| job.clone());
        let is_left_paused = self.has_left_paused();
        let Some(job) = last.filter(|job| is_left_paused || was_handed_over(job)) else {
            return refused(
                "the guest was not handed over, and no job of this agent has left it paused: if it is paused, its VMM resumes it \
                 (QEMU by `cont` in a monitor)",
            );
        };
        if is_left_paused {
            return self.claim_resume(job);
        }
        if job.phase() == Phase::Completed {
            return refused(
                "the destination has confirmed that the guest is there, so it is not resumed here, also not by force; \
                 if that host is lost for good the VMM can take the guest back by itself (Client::take_by_force)",
            );
        }
        if !force {
            return refused(
                "ownership of the guest was handed over: force is needed, and it must not run at the destination",
            );
        }
        self.claim_resume(job)
    }

    /// Makes this request the only one that is resuming the guest.
    fn claim_resume(&mut self, job: SessionJob) -> Result<(Arc<Hooks>, SessionJob), RemoteError> {
        if std::mem::replace(&mut self.resuming, true) {
            return Err(RemoteError::new(
                ErrorCode::Busy,
                "another request is resuming the guest already",
            ));
        }
        Ok((self.hooks.clone(), job))
    }

    /// True if a job has brought a guest here and left it paused, and no later one has taken it
    /// away.
    pub(super) fn has_left_paused(&self) -> bool {
        match &self.job {
            Some((job, _)) => {
                job.has_left_guest_paused() || (self.left_paused && job.has_kept_guest())
            }
            None => false,
        }
    }

    /// Abandons a paused outgoing postcopy. Returns its job, which is about to end; `None` if there
    /// is no such job.
    fn abandon_paused(&mut self) -> Result<Option<SessionJob>, RemoteError> {
        if let Some((job, _)) = &self.job {
            check_complete(job)?;
        }
        let Some(job) = self.paused() else { return Ok(None) };
        let Some(outgoing) = job.outgoing() else { return Ok(None) };
        if !self.job.as_ref().is_some_and(|(own, _)| own.is(&job)) {
            let sentence = format!(
                "job {} is paused, and the VMM that handed the guest over is gone: \
                 the guest cannot be resumed here, the job can only be recovered",
                job.id
            );
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        outgoing.recovery.request(RecoveryRequest::Abandon);
        Ok(Some(job))
    }
}

/// True if this job has handed the guest over.
fn was_handed_over(job: &SessionJob) -> bool {
    job.kind == JobKind::Outgoing && matches!(job.phase(), Phase::Unconfirmed | Phase::Completed)
}

/// Refuses to resume the guest if a part of its memory was released here.
fn check_complete(job: &SessionJob) -> Result<(), RemoteError> {
    let checked = job.outgoing().map_or(Ok(()), |job| job.check_complete());
    checked.map_err(|released| RemoteError::new(ErrorCode::State, released))
}
