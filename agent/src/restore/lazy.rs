// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lazy restore: the guest runs first, and its memory follows. It is a postcopy from a file.
//!
//! 1. The memory is made holes. The pages that the image has content for are *missing*.
//! 2. The VMM registers its mappings for missing faults, and passes the userfaultfd to the agent.
//!    This happens before it loads its state, because its devices may touch memory as they load.
//! 3. The agent answers faults: it reads the touched page from the image, checks it and places it.
//!    At the same time other threads prefetch the working set.
//! 4. The VMM loads its state and resumes the guest.
//! 5. The other threads prefetch the rest. When no page is missing, the mappings are unregistered.
//!
//! [`crate::memory::missing_pages`] describes what happens to one page, also when it is discarded
//! while it is missing.
//!
//! If the image cannot be read or is damaged, the restore fails. A guest that does not run yet is
//! not resumed, and the memory is made empty. If the guest already runs, it cannot go on: the VMM
//! is told that memory is lost, as in a postcopy that can never complete.
//!
//! If the agent is lost while the guest runs, the next one continues with the pages that are still
//! owed ([`ContinuedRestore`]).
//!
//! If the VMM does not resume the guest, or not in time, the guest is the VMM's all the same. All
//! memory is placed, and then the job fails.

use super::bases::Bases;
use super::error::RestoreError;
use super::fault_reads::FAULT_WORKERS;
use super::image_pages::ImagePages;
use super::lazy_restore::LazyRestore;
use super::reset::ResetGuard;
use super::source::Source;
use super::working_set::WorkingSetPlan;
use super::{VmmState, resume_guest};
use crate::image::ImageKey;
use crate::job::{Job, JobError};
use crate::memory::GuestMemory;
use crate::memory::backing::BackingKind;
use crate::memory::fence::MAX_READERS;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::host_page_set::MAX_POSTCOPY_HOST_PAGE;
use crate::memory::missing_pages::MissingPages;
use crate::memory::pool;
use crate::missing_faults::FaultRegistration;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{Phase, Placing, RestoreOptions};
use pageferry_protocol::control::journal::Journal;
use pageferry_protocol::image::ImageId;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// Resumes the guest, and places its memory while it runs.
///
/// # Errors
/// The reason for the failure. If the guest does not run, its memory is empty. If it runs, it is
/// lost, unless the error is [`JobError::NotResumed`].
pub fn restore(
    job: &Arc<Job>, (source, bases, path): (&Source, Bases, &Path), state: &VmmState,
    mut guard: ResetGuard<'_>, plan: WorkingSetPlan, options: &RestoreOptions,
) -> Result<(), JobError> {
    job.enter(Phase::Restoring);
    let missing = missing_of_image(job, source)?;
    // Of what the base has, no touch would be seen.
    if !matches!(plan, WorkingSetPlan::Write(_)) {
        bases.take_present(&missing);
    }
    let unread = missing.try_clone()?;
    let mut registered = FaultRegistration::new(job);
    let uffd = job.hooks.register_faults(job.hook_timeout)?;
    guard.punch_again()?;
    // Freeing the huge pages has dropped their reservation.
    pool::reserve(job.memory.blocks(), &missing)?;
    job.memory.owe(&missing);
    let missing_pages = announce(job, missing, bases, uffd)?;
    missing_pages.drop_discarded();
    missing_pages.drop_recorded(guard.discards.since());
    guard.give_back_again()?;
    keep_journal(job, source, path, options);
    let (pieces, mut record) = plan.parts();
    let pages = ImagePages::new(job, source, &missing_pages, unread);
    let lazy_restore = LazyRestore::new(pages, pieces, record.is_some());
    let (whole, outcome) = lazy_restore.run(record.as_mut(), workers(options), || {
        state.load(job)?;
        if !missing_pages.finish_load() {
            return Err(JobError::Stuck(
                "a page that the VMM touched as it loaded its state was not restored".into(),
            ));
        }
        if lazy_restore.has_ended() {
            return Err(JobError::Stuck(
                "the guest was not resumed, because its memory cannot be restored".into(),
            ));
        }
        let not_resumed = match resume_guest(job, state.guest, &mut guard.handed_over) {
            // The guest is the VMM's. A VMM that is late may be waiting for memory, and one that
            // failed may resume the guest later. So go on.
            Err(error @ JobError::NotResumed { .. }) => Some(error),
            resumed => resumed.map(|()| None)?,
        };
        job.enter(Phase::Prefetching);
        Ok(not_resumed)
    });
    registered.complete = whole;
    // The guest will never run here. Wake the VMM's threads that wait for a page before the next
    // hook: the thread that answers hooks may be waiting for one of them.
    if !guard.handed_over {
        missing_pages.unregister();
    }
    drop(registered);
    if let Some(record) = record.filter(|_| guard.handed_over && whole)
        && let Some(not_written) = record.write(&job.memory, job.image_key.as_ref())
    {
        job.warn(not_written);
    }
    outcome
}

/// From now on discards and the job's progress know of the pages that are missing.
fn announce(
    job: &Job, missing: HostPageSet, bases: Bases, uffd: OwnedFd,
) -> Result<Arc<MissingPages>, JobError> {
    let (blocks, missing) = (job.memory.blocks(), Arc::new(missing));
    let missing_pages = MissingPages::new(blocks, missing, uffd, false, job.live.clone())?;
    let missing_pages = Arc::new(missing_pages.with_bases(bases.into_blocks()));
    job.set_remaining(missing_pages.missing());
    job.memory.set_missing_pages(Some(missing_pages.clone()));
    Ok(missing_pages)
}

fn workers(options: &RestoreOptions) -> usize {
    usize::from(options.workers).min(MAX_READERS - FAULT_WORKERS)
}

