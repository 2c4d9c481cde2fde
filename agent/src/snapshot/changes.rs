// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot's access to the checkpoint: what has changed since the last image, so that the next
//! image can be an increment.
//!
//! A snapshot that increments will follow leaves its trackers on, and it leaves a *checkpoint*: the
//! id of its image, and the pages that were written since its instant, as far as the trackers were
//! asked. The next snapshot asks the trackers again at its own instant, takes all pages that are
//! known, and leaves a checkpoint of its own. If it fails, it puts back what it took, and the
//! checkpoint is as before.
//!
//! If the sync of a tracker does not clear, the pages are cleared right after the sync
//! ([`clear-then-read`](crate::invariants#clear-then-read): none of them is read yet). This happens
//! once while the guest runs, so that little is left for the pause.
//!
//! While a background snapshot watches writes, it has the mappings that write-protect scanning
//! needs. So that tracker is suspended, and reports all pages afterwards. The next increment then
//! has all allocated pages: more than it needs, and never less.
//!
//! Discarded pages need no fix-up here: whatever the trackers report of them, the image says that
//! they are discarded. And a populate marks its pages in the log.

use crate::job::{Job, JobError};
use crate::memory::GuestMemory;
use crate::snapshot::SnapshotError;
use crate::tracking::checkpoint::{Checkpoint, SharedCheckpoint, State};
use crate::tracking::{DirtyPages, LogTracker, Tracker, TrackerChoice, Trackers};
use pageferry_protocol::image::{ImageId, id_text};
use std::sync::Arc;

/// A snapshot's access to the checkpoint.
pub struct Changes {
    shared: SharedCheckpoint,
    memory: Arc<GuestMemory>,
    tracked: Option<TrackedChanges>,
    /// A watch of writes of this snapshot leaves every page to the next increment.
    spoils_next: bool,
}

/// The changes, for a snapshot that asks the trackers.
struct TrackedChanges {
    trackers: Trackers,
    started: bool,
    /// The changes are known since this image, if there is one.
    since: Option<ImageId>,
    /// Why nothing is known since an image, although a checkpoint was kept before.
    ended: Option<String>,
    /// The next increment may build on this snapshot.
    track: bool,
    /// Pages that were written since the image, or after the instant of this snapshot.
    dirty: DirtyPages,
    /// The pages that were dirty at the instant.
    at_instant: Option<DirtyPages>,
    /// A tracker has failed, so reports may be lost.
    broken: bool,
    increment: bool,
    /// The increment has every page: writes were not tracked for a while since its base.
    has_every_page: bool,
}

impl Changes {
    /// For a snapshot that builds on the image `base`, unless that id is zero. With `track`, the
    /// next increment may build on this snapshot.
    pub fn begin(
        job: &Job, checkpoint: &SharedCheckpoint, choice: &TrackerChoice, base: ImageId,
        track: bool,
    ) -> Result<Self, JobError> {
        let (shared, memory) = (checkpoint.clone(), job.memory.clone());
        shared.stop_idle();
        // The id of no base is all zero.
        let increment = base != ImageId::default();
        if !increment && !track {
            return Ok(Self { shared, memory, tracked: None, spoils_next: false });
        }
        let dirty = DirtyPages::none(&memory)?;
        let tracked = |trackers: Trackers, started, since, ended, dirty| TrackedChanges {
            has_every_page: increment && trackers.have_missed_writes(),
            trackers,
            started,
            since,
            ended,
            track,
            dirty,
            at_instant: None,
            broken: false,
            increment,
        };
        let refused = |state, sentence| {
            shared.put(state);
            Err(SnapshotError::NoIncrement(sentence).into())
        };
        let tracked = match shared.take() {
            State::Kept(kept) if increment && kept.id != base => {
                let sentence = format!(
                    "base is image {}, and what changed is known since image {}",
                    id_text(&base),
                    id_text(&kept.id)
                );
                return refused(State::Kept(kept), sentence);
            }
            State::Kept(Checkpoint { id, dirty, trackers }) => {
                tracked(trackers, true, Some(id), None, dirty)
            }
            other if increment => {
                let why = match &other {
                    State::Ended(why) => why.clone(),
                    State::Taken => "a snapshot panicked".to_owned(),
                    _ => "no image was made here with track on".to_owned(),
                };
                let sentence = format!(
                    "base is image {}, and what changed since is not known: {why}",
                    id_text(&base)
                );
                return refused(other, sentence);
            }
            other => {
                let ended = if let State::Ended(why) = other { Some(why) } else { None };
                let timeout = job.hook_timeout;
                tracked(
                    Trackers::new(choice, &job.hooks, timeout, &job.stop),
                    false,
                    None,
                    ended,
                    dirty,
                )
            }
        };
        Ok(Self { shared, memory, tracked: Some(tracked), spoils_next: false })
    }

