// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restoring a guest from an image.
//!
//! - [`source`]: the image and its base images, and which image block goes into which VMM block;
//! - [`reset`]: makes the memory empty before a restore, and again after a restore that failed;
//! - [`bases`]: the bases of clones;
//! - [`eager`]: places all memory, then the guest runs;
//! - [`lazy`]: the guest runs first, and its memory is placed while it runs;
//! - [`lazy_restore`]: starts the threads of a lazy restore, follows them and ends them;
//! - [`fault_reads`]: the threads that read the pages that the guest waits for;
//! - [`prefetch`]: the threads that read the pages that the guest does not wait for yet;
//! - [`image_pages`]: how such a thread reads and places missing pages;
//! - [`queues`]: hands work to the threads of a lazy restore;
//! - [`working_set`]: records which pages the guest touched first, for the next restore;
//! - [`error`]: why a restore is refused;
//! - this file: the phases, and the commit point after which the guest runs.
//!
//! The agent opens the image and checks everything except the pages, and it compares the blocks of
//! the image with those of the VMM. Only then does it change memory. It checks each page that it
//! reads before it places it. If the restore fails before the guest runs, the memory is made empty
//! again, so that the next attempt starts clean. The agent never writes to the image.

pub mod bases;
pub mod eager;
pub mod error;
pub mod fault_reads;
pub mod image_pages;
pub mod lazy;
pub mod lazy_restore;
pub mod prefetch;
pub mod queues;
pub mod reset;
pub mod source;
pub mod working_set;

use crate::devices::state_pieces;
use crate::image::Image;
use crate::job::consent::GivenUpGuest;
use crate::job::{Job, JobError, micros};
use crate::tracking::checkpoint::SharedCheckpoint;
use bases::Bases;
use pageferry_protocol::control::hook::{GuestOrigin, Hook};
use pageferry_protocol::control::job::{
    Phase, Placing, RestoreMode, RestoreOptions, ResumePolicy, RunState,
};
use pageferry_protocol::control::state_pieces::PieceSize;
use reset::{DiscardsSinceRequest, RecordDiscards, ResetGuard};
use source::Source;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

pub use error::RestoreError;

/// What to restore, and how.
#[derive(Debug)]
pub struct RestorePlan {
    /// The image to restore from.
    pub path: PathBuf,
    /// The options of the request.
    pub options: RestoreOptions,
    /// An operator asked for the restore, not the VMM. The agent asks the VMM before it starts.
    pub needs_vmm_consent: bool,
    /// From which moment on a discard is about the memory that is being restored.
    pub record_discards: RecordDiscards,
    /// The changes since the last image. The restore ends this record, since it replaces the
    /// memory.
    pub checkpoint: SharedCheckpoint,
}

/// Restores a guest and ends the job.
pub fn run(job: &Arc<Job>, order: &RestorePlan) {
    let outcome = restore(job, order);
    job.finish(outcome);
}

fn restore(job: &Arc<Job>, order: &RestorePlan) -> Result<(), JobError> {
    job.enter(Phase::Preparing);
    let source = Source::open(&order.path, &job.memory, job.image_key.as_ref())?;
    source.limit(&job.limiter);
    let bases = Bases::of(&order.options, &job.memory, &source, false)?;
    let state = VmmState::read(source.newest(), order.options.resume)?;
    job.set_guest_state(state.guest);
    let plan = match order.options.mode {
        RestoreMode::Eager => None,
        RestoreMode::Lazy => Some(lazy::plan(job, &source, &order.options)?),
    };
    let path = || order.path.to_string_lossy().into_owned();
    let given_up = match order.needs_vmm_consent {
        true => Some(GivenUpGuest::ask(job, GuestOrigin::Image { path: path() })?),
        false => None,
    };
    // No tracker sees what the job writes.
    order.checkpoint.end("a restore was started");
    order.checkpoint.stop_idle();
    let started;
    let discards = match &order.record_discards {
        RecordDiscards::SinceRequest(discards) => discards,
        RecordDiscards::FromPause => {
            started = DiscardsSinceRequest::start(&job.memory)?;
            &started
        }
    };
    if let Some(own) = given_up {
        own.replace();
    }
    let guard = ResetGuard::reset(job, &source, discards)?;
    match plan {
        None => eager::restore(job, &source, &state, guard, &order.options),
        Some(plan) => {
            job.placing.uses(Placing::Pages);
            job.placing.explain("the guest runs before its memory is there".into());
            let from = (&source, bases, order.path.as_path());
            lazy::restore(job, from, &state, guard, plan, &order.options)
        }
    }
}

/// The state for the VMM. The agent reads and checks all of it before it changes memory.
#[derive(Debug)]
pub struct VmmState {
    /// The run state that the guest will have after the restore.
    guest: RunState,
    pieces: Vec<PieceSize>,
    file: OwnedFd,
}

impl VmmState {
    fn read(image: &Image, resume: ResumePolicy) -> Result<Self, JobError> {
        let file = image.state_file()?;
        let guest = resume.apply(image.header().guest);
        Ok(Self { guest, pieces: image.contents().pieces.clone(), file })
    }

    /// Gives the state to the VMM.
    fn load(&self, job: &Job) -> Result<(), JobError> {
        job.enter(Phase::Loading);
        let mut pieces = self.pieces.clone();
        let lost = state_pieces::take(&job.devices, &mut pieces, self.file.as_fd())
            .map_err(JobError::from_io("load the state of the agent's devices"))?;
        if let Some(lost) = lost {
            job.warn(lost);
        }
        let hook = Hook::LoadState { pieces };
        job.hooks.ask_with(&hook, &[self.file.as_fd()], job.hook_timeout)?;
        Ok(())
    }
}

/// Resumes the guest, or leaves it paused, as `guest` says. Sets `ours` at the commit point: from
/// then on the guest may run, even if the VMM fails to answer or answers late.
fn resume_guest(job: &Job, guest: RunState, ours: &mut bool) -> Result<(), JobError> {
    // ---- The commit point: the job cannot be cancelled any more, and the memory is the
    // guest's.
    job.cancel.commit_point()?;
    *ours = true;
    // The guest may populate memory as soon as it runs.
    job.allow_populates();
    let resume = Hook::Resume { force: false, paused: guest.is_paused() };
    // The error says that the guest is here: "failed" alone would let an operator believe that
    // there is no guest.
    let resumed = job.hooks.ask(&resume, job.hook_timeout);
    resumed.map_err(|source| JobError::NotResumed { source })?;
    let running = micros(job.elapsed());
    job.count(|counters| counters.time_to_run_us = running);
    Ok(())
}

#[cfg(test)]
mod tests;
