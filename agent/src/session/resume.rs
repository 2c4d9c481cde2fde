// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Resumes by force a guest that was handed over and not confirmed (`one-owner`).
//!
//! Only an operator who looked at both sides may ask for it. A paused postcopy is given up first.
//! The agent then asks the VMM, without holding the session's lock.

use super::Session;
use super::native_requests::{Answer, Success};
use super::shared::SharedSession;
use crate::hooks::Hooks;
use crate::job::{Job, RecoveryRequest};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{JobKind, Phase};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM may take to resume a guest by force. The operator waits 10 seconds for the answer
/// of the agent, and must get the VMM's reason before that.
const RESUME_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a paused job may take to end after it was told to give up.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(5);

impl SharedSession {
    /// `one-owner`: after an unconfirmed commit only an operator who looked at both sides may
    /// resume the guest.
    pub(super) fn resume(&self, force: bool) -> Answer {
        let abandoned = if force { self.lock().abandon_paused()? } else { None };
        if let Some(job) = abandoned {
            // It waits for nothing else, and is over at once.
            if !job.wait_until_final(ABANDON_TIMEOUT) {
                let sentence =
                    format!("job {} was told to give up, and is still ending: try again", job.id);
                return Err(RemoteError::new(ErrorCode::Busy, sentence));
            }
        }
        let (hooks, job) = self.lock().begin_resume(force)?;
        let asked = hooks.ask(&Hook::Resume { force, paused: false }, RESUME_TIMEOUT);
        let mut session = self.lock();
        // The VMM may be gone meanwhile, and another be here.
        if session.job.as_ref().is_some_and(|(own, _)| Arc::ptr_eq(own, &job)) {
            session.resuming = false;
            if asked.is_ok() {
                job.resumed_by_force();
                session.retire_job();
            }
        }
        asked.map_err(|error| {
            let sentence = format!(
                "the VMM did not say that the guest is resumed, and may resume it yet: {}",
                crate::error::chain(&error)
            );
            RemoteError::new(ErrorCode::Other, sentence)
        })?;
        Ok(Success::Done)
    }
}

impl Session {
    /// Checks that the guest may be resumed by force, and that nobody is about to do so already:
    /// whom to ask, and the job that handed the guest over.
    fn begin_resume(&mut self, force: bool) -> Result<(Arc<Hooks>, Arc<Job>), RemoteError> {
        // It may have been on its way to a pause.
        if force && let Some((job, _)) = &self.job {
            check_whole(job)?;
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
        let handed_over = self.job.as_ref().map(|(job, _)| job).filter(|job| {
            job.kind == JobKind::Outgoing
                && matches!(job.status().phase, Phase::Unconfirmed | Phase::Completed)
        });
        let Some(job) = handed_over.cloned() else {
            return refused("the guest was not handed over: the VMM resumes it by itself");
        };
        if job.status().phase == Phase::Completed {
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
        if std::mem::replace(&mut self.resuming, true) {
            return Err(RemoteError::new(
                ErrorCode::Busy,
                "the VMM is being asked to resume the guest already",
            ));
        }
        Ok((self.hooks.clone(), job))
    }

    /// A paused outgoing postcopy is given up, if there is one: the job, which is about to end.
    fn abandon_paused(&mut self) -> Result<Option<Arc<Job>>, RemoteError> {
        if let Some((job, _)) = &self.job {
            check_whole(job)?;
        }
        let Some(job) = self.paused().filter(|job| job.kind == JobKind::Outgoing) else {
            return Ok(None);
        };
        if !self.job.as_ref().is_some_and(|(own, _)| Arc::ptr_eq(own, &job)) {
            let sentence = format!(
                "job {} is paused, and the VMM that handed the guest over is gone: nobody can resume it here, only recover it",
                job.id
            );
            return Err(RemoteError::new(ErrorCode::State, sentence));
        }
        job.recovery.request(RecoveryRequest::Abandon);
        Ok(Some(job))
    }
}

/// Refuses to have the guest run from memory that is not whole.
fn check_whole(job: &Job) -> Result<(), RemoteError> {
    job.check_whole().map_err(|error| RemoteError::new(ErrorCode::State, error))
}