    /// Asks the trackers which pages were written, and clears these pages there. Starts the
    /// trackers if they are off. Up to `threads` threads share the work.
    pub fn sync(&mut self, job: &Job, threads: usize) -> Result<(), JobError> {
        job.cancel.check()?;
        let Some(tracked) = &mut self.tracked else { return Ok(()) };
        let fresh = DirtyPages::none(&self.memory)?;
        tracked.broken = true;
        if !std::mem::replace(&mut tracked.started, true) {
            tracked.trackers.start(&self.memory)?;
        }
        tracked.trackers.sync(&self.memory, &fresh, threads)?;
        if let Some(lazy) = tracked.trackers.lazy_clear() {
            for (at, block) in self.memory.blocks().iter().enumerate() {
                lazy.clear(block.geometry.id, fresh.block(at), block.all())?;
            }
        }
        tracked.broken = false;
        // Before the first image, older writes do not matter.
        if tracked.since.is_some() {
            tracked.dirty.merge(&fresh);
        }
        Ok(())
    }

    /// A watch of writes is about to take the VMM's mappings from the tracker that needs them. This
    /// also holds if this snapshot asks no tracker, because a checkpoint may be kept for a later
    /// one.
    pub fn suspend(&mut self) {
        match &mut self.tracked {
            Some(tracked) => {
                tracked.trackers.suspend();
                let has_missed = tracked.trackers.have_missed_writes();
                tracked.has_every_page |= tracked.increment && has_missed;
                self.spoils_next = has_missed && (tracked.track || tracked.since.is_some());
            }
            None => self.shared.with_kept(|trackers| {
                trackers.suspend();
                self.spoils_next = trackers.have_missed_writes();
            }),
        }
    }

    /// Which increment has more than what has changed, and why, in words for the operator. Complete
    /// once the watch of writes has begun, if there is one.
    pub fn warning(&self) -> Option<String> {
        let this = self.tracked.as_ref().is_some_and(|tracked| tracked.has_every_page);
        let which = match (this, self.spoils_next) {
            (false, false) => return None,
            (true, false) => "this increment has",
            (false, true) => "the next increment will have",
            (true, true) => "this increment and the next one have",
        };
        Some(format!(
            "{which} all allocated pages, and not only those that have changed: writes are not \
             tracked while a background snapshot runs; make all images of a chain with mode paused"
        ))
    }

    /// The watch is over, or did not start.
    pub fn resume(&mut self) {
        match &mut self.tracked {
            Some(tracked) => tracked.trackers.resume(),
            None => self.shared.with_kept(Trackers::resume),
        }
    }

    /// The changed pages to save in an increment, as far as they are known. `None` if all pages are
    /// saved.
    pub fn changed(&self) -> Option<&DirtyPages> {
        let tracked = self.tracked.as_ref().filter(|tracked| tracked.increment)?;
        Some(tracked.at_instant.as_ref().unwrap_or(&tracked.dirty))
    }

