//! Snapshots and restores are started.

use super::native_requests::Answer;
use super::{Role, Session, check_fds, invalid};
use crate::restore::RestorePlan;
use crate::restore::reset::{DiscardsSinceRequest, RecordDiscards};
use crate::snapshot::Plan;
use pageferry_protocol::control::job::{
    JobKind, OutgoingOptions, RestoreOptions, SnapshotMode, SnapshotOptions,
};
use pageferry_protocol::control::reply::{ErrorCode, JobStarted, RemoteError};
use std::os::fd::OwnedFd;

impl Session {
    /// Starts to save the guest.
    pub(super) fn start_snapshot(
        &mut self, role: Role, path: String, options: SnapshotOptions, fds: &[OwnedFd],
    ) -> Answer {
        self.check_can_start()?;
        check_fds("start snapshot", fds, 0)?;
        check_path("path", &path)?;
        if !options.base.is_empty() {
            check_path("base", &options.base)?;
        }
        if options.mode == SnapshotMode::Stopped && role == Role::Operator {
            let sentence = "mode is stopped, which only the VMM can ask for: it has stopped its guest then; paused stops it for as long as it takes";
            return Err(RemoteError::new(ErrorCode::Denied, sentence));
        }
        let without = "a snapshot with neither needs no tracker";
        if !options.base.is_empty() {
            self.check_declared("base, an increment,", without)?;
        }
        if options.track {
            self.check_declared("track", without)?;
        }
        let SnapshotOptions { bandwidth, hook_timeout, .. } = options;
        let job = OutgoingOptions { bandwidth, hook_timeout, ..OutgoingOptions::default() };
        let job = self.new_job(JobKind::Snapshot, job)?;
        let (trackers, checkpoint) = (self.trackers.clone(), self.checkpoint.clone());
        let reply = JobStarted { job: job.id, address: path.clone() };
        let plan = Plan { path: path.into(), options, trackers, checkpoint };
        self.run_job(&job, move |job| crate::snapshot::run(job, &plan))?;
        Ok(Box::new(move |encoder| reply.encode(encoder)))
    }

    /// Starts to restore a guest.
    pub(super) fn start_restore(
        &mut self, role: Role, path: &str, options: RestoreOptions, fds: &[OwnedFd],
    ) -> Answer {
        self.check_can_start()?;
        check_fds("start restore", fds, 0)?;
        check_path("path", path)?;
        if !options.working_set.is_empty() {
            check_path("working_set", &options.working_set)?;
        }
        let RestoreOptions { resume, hook_timeout, bandwidth, .. } = options;
        let given =
            OutgoingOptions { resume, hook_timeout, bandwidth, ..OutgoingOptions::default() };
        let job = self.new_job(JobKind::Restore, given)?;
        let asks_first = role == Role::Operator;
        if !asks_first {
            // The guest is not here yet, and what it will hold is not the VMM's to change.
            job.start_frozen();
        }
        let before = match asks_first {
            true => RecordDiscards::FromPause,
            false => RecordDiscards::SinceRequest(
                DiscardsSinceRequest::start(&self.memory).map_err(|error| invalid(&error))?,
            ),
        };
        let order = RestorePlan {
            path: path.into(),
            options,
            asks_first,
            record_discards: before,
            checkpoint: self.checkpoint.clone(),
        };
        self.run_job(&job, move |job| crate::restore::run(job, &order))?;
        let reply = JobStarted { job: job.id, address: path.to_owned() };
        Ok(Box::new(move |encoder| reply.encode(encoder)))
    }
}

/// Refuses a path that means one file here and another where it was written.
fn check_path(field: &str, path: &str) -> Result<(), RemoteError> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(RemoteError::new(
        ErrorCode::Invalid,
        format!("{field} is {path:?}, expected is a path from the root"),
    ))
}
