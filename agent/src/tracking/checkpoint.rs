// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The checkpoint of a session: what is known about changes since the last image.
//!
//! A snapshot that increments will follow leaves a checkpoint: the id of its image, its trackers,
//! which stay on, and the pages that were written since its instant, as far as the trackers were
//! asked. The next snapshot takes it, and puts one of its own back. A job that needs the trackers
//! or changes the memory ends it.

use super::dirty_pages::DirtyPages;
use super::trackers::Trackers;
use crate::lock::lock;
use pageferry_protocol::image::{ImageId, id_text};
use std::sync::{Arc, Mutex, MutexGuard};

/// The checkpoint of a session. Clones share it.
#[derive(Clone, Default)]
pub struct SharedCheckpoint {
    state: Arc<Mutex<State>>,
    /// Trackers that are still on and not needed any more. They are stopped before others are
    /// started.
    idle: Arc<Mutex<Vec<Trackers>>>,
}

/// What is known about changes.
#[derive(Debug, Default)]
pub(crate) enum State {
    /// Nothing: no image was made with tracking.
    #[default]
    None,
    /// The changes since this image.
    Kept(Checkpoint),
    /// A snapshot has taken the checkpoint.
    Taken,
    /// Nothing is known any more, for this reason.
    Ended(String),
}

/// Changes since an image.
pub(crate) struct Checkpoint {
    /// The id of the image.
    pub(crate) id: ImageId,
    /// Pages that were written since, as far as the trackers were asked.
    pub(crate) dirty: DirtyPages,
    pub(crate) trackers: Trackers,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("id", &id_text(&self.id)).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for SharedCheckpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SharedCheckpoint").field(&*self.lock()).finish()
    }
}

impl SharedCheckpoint {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Ends the checkpoint, because another job needs the trackers or changes the memory. This asks
    /// no tracker: [`SharedCheckpoint::stop_idle`] stops them.
    pub fn end(&self, why: &str) {
        let mut state = self.lock();
        match std::mem::take(&mut *state) {
            State::Kept(checkpoint) => {
                log::info!(
                    "no increment to image {} is possible any more: {why}",
                    id_text(&checkpoint.id)
                );
                *state = State::Ended(why.to_owned());
                lock(&self.idle).push(checkpoint.trackers);
            }
            other => *state = other,
        }
    }

    /// Stops the trackers that are not needed any more. A job calls this on its thread, before it
    /// starts trackers of its own.
    pub fn stop_idle(&self) {
        let idle = std::mem::take(&mut *lock(&self.idle));
        idle.into_iter().for_each(|mut trackers| trackers.stop());
    }

    /// Calls `change` with the trackers of the checkpoint, if there is one.
    pub(crate) fn with_kept(&self, change: impl FnOnce(&mut Trackers)) {
        if let State::Kept(checkpoint) = &mut *self.lock() {
            change(&mut checkpoint.trackers);
        }
    }

    /// Takes the checkpoint for a snapshot, which [`SharedCheckpoint::put`]s one back.
    pub(crate) fn take(&self) -> State {
        std::mem::replace(&mut *self.lock(), State::Taken)
    }

    /// Puts a checkpoint back, or what there is instead.
    pub(crate) fn put(&self, state: State) {
        *self.lock() = state;
    }
}