    /// The instant is now: later writes belong to the next image. Returns the changed pages to save
    /// in an increment. Call it with [`GuestMemory::marking`] held: pages that were populated until
    /// now are in the log, which is read once more here.
    pub fn begin_epoch(&mut self, later: DirtyPages) -> Result<Option<&DirtyPages>, JobError> {
        let Some(tracked) = &mut self.tracked else { return Ok(None) };
        let mut dirty = std::mem::replace(&mut tracked.dirty, later);
        let drained = LogTracker.sync(&self.memory, &dirty, 1);
        tracked.broken |= drained.is_err();
        if tracked.since.is_none() {
            // The image has all pages, so older changes do not matter.
            dirty = DirtyPages::default();
        }
        let at_instant = tracked.at_instant.insert(dirty);
        drained?;
        Ok(tracked.increment.then_some(&*at_instant))
    }

    /// Ends the snapshot. `image` is the id of its image, or `None` if it failed. Without an image,
    /// or without `track`, the checkpoint stays as it was.
    pub fn finish(mut self, image: Option<ImageId>) {
        self.finish_with(image);
    }

    fn finish_with(&mut self, image: Option<ImageId>) {
        let Some(mut tracked) = self.tracked.take() else { return };
        let id = match image {
            Some(id) if tracked.track => Some(id),
            _ => {
                if let Some(at_instant) = &tracked.at_instant {
                    tracked.dirty.merge(at_instant);
                }
                tracked.since
            }
        };
        let state = match id {
            Some(id) if !tracked.broken => {
                State::Kept(Checkpoint { id, dirty: tracked.dirty, trackers: tracked.trackers })
            }
            id => {
                tracked.trackers.stop();
                match (id, tracked.ended) {
                    (Some(_), _) => State::Ended("a tracker failed".to_owned()),
                    (None, Some(why)) => State::Ended(why),
                    (None, None) => State::None,
                }
            }
        };
        self.shared.put(state);
    }
}

/// A job that panics leaves no checkpoint, and no tracker on.
impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(tracked) = &mut self.tracked {
            tracked.broken = true;
            self.finish_with(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::memory;
    use crate::tracking::TrackingError;
    use std::sync::Mutex;

    /// Notes the calls that it gets.
    #[derive(Clone, Default)]
    struct Noting(Arc<Mutex<Vec<&'static str>>>);

    impl Noting {
        fn note(&self, what: &'static str) {
            self.0.lock().unwrap().push(what);
        }

        fn noted(&self) -> Vec<&'static str> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Tracker for Noting {
        fn start(&mut self, _: &GuestMemory) -> Result<(), TrackingError> {
            self.note("start");
            Ok(())
        }

        fn sync(&mut self, _: &GuestMemory, _: &DirtyPages, _: usize) -> Result<(), TrackingError> {
            self.note("sync");
            Ok(())
        }

        fn stop(&mut self) {
            self.note("stop");
        }

        fn suspend(&mut self) {
            self.note("suspend");
        }

        fn resume(&mut self) {
            self.note("resume");
        }
    }

    /// The next increment still builds on the checkpoint.
    #[test]
    fn untracked_snapshot_suspends_the_trackers_of_the_checkpoint() {
        let (noting, shared) = (Noting::default(), SharedCheckpoint::default());
        let trackers = Trackers::one(noting.clone());
        let kept = Checkpoint { id: [5; 16], dirty: DirtyPages::default(), trackers };
        shared.put(State::Kept(kept));
        let memory = Arc::new(memory(&[64]));
        let mut changes =
            Changes { shared: shared.clone(), memory, tracked: None, spoils_next: false };
        changes.suspend();
        assert_eq!(noting.noted(), ["suspend"]);
        assert!(
            changes.begin_epoch(DirtyPages::default()).unwrap().is_none(),
            "all pages must be saved"
        );
        changes.resume();
        changes.finish(Some([6; 16]));
        assert_eq!(noting.noted(), ["resume"]);
        let state = shared.take();
        assert!(matches!(&state, State::Kept(kept) if kept.id == [5; 16]));
        shared.put(state);
        // The next job changes the memory.
        shared.end("a guest came");
        assert!(noting.noted().is_empty(), "no tracker is stopped yet");
        shared.stop_idle();
        assert_eq!(noting.noted(), ["stop"]);
    }
}