/// Tells the VMM how another agent continues this job, if the VMM keeps the owed pages.
fn keep_journal(job: &Job, source: &Source, path: &Path, options: &RestoreOptions) {
    let Some(path) = path.to_str() else { return };
    let (path, image) = (path.to_owned(), source.newest().header().id);
    job.keep_journal(&Journal::Restore { path, image, options: options.clone() });
}

/// The image of a lazy restore that a lost agent began, and the pages that are owed from it.
#[derive(Debug)]
pub struct OwedImage {
    source: Source,
    bases: Bases,
    missing: HostPageSet,
}

impl OwedImage {
    /// Opens the image and looks which pages are owed. Changes nothing, so it can be tried again.
    ///
    /// # Errors
    /// If the image cannot be opened, is another one, or does not fit; or if it is not known which
    /// pages are owed.
    pub fn open(
        (path, image): (&str, ImageId), options: &RestoreOptions, memory: &GuestMemory,
        key: Option<&ImageKey>,
    ) -> Result<Self, JobError> {
        let source = Source::open(Path::new(path), memory, key)?;
        let found = source.newest().header().id;
        if found != image {
            let path = path.to_owned();
            return Err(RestoreError::OtherImage { path, found, expected: image }.into());
        }
        let bases = Bases::of(options, memory, &source, true)?;
        Ok(Self { source, bases, missing: memory.owed_pages()? })
    }
}

/// The rest of a lazy restore that a lost agent began, and whose guest runs.
#[derive(Debug)]
pub struct ContinuedRestore {
    source: Source,
    unread: HostPageSet,
    missing_pages: Arc<MissingPages>,
    options: RestoreOptions,
}

impl ContinuedRestore {
    /// From now on discards know of the pages that are missing. `uffd` is that of the mappings.
    ///
    /// # Errors
    /// If there is no memory for it. It can be tried again then, which is why this is not left to
    /// the job: a job that fails loses the guest.
    pub fn new(
        job: &Job, image: OwedImage, uffd: OwnedFd, options: RestoreOptions,
    ) -> Result<Self, JobError> {
        let OwedImage { source, bases, missing } = image;
        let unread = missing.try_clone()?;
        let missing_pages = announce(job, missing, bases, uffd)?;
        Ok(Self { source, unread, missing_pages, options })
    }

    /// Places all that is owed, and ends the job.
    pub fn run(self, job: &Arc<Job>) {
        let outcome = self.place(job);
        job.finish(outcome);
    }

    fn place(self, job: &Arc<Job>) -> Result<(), JobError> {
        let Self { source, unread, missing_pages, options } = self;
        source.limit(&job.limiter);
        let mut registered = FaultRegistration::new(job);
        job.placing.uses(Placing::Pages);
        missing_pages.drop_settled();
        if !missing_pages.finish_load() {
            return Err(JobError::Cancelled);
        }
        // The lost agent may have read faults, and not answered them.
        missing_pages.retry_all();
        if !options.working_set.is_empty() {
            let what = "the agent that knew the working set was lost: the working set is neither \
                        read ahead nor recorded";
            job.warn(what.into());
        }
        let pages = ImagePages::new(job, &source, &missing_pages, unread);
        let lazy_restore = LazyRestore::new(pages, Vec::new(), false);
        job.enter(Phase::Prefetching);
        let (whole, outcome) = lazy_restore.run(None, workers(&options), || Ok(None));
        registered.complete = whole;
        drop(registered);
        outcome
    }
}

/// Makes all checks that need no change of memory, and decides what to do about the working set.
///
/// # Errors
/// If the memory is of a kind that cannot be restored lazily, if huge pages are short, if the VMM
/// cannot register faults, or if the file at the path of the working set must not be overwritten.
pub fn plan(
    job: &Job, source: &Source, options: &RestoreOptions,
) -> Result<WorkingSetPlan, JobError> {
    check(job)?;
    let plan =
        WorkingSetPlan::of(&options.working_set, source, &job.memory, job.image_key.as_ref())?;
    pool::check_available(job.memory.blocks(), &missing_of_image(job, source)?)?;
    job.hooks.ask(&Hook::ProbeFaults, job.hook_timeout)?;
    Ok(plan)
}

fn check(job: &Job) -> Result<(), RestoreError> {
    for block in job.memory.blocks() {
        let (id, size) = (block.geometry.id, block.backing.host_page_size());
        if block.backing.kind() == BackingKind::File {
            return Err(RestoreError::OnDisk { id });
        }
        if size > MAX_POSTCOPY_HOST_PAGE {
            return Err(RestoreError::HostPageTooLarge { id, size, limit: MAX_POSTCOPY_HOST_PAGE });
        }
        if block.vmm_address == 0 {
            return Err(RestoreError::NotMapped { id });
        }
    }
    Ok(())
}

/// The host pages that are missing: those in which the image has content.
fn missing_of_image(job: &Job, source: &Source) -> Result<HostPageSet, JobError> {
    let host_pages: Vec<u64> =
        job.memory.blocks().iter().map(|block| block.backing.host_page_size()).collect();
    let missing = HostPageSet::empty(job.memory.blocks(), &host_pages)?;
    for (at, block) in job.memory.blocks().iter().enumerate() {
        for (word, bits) in source.present(at).nonzero_words(block.all()) {
            missing.add_pages(at, word, bits);
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::gigantic;

    #[test]
    fn a_gigantic_host_page_must_be_restored_eagerly() {
        let error = check(&gigantic()).unwrap_err().to_string();
        assert!(
            error.contains("block 0") && error.contains("1 GiB") && error.contains("eager"),
            "{error}"
        );
    }
}
