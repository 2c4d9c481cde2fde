// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write protection for a background snapshot: the guest keeps running while its memory is saved.
//!
//! To protect a page costs about 70 ns, which is 18 ms for each GiB, and the guest would be paused
//! for all of it. So nearly all pages are protected *ahead*, while the guest still runs. When it
//! writes to such a page, the fault thread removes the protection and notes that. At the pause only
//! those pages are left to protect that were written or allocated since. A guest that writes a lot
//! is slowed down by its faults, so there are never many.
//!
//! The set `ahead` has the host pages that are certainly protected. [`super::protect_ordering`]
//! keeps it right: at the pause, when no fault is being handled, every page in the set is
//! protected.

use super::prepare::Prepared;
use super::protect_ordering;
use super::watch_state::{WatchState, WriteFaultAction};
use super::write_faults;
use crate::event::Event;
use crate::job::{Job, JobError};
use crate::memory::backing::BackingKind;
use crate::memory::host_page_set::BlockHostPages;
use crate::memory::host_page_set::MAX_POSTCOPY_HOST_PAGE;
use crate::memory::mappings::Mappings;
use crate::memory::write_protection::Protection;
use crate::snapshot::SnapshotError;
use crate::tracking::DirtyPages;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::userfault::Userfaultfd;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;

/// The most pages that one call protects: 64 MiB. Other threads that change mappings wait for the
/// call.
const MAX_PROTECTED: PageRange = PageRange::new(0, (64 << 20) / PAGE_SIZE);
/// The most walks over the memory ahead of the instant. Each walk leaves less for the pause.
const MAX_WALKS: usize = 4;
/// The number of pages that may be left for the pause: 16 MiB.
const FEW_PAGES: u64 = (16 << 20) / PAGE_SIZE;

/// A watch of the guest's writes. On drop the mappings are unregistered, and waiting threads
/// continue.
#[derive(Debug)]
pub struct WriteWatch {
    job: Arc<Job>,
    shared: Arc<WatchState>,
    stop: Event,
    thread: Option<JoinHandle<()>>,
    watching: bool,
}

impl WriteWatch {
    /// Refuses memory that cannot be write-protected. Call this before the image is created.
    ///
    /// # Errors
    /// Which block it is, and how it can be saved.
    pub fn check_memory(job: &Job, trackers: Trackers) -> Result<(), JobError> {
        let is_unannounced = trackers.contains(Trackers::UNANNOUNCED_FREES);
        for block in job.memory.blocks() {
            if is_unannounced && !block.backing.tells_holes() {
                return Err(SnapshotError::UnannouncedFrees { id: block.geometry.id }.into());
            }
            let (id, size) = (block.geometry.id, block.backing.host_page_size());
            if block.backing.kind() == BackingKind::File {
                return Err(SnapshotError::OnDisk { id }.into());
            }
            if size > MAX_POSTCOPY_HOST_PAGE {
                return Err(SnapshotError::HostPageTooLarge {
                    id,
                    size,
                    limit: MAX_POSTCOPY_HOST_PAGE,
                }
                .into());
            }
        }
        Ok(())
    }

    /// Has the VMM register its mappings, and starts to handle faults. `trackers` say whether the
    /// VMM frees memory without a request.
    pub fn begin(job: &Arc<Job>, trackers: Trackers) -> Result<Self, JobError> {
        let ahead = job.memory.blocks().iter();
        let ahead = ahead.map(|block| {
            BlockHostPages::empty(block.geometry.pages(), block.backing.host_page_size())
        });
        let ahead = ahead.collect::<Result<_, _>>()?;
        let stop = Event::new().map_err(JobError::from_io("create an event descriptor"))?;
        let end = stop.try_clone().map_err(JobError::from_io("duplicate an event descriptor"))?;
        let timeout = job.hook_timeout;
        let undo = UnwatchOnDrop { job, armed: true };
        let uffd: Userfaultfd = job.hooks.watch_writes(timeout)?.into();
        let mappings = Mappings::of(job.memory.blocks());
        let unannounced_frees = trackers.contains(Trackers::UNANNOUNCED_FREES);
        let protection = Arc::new(Protection { uffd, mappings, unannounced_frees });
        let shared = Arc::new(WatchState::new(protection, ahead));
        let thread = write_faults::start(job, &shared, end)?;
        undo.disarm();
        job.memory.set_discard_observer(Some(shared.clone()));
        Ok(Self { job: job.clone(), shared, stop, thread: Some(thread), watching: true })
    }

    /// The write protection.
    pub fn protection(&self) -> Arc<Protection> {
        self.shared.protection.clone()
    }

