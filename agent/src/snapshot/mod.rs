// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots: save a guest as it was at one instant, in an image.
//!
//! - [`changes`]: what has changed since the last image, for increments;
//! - [`prepare`]: what is done before the instant, so that the guest is paused for a shorter time;
//! - [`protect`]: write protection, set before the instant as far as possible;
//! - [`watch_state`]: what the fault thread and the job's thread share;
//! - [`protect_ordering`]: the order of "protect a page" and "note that it is protected";
//! - [`point_in_time`]: the instant, which decides which pages are saved;
//! - [`write_faults`]: captures pages that the guest is about to write to;
//! - [`sweep`]: captures all other pages;
//! - [`image_sink`]: an image takes what copy-before-write captures;
//! - [`upload_progress`]: how far the upload to a store is;
//! - [`error`]: why a snapshot is not made;
//! - this file: the phases.
//!
//! [`crate::memory::copy_before_write`] has the rules for who reads which page when.

pub mod changes;
pub mod error;
pub mod image_sink;
pub mod point_in_time;
pub mod prepare;
pub mod protect;
pub mod protect_ordering;
pub mod sweep;
pub mod upload_progress;
pub mod watch_state;
pub mod write_faults;

pub use error::SnapshotError;

use crate::image::blocks::compare;
use crate::image::chain::{MAX_IMAGES, lineage, name_of_base};
use crate::image::writer::{Base, ImageMetadata};
use crate::image::{ImageFault, ImageWriter};
use crate::job::pause::{PausedGuest, SavedState};
use crate::job::{Job, JobError, add};
use crate::store;
use crate::tracking::checkpoint::SharedCheckpoint;
use crate::tracking::{DirtyPages, TrackerChoice};
use changes::Changes;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::job::{Phase, SnapshotMode, SnapshotOptions};
use point_in_time::PointInTime;
use prepare::Prepared;
use protect::WriteWatch;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What to save, and how.
#[derive(Debug)]
pub struct SnapshotPlan {
    /// The path of the image.
    pub path: PathBuf,
    /// The options of the request.
    pub options: SnapshotOptions,
    /// The trackers that report writes.
    pub trackers: TrackerChoice,
    /// What is known about changes since the last image.
    pub checkpoint: SharedCheckpoint,
}

/// The result of the capture.
struct Saved {
    state: SavedState,
    instant: PointInTime,
}

/// Saves the guest of `job`, and ends the job.
pub fn run(job: &Arc<Job>, plan: &SnapshotPlan) {
    let outcome = save(job, plan);
    job.finish(outcome);
}

fn save(job: &Arc<Job>, plan: &SnapshotPlan) -> Result<(), JobError> {
    job.enter(Phase::Preparing);
    if plan.options.mode == SnapshotMode::Background {
        WriteWatch::check_memory(job, plan.trackers.declared)?;
    }
    if let Some(id) = job.memory.block_of_file(&plan.path) {
        return Err(ImageFault::IsGuestMemory { id }.of(&plan.path).into());
    }
    let base = find_base(job, plan)?;
    let SnapshotOptions { track, replace, cached, .. } = plan.options;
    let (table, key) = (job.memory.table(), job.image_key.as_ref());
    let writer = ImageWriter::create_with(&plan.path, table, replace, cached, key)?;
    let writer = Arc::new(writer);
    let mut changes = Changes::begin(job, &plan.checkpoint, &plan.trackers, base.id, track)?;
    let captured = capture(job, plan, &writer, &mut changes);
    // The watch of writes, if there was one, ended with it.
    changes.resume();
    let outcome = captured.and_then(|saved| finish(job, &writer, &saved, &changes, &base));
    changes.finish(outcome.is_ok().then(|| writer.id()));
    outcome
}

