// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a running migration owns, and how that ends.

use super::OutgoingError;
use super::connect::{SessionId, Streams};
use super::converge::PassMeasurements;
use super::fixup::DirtyState;
use super::job::OutgoingJob;
use super::unannounced_frees::UnannouncedFrees;
use crate::devices::registry::AskedForFreePages;
use crate::hooks::HookError;
use crate::job::JobError;
use crate::tracking::{TrackerChoice, Trackers};
use crate::transport::{Address, TransportError};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{Mode, NonConvergence};
use std::sync::Arc;

/// Everything that a running migration owns. [`Migration::clean_up`] leaves the VMM as it was
/// before: trackers off, throttle off.
pub(super) struct Migration {
    pub(super) job: Arc<OutgoingJob>,
    pub(super) session: SessionId,
    /// The address of the destination, if it listens.
    pub(super) address: Option<Address>,
    pub(super) streams: Streams,
    pub(super) trackers: Trackers,
    pub(super) dirty: DirtyState,
    pub(super) unannounced_frees: UnannouncedFrees,
    /// Pages that are free in the guest, during pass 0.
    pub(super) free_pages: Option<AskedForFreePages>,
    pub(super) measurements: PassMeasurements,
    /// Percent by which the policy wants the guest to be throttled.
    pub(super) policy_throttle: u32,
    /// Percent by which the VMM throttles its guest.
    throttle: u32,
    /// The VMM has said that it cannot, and is not asked again.
    cannot_throttle: bool,
}

/// Refuses a policy that the VMM cannot follow. A throttle of 0 changes nothing, and a VMM that has
/// none refuses it.
pub(super) fn check_throttle(job: &OutgoingJob) -> Result<(), JobError> {
    if job.options().policy != NonConvergence::Throttle || job.options().mode == Mode::Postcopy {
        return Ok(());
    }
    match job.hooks.ask(&Hook::Throttle { percent: 0 }, job.hook_timeout) {
        Err(HookError::Refused { error, .. }) => Err(OutgoingError::NoThrottle(error).into()),
        asked => Ok(asked?),
    }
}

impl Migration {
    pub(super) fn new(
        job: &Arc<OutgoingJob>, session: SessionId, address: Option<Address>, streams: Streams,
        choice: &TrackerChoice,
    ) -> Result<Self, JobError> {
        let options = job.options();
        Ok(Self {
            job: job.clone(),
            session,
            address,
            streams,
            trackers: Trackers::new(choice, &job.hooks, options.hook_timeout, &job.stop),
            dirty: DirtyState::new(&job.memory)?,
            unannounced_frees: UnannouncedFrees::new(&job.memory, choice)?,
            free_pages: None,
            measurements: PassMeasurements::default(),
            policy_throttle: 0,
            throttle: 0,
            cannot_throttle: false,
        })
    }

    /// Asks the VMM to throttle its guest as the policy and the operator want, if that changed.
    pub(super) fn update_throttle(&mut self) -> Result<(), JobError> {
        let percent = self.policy_throttle.max(self.job.least_throttle());
        if percent == self.throttle || self.cannot_throttle {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.throttle, percent);
        match self.job.hooks.ask(&Hook::Throttle { percent }, self.job.hook_timeout) {
            Ok(()) => self.job.count(|counters| counters.throttle_percent = percent.into()),
            // The migration may converge all the same. Who watches it learns why it may not.
            Err(HookError::Refused { error, .. }) => {
                self.throttle = before;
                self.cannot_throttle = true;
                let sentence =
                    format!("the guest is not throttled, since its VMM cannot: {}", error.sentence);
                self.job.note(&sentence);
                self.job.warn(sentence);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Leaves the VMM as it was before. The guest itself is resumed by the drop of its
    /// [`PausedGuest`](crate::job::pause::PausedGuest), if it still belongs here.
    pub(super) fn clean_up(&mut self) {
        let timeout = self.job.hook_timeout;
        if std::mem::take(&mut self.throttle) != 0
            && let Err(error) = self.job.hooks.undo(&Hook::Throttle { percent: 0 }, timeout)
        {
            log::warn!("the guest stays throttled: {}", crate::error::chain(&error));
        }
        self.trackers.stop();
        self.free_pages = None;
    }

    /// Chooses the error to report: if the peer failed, it sent its reason before it closed.
    pub(super) fn explain(&mut self, error: JobError) -> JobError {
        match &error {
            // A peer that was silent for so long has sent nothing that could still arrive.
            JobError::Transport(
                TransportError::Silent(_) | TransportError::RecordTimeout { .. },
            ) => error,
            JobError::Transport(_) if !self.job.cancel.is_cancelled() => {
                self.streams.primary.read_error().map_or(error, JobError::Peer)
            }
            JobError::Unconfirmed { .. }
            | JobError::Stranded { .. }
            | JobError::Peer(_)
            | JobError::Cancelled => error,
            _ => {
                self.streams.send_error(&error.to_remote());
                error
            }
        }
    }
}
