//! A guest from an image.
//!
//! - [`source`]: the image, and which of its blocks goes into which of the VMM's;
//! - [`reset`]: the memory before anything is in it, and again if it comes to nothing;
//! - [`eager`]: all memory first, then the guest;
//! - [`lazy`]: the guest first, and its memory behind it;
//! - [`lazy_restore`]: reading and placing what is missing, for all threads of a lazy restore;
//! - [`fault_reads`]: what the guest waits for;
//! - [`prefetch`]: what nobody waits for yet;
//! - [`working_set`]: what a guest touched first, for the next time;
//! - this file: the phases, and the line after which the guest runs.
//!
//! Nothing is touched before the image is known to be whole, as far as that can be told without its
//! pages, and of the same blocks. What is read of it is checked before it is placed. What fails
//! before the guest runs leaves the memory empty, so that the next attempt starts clean; the image
//! is never written to.

pub mod eager;
pub mod fault_reads;
pub mod lazy;
pub mod lazy_restore;
pub mod prefetch;
pub mod reset;
pub mod source;
pub mod working_set;

use crate::hooks::state_file_of;
use crate::image::Image;
use crate::job::{Job, JobError, micros};
use crate::snapshot::checkpoint::SharedCheckpoint;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{
    Phase, RestoreMode, RestoreOptions, ResumePolicy, RunState,
};
use pageferry_protocol::control::state_pieces::PieceSize;
use reset::{DiscardsSinceRequest, RecordDiscards, ResetGuard};
use source::Source;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

pub use source::RestoreError;

/// What is to be restored, and how.
#[derive(Debug)]
pub struct RestorePlan {
    /// The image.
    pub path: PathBuf,
    /// How.
    pub options: RestoreOptions,
    /// Somebody else than the VMM wants it, and the VMM is asked first.
    pub asks_first: bool,
    /// From when on discards are of the memory that is restored.
    pub record_discards: RecordDiscards,
    /// What is known of changes since the last image: nothing any more, once memory is another.
    pub checkpoint: SharedCheckpoint,
}

/// Restores a guest, and ends the job.
pub fn run(job: &Arc<Job>, order: &RestorePlan) {
    let outcome = restore(job, order);
    job.finish(outcome);
}

fn restore(job: &Arc<Job>, order: &RestorePlan) -> Result<(), JobError> {
    job.enter(Phase::Preparing);
    let source = Source::open(&order.path, &job.memory)?;
    if let Some(block) = job.memory.blocks().iter().find(|block| !block.backing.is_writable()) {
        return Err(JobError::Sealed { id: block.geometry.id });
    }
    let state = VmmState::read(source.newest(), order.options.resume)?;
    job.set_guest_state(state.guest);
    let plan = match order.options.mode {
        RestoreMode::Eager => None,
        RestoreMode::Lazy => Some(lazy::plan(job, &source, &order.options)?),
    };
    // Not for what comes to nothing, as far as that can be told before: the VMM gives its guest up
    // for it.
    if order.asks_first {
        ask_vmm(job, order)?;
    }
    order.checkpoint.end("a guest was restored");
    order.checkpoint.stop_idle();
    let later;
    let word = match &order.record_discards {
        RecordDiscards::SinceRequest(word) => word,
        RecordDiscards::FromPause => {
            later = DiscardsSinceRequest::start(&job.memory)?;
            &later
        }
    };
    let ground = ResetGuard::reset(job, &source, word)?;
    match plan {
        None => eager::restore(job, &source, &state, ground, order.options.workers),
        Some(plan) => lazy::restore(job, &source, &state, ground, plan, order.options.workers),
    }
}

/// The VMM may have a guest that it does not want to lose.
fn ask_vmm(job: &Job, order: &RestorePlan) -> Result<(), JobError> {
    let path = order.path.to_string_lossy().into_owned();
    job.hooks.ask(&Hook::PrepareRestore { path }, job.options().hook_timeout)?;
    job.cancel.check()?;
    // It has no guest any more. What its memory will hold is not its own to change.
    job.freeze();
    Ok(())
}

/// The state that the VMM will be given: read, and found to be whole, before its memory is touched.
#[derive(Debug)]
pub struct VmmState {
    /// What the guest is to be once it is here.
    guest: RunState,
    pieces: Vec<PieceSize>,
    file: OwnedFd,
}

impl VmmState {
    fn read(image: &Image, resume: ResumePolicy) -> Result<Self, JobError> {
        let bytes = image.state()?;
        let file = state_file_of([bytes.as_slice()]);
        let file = file.map_err(|errno| JobError::Io {
            what: "make a file of the state",
            source: errno.into(),
        })?;
        let guest = resume.apply(image.header().guest);
        Ok(Self { guest, pieces: image.contents().pieces.clone(), file })
    }

    /// Gives it to the VMM.
    fn load(&self, job: &Job) -> Result<(), JobError> {
        job.enter(Phase::Loading);
        let hook = Hook::LoadState { pieces: self.pieces.clone() };
        job.hooks.ask_with(&hook, &[self.file.as_fd()], job.options().hook_timeout)?;
        Ok(())
    }
}

/// Lets the guest run, or stay paused as `guest` says. `ours` becomes true at the line: from then
/// on it may run, even if the VMM does not say so, or not in time.
fn resume_guest(job: &Job, guest: RunState, ours: &mut bool) -> Result<(), JobError> {
    // ---- The line: it is not cancelled any more, and its memory is its own.
    job.cancel.commit_point()?;
    *ours = true;
    // It may use its memory from the moment on that it runs.
    job.thaw();
    let resume = Hook::Resume { force: false, paused: guest.is_paused() };
    // An operator who reads that the job failed must not take the guest for one that is not there.
    let resumed = job.hooks.ask(&resume, job.options().hook_timeout);
    resumed.map_err(|source| JobError::NotResumed { source })?;
    let running = micros(job.elapsed());
    job.count(|counters| counters.running_us = running);
    Ok(())
}

#[cfg(test)]
mod tests;