/// The image on which an increment builds. A full image gets a base without an id.
fn find_base(job: &Job, plan: &SnapshotPlan) -> Result<Base, JobError> {
    if plan.options.base.is_empty() {
        return Ok(Base::default());
    }
    let path = Path::new(&plan.options.base);
    let images = lineage(path, job.image_key.as_ref())?;
    let refused = |fault: ImageFault| JobError::from(fault.of(&plan.path));
    if images.len() >= MAX_IMAGES {
        return Err(refused(ImageFault::ChainTooLong(MAX_IMAGES)));
    }
    let over = images.iter().find(|image| is_same_file(image.path(), &plan.path));
    if let Some(image) = over {
        return Err(refused(ImageFault::ReplacesBase { path: image.path().to_owned() }));
    }
    compare(job.memory.table(), &images[0].contents().table, true)
        .map_err(|source| refused(ImageFault::BaseBlocks { path: path.to_owned(), source }))?;
    Ok(Base { id: images[0].header().id, name: name_of_base(path, &plan.path) })
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    if store::is_stored(one) || store::is_stored(other) {
        return one == other;
    }
    let identity = |path| rustix::fs::stat(path).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// Captures the memory and the VMM's state as of one instant.
fn capture(
    job: &Arc<Job>, plan: &SnapshotPlan, writer: &Arc<ImageWriter>, changes: &mut Changes,
) -> Result<Saved, JobError> {
    changes.sync(job, plan.options.workers.into())?;
    let mut watch = match plan.options.mode {
        SnapshotMode::Background => {
            job.enter(Phase::Protecting);
            changes.suspend();
            Some(WriteWatch::begin(job, plan.trackers.declared)?)
        }
        SnapshotMode::Paused | SnapshotMode::Stopped => None,
    };
    // Now, when something can still be done about it, and once more at the end.
    if let Some(warning) = changes.warning() {
        job.note(&warning);
        job.warn(warning);
    }
    let unannounced_frees = plan.trackers.declared.contains(Trackers::UNANNOUNCED_FREES);
    let prepared = Prepared::new(job, watch.is_some(), unannounced_frees)?;
    if let Some(watch) = &watch {
        watch.protect_ahead(&prepared, changes.changed())?;
        prepared.preallocate_bitmaps(changes.changed())?;
    }
    job.enter(Phase::Stopping);
    let mut paused = match plan.options.mode {
        SnapshotMode::Stopped => None,
        SnapshotMode::Background | SnapshotMode::Paused => Some(PausedGuest::pause(job)?),
    };
    // The VMM may write to memory while it saves its state, as its devices come to rest. These
    // writes belong to the snapshot, so the instant comes after them.
    let state = match &mut paused {
        Some(paused) => paused.save_state()?,
        None => SavedState::of(job)?,
    };
    changes.sync(job, plan.options.workers.into())?;
    let capture_memory = usize::try_from(plan.options.capture_memory).unwrap_or(usize::MAX);
    let instant =
        PointInTime::take(job, writer, watch.as_ref(), changes, prepared, capture_memory)?;
    if watch.is_some()
        && let Some(paused) = paused.take()
    {
        paused.resume()?;
    }
    job.enter(Phase::Saving);
    sweep::run(job, &instant.copier, plan.options.workers.into())?;
    if let Some(paused) = paused {
        paused.resume()?;
    }
    instant.finish()?;
    if let Some(watch) = &mut watch {
        watch.end()?;
        // The last faults are handled now, or have failed the snapshot.
        instant.copier.check()?;
    }
    // All memory is read now. If this agent is still the current one, it was the current one all
    // the time. Then the guest did not run in the meantime: neither a guest that the VMM itself had
    // stopped, nor a guest whose writes nobody watched any more.
    job.check_vmm_connected()?;
    Ok(Saved { state, instant })
}

fn finish(
    job: &Job, writer: &ImageWriter, saved: &Saved, changes: &Changes, base: &Base,
) -> Result<(), JobError> {
    let SavedState { guest, pieces, file } = &saved.state;
    let (discarded, changed) =
        (saved.instant.discarded.all(), changes.changed().map(DirtyPages::all));
    let rest = ImageMetadata { guest: *guest, discarded, changed };
    let totals = writer.complete(rest, base, pieces.clone(), file.as_ref().map(AsFd::as_fd))?;
    writer.upload(&|done, all| job.note(&upload_progress::sentence(done, all)))?;
    // ---- The commit point: from here on the image may get its name before a cancel is noticed.
    job.cancel.commit_point()?;
    // The image is consistent even if the VMM has died in the meantime. But if the VMM has another
    // agent now, that agent may have given the same name to a newer image.
    job.memory.current.check()?;
    writer.persist()?;
    add(&job.live.discarded_pages, totals.discarded);
    job.count(|counters| counters.unchanged_pages = totals.unchanged);
    Ok(())
}
