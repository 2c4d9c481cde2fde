//! Snapshots: a guest as it was at one instant, in an image.
//!
//! - [`checkpoint`]: what changed since the last image, for increments;
//! - [`protect_steps`]: the order in which pages are noted as protected, and are;
//! - [`protect`]: memory is protected against writes, before the instant as far as possible;
//! - [`prepare`]: what can be done before that moment;
//! - [`point_in_time`]: what there is to save, as of one moment;
//! - [`write_faults`]: writes of the guest that runs on;
//! - [`sweep`]: all the rest;
//! - this file: the phases.
//!
//! [`crate::memory::copy_before_write`] has the rules of who reads which page when.

pub mod checkpoint;
pub mod point_in_time;
pub mod prepare;
pub mod protect;
pub mod protect_steps;
pub mod sweep;
pub mod write_faults;

use crate::image::blocks::compare;
use crate::image::chain::{MAX_IMAGES, lineage, name_of_base};
use crate::image::writer::{Base, Rest};
use crate::image::{Fault, ImageWriter};
use crate::job::pause::{PausedGuest, SavedState};
use crate::job::{Job, JobError, add};
use crate::tracking::{DirtyPages, TrackerChoice};
use checkpoint::{Changes, SharedCheckpoint};
use pageferry_protocol::control::job::{Phase, SnapshotMode, SnapshotOptions};
use pageferry_protocol::image::ImageId;
use point_in_time::PointInTime;
use prepare::Prepared;
use protect::WriteWatch;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

// `ahead.rs` takes this from its parent, so that the model checker can put its own in its place.
use pageferry_protocol::shm::bitmap;

/// What is to be saved, and how.
#[derive(Debug)]
pub struct Plan {
    /// Where the image will be.
    pub path: PathBuf,
    /// How.
    pub options: SnapshotOptions,
    /// Who reports writes.
    pub trackers: TrackerChoice,
    /// What is known of changes since the last image.
    pub checkpoint: SharedCheckpoint,
}

/// What was captured.
struct Saved {
    state: SavedState,
    instant: PointInTime,
}

/// Saves the guest of `job`, and ends the job.
pub fn run(job: &Arc<Job>, plan: &Plan) {
    let outcome = save(job, plan);
    job.finish(outcome);
}

fn save(job: &Arc<Job>, plan: &Plan) -> Result<(), JobError> {
    job.enter(Phase::Preparing);
    if plan.options.mode == SnapshotMode::Background {
        WriteWatch::check_memory(job)?;
    }
    if let Some(id) = job.memory.block_of_file(&plan.path) {
        return Err(Fault::Memory { id }.of(&plan.path).into());
    }
    let base = find_base(job, plan)?;
    let SnapshotOptions { track, replace, cached, .. } = plan.options;
    let writer = Arc::new(ImageWriter::create(&plan.path, job.memory.table(), replace, cached)?);
    let mut changes = Changes::begin(job, plan, base.id, track)?;
    let captured = capture(job, plan, &writer, &mut changes);
    // The watch of writes, if there was one, ended with it.
    changes.resume();
    let outcome = captured.and_then(|saved| finish(job, &writer, &saved, &changes, &base));
    changes.finish(outcome.is_ok().then(|| writer.id()));
    outcome
}

/// The image that an increment builds on; a base without id if there is none.
fn find_base(job: &Job, plan: &Plan) -> Result<Base, JobError> {
    if plan.options.base.is_empty() {
        return Ok(Base::default());
    }
    let path = Path::new(&plan.options.base);
    let images = lineage(path)?;
    let refused = |fault: Fault| JobError::from(fault.of(&plan.path));
    if images.len() >= MAX_IMAGES {
        return Err(refused(Fault::Chain(MAX_IMAGES)));
    }
    let over = images.iter().find(|image| is_same_file(image.path(), &plan.path));
    if let Some(image) = over {
        return Err(refused(Fault::OverBase { path: image.path().to_owned() }));
    }
    compare(job.memory.table(), &images[0].contents().table, true)
        .map_err(|source| refused(Fault::BaseBlocks { path: path.to_owned(), source }))?;
    Ok(Base { id: images[0].header().id, name: name_of_base(path, &plan.path) })
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| rustix::fs::stat(path).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// Captures the memory and the VMM's state as of one moment.
fn capture(
    job: &Arc<Job>, plan: &Plan, writer: &Arc<ImageWriter>, changes: &mut Changes,
) -> Result<Saved, JobError> {
    job.enter(Phase::Protecting);
    changes.sync(job)?;
    let mut watch = match plan.options.mode {
        SnapshotMode::Background => {
            changes.suspend();
            Some(WriteWatch::begin(job)?)
        }
        SnapshotMode::Paused | SnapshotMode::Stopped => None,
    };
    let prepared = Prepared::new(job, watch.is_some())?;
    if let Some(watch) = &watch {
        watch.protect_ahead(&prepared, changes.changed())?;
        prepared.preallocate_bitmaps(changes.changed())?;
    }
    job.enter(Phase::Stopping);
    let mut paused = match plan.options.mode {
        SnapshotMode::Stopped => None,
        SnapshotMode::Background | SnapshotMode::Paused => Some(PausedGuest::pause(job)?),
    };
    // It may write memory as devices come to rest, and what it writes belongs to it.
    let state = match &mut paused {
        Some(paused) => paused.save_state()?,
        None => SavedState::of(job)?,
    };
    changes.sync(job)?;
    let instant = PointInTime::take(job, writer, watch.as_ref(), changes, prepared)?;
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
        // What was captured for the last faults is put by now, or was not.
        instant.copier.check()?;
    }
    // All memory was read. If the VMM has this agent now, it had it all the while, and the guest
    // did not run on before: neither one that the VMM itself stopped, nor one whose writes nobody
    // watched any more.
    job.check_wanted()?;
    Ok(Saved { state, instant })
}

fn finish(
    job: &Job, writer: &ImageWriter, saved: &Saved, changes: &Changes, base: &Base,
) -> Result<(), JobError> {
    // ---- The line: from here on the image comes to be, and may have its name before a cancel is
    // heard.
    job.cancel.commit_point()?;
    let SavedState { guest, pieces, file } = &saved.state;
    let (discarded, changed) =
        (saved.instant.discarded.all(), changes.changed().map(DirtyPages::all));
    let rest = Rest { guest: *guest, discarded, changed };
    let totals = writer.complete(rest, base, pieces.clone(), file.as_ref().map(AsFd::as_fd))?;
    // The image is consistent, also if the VMM died meanwhile. But if the VMM has another agent by
    // now, that one may have given the same name to a newer image.
    job.memory.current.check()?;
    writer.name()?;
    add(&job.live.discarded_pages, totals.discarded);
    job.count(|counters| counters.unchanged_pages = totals.unchanged);
    Ok(())
}

/// The id of an image that stands alone has no base.
fn is_increment(base: ImageId) -> bool {
    base != ImageId::default()
}