    /// Fails if the thread that handles the faults has ended with an error.
    ///
    /// # Errors
    /// If that is so. The log says why.
    pub fn check(&self) -> Result<(), JobError> {
        if self.shared.has_failed() { Err(SnapshotError::Faults.into()) } else { Ok(()) }
    }

    /// No fault is handled while the guard is held.
    pub fn hold_faults(&self) -> MutexGuard<'_, WriteFaultAction> {
        self.shared.mode()
    }

    /// Protects the pages to save while the guest runs. `changed` has the changed pages of an
    /// increment.
    pub fn protect_ahead(
        &self, prepared: &Prepared, changed: Option<&DirtyPages>,
    ) -> Result<(), JobError> {
        let memory = &self.job.memory;
        for _ in 0..MAX_WALKS {
            let mut left = 0;
            for at in 0..memory.blocks().len() {
                let unit = self.shared.ahead[at].unit();
                let wanted =
                    BlockHostPages::empty(memory.blocks()[at].geometry.pages(), unit * PAGE_SIZE)?;
                prepared.pages_to_save(at, changed, |word, pages| wanted.add_pages(word, pages))?;
                left += self.protect_rest(at, wanted.bits())? * unit;
            }
            if left <= FEW_PAGES {
                break;
            }
        }
        Ok(())
    }

    /// Protects those of the host pages `wanted` that are not protected yet. Returns their number.
    pub fn protect_rest(&self, at: usize, wanted: &MappedBitmap) -> Result<u64, JobError> {
        let WatchState { protection, ahead, .. } = &*self.shared;
        let (noted, most) = (ahead[at].bits(), ahead[at].covering(MAX_PROTECTED).count);
        let mut count = 0;
        let mut run = PageRange::default();
        let mut protect = |run: PageRange| {
            if run.is_empty() {
                return Ok::<_, JobError>(());
            }
            // For a large guest, all of this takes seconds, so a cancel is checked here.
            self.job.check()?;
            self.check()?;
            count += run.count;
            Ok(protect_ordering::protect(noted, run, || protection.protect(at, run))?)
        };
        for (word, bits) in wanted.nonzero_words(wanted.all()) {
            for next in
                runs_of_word(word * WORD_BITS, protect_ordering::not_protected(noted, word, bits))
            {
                if next.first == run.end() && run.count < most {
                    run.count += next.count;
                } else {
                    protect(run)?;
                    run = next;
                }
            }
        }
        protect(run)?;
        Ok(count)
    }

    /// Ends the watch. When this returns, all faults are handled.
    pub fn end(&mut self) -> Result<(), JobError> {
        if !std::mem::take(&mut self.watching) {
            return Ok(());
        }
        self.job.memory.set_discard_observer(None);
        let unwatched = self.job.hooks.undo(&Hook::UnwatchWrites, self.job.hook_timeout);
        // The VMM could not unregister its mappings, and in a moment nobody handles faults, so the
        // protection must go. But not if the VMM has given this agent up: then it has unregistered
        // the mappings already, and what is protected now was protected by the next agent.
        if unwatched.is_err() && self.job.memory.current.check().is_ok() {
            self.lift_all();
        }
        self.stop.signal();
        let joined = self.thread.take().is_none_or(|thread| thread.join().is_ok());
        unwatched?;
        if joined { Ok(()) } else { Err(JobError::Panicked) }
    }

    fn lift_all(&self) {
        for (at, block) in self.shared.ahead.iter().enumerate() {
            if let Err(error) = self.shared.protection.unprotect(at, block.bits().all()) {
                log::debug!("{}", crate::error::chain(&error));
            }
        }
    }
}

impl Drop for WriteWatch {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::warn!("job {}: {}", self.job.id, crate::error::chain(&error));
        }
    }
}

/// On drop, undoes a registration that may have been made.
struct UnwatchOnDrop<'a> {
    job: &'a Job,
    armed: bool,
}

impl UnwatchOnDrop<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for UnwatchOnDrop<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.job.hooks.undo(&Hook::UnwatchWrites, self.job.hook_timeout)
        {
            log::debug!("{}", crate::error::chain(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::{gigantic, huge};

    #[test]
    fn too_large_host_pages_are_refused_with_advice() {
        let announced = Trackers::WRITE_PROTECT;
        let unannounced = announced | Trackers::UNANNOUNCED_FREES;
        WriteWatch::check_memory(&huge(2 << 20), announced).unwrap();
        let error = WriteWatch::check_memory(&huge(2 << 20), unannounced).unwrap_err().to_string();
        assert!(error.contains("use mode paused"), "{error}");
        let error = WriteWatch::check_memory(&gigantic(), announced).unwrap_err().to_string();
        assert!(
            error.contains("block 0") && error.contains("1 GiB") && error.contains("mode paused"),
            "{error}"
        );
    }
}
