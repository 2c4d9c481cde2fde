//! The guest first, and its memory behind it: postcopy from a file.
//!
//! All memory is holes, and what the image has content of is missing. The VMM registers its
//! mappings for missing pages before it loads its state, since its devices may touch memory as they
//! load. From then on what is touched is read at once, checked, and placed; and the rest follows by
//! itself. See [`crate::memory::missing_pages`] for what happens to a page, and to one that is
//! discarded meanwhile.
//!
//! If the image is damaged, or cannot be read, the guest cannot go on: if it runs already, the VMM
//! is told that memory is lost, as when a postcopy can never complete.

use super::fault_reads::{FaultForwarder, SERVERS};
use super::lazy_restore::LazyRestore;
use super::reset::ResetGuard;
use super::source::{RestoreError, Source};
use super::working_set::{WorkingSetPlan, WorkingSetRecorder};
use super::{VmmState, resume_guest};
use crate::hooks::HookError;
use crate::job::{Job, JobError};
use crate::memory::backing::BackingKind;
use crate::memory::fence::MAX_READERS;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::missing_pages::MissingPages;
use crate::memory::pool;
use crate::missing_faults::{FaultRegistration, StopEvent, handle_faults};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{Phase, RestoreOptions};
use std::os::fd::AsFd;
use std::sync::Arc;

/// The largest host page that is placed at once, in bytes.
const MAX_HOST_PAGE: u64 = 2 << 20;

/// Lets the guest run, and fills its memory.
///
/// # Errors
/// What went wrong. If the guest does not run then, its memory is empty; if it does, it is lost.
pub fn restore(
    job: &Arc<Job>, source: &Source, state: &VmmState, mut ground: ResetGuard<'_>,
    plan: WorkingSetPlan, workers: u16,
) -> Result<(), JobError> {
    job.enter(Phase::Restoring);
    let missing = missing_of_image(job, source)?;
    let unread = missing.try_clone()?;
    let mut registered = FaultRegistration::new(job);
    let uffd = job.hooks.register_faults(job.options().hook_timeout)?;
    ground.punch_again()?;
    // What was freed has lost its reservation.
    pool::reserve(&job.memory, &missing)?;
    let missing_pages =
        Arc::new(MissingPages::new(&job.memory, Arc::new(missing), uffd, false, job.live.clone())?);
    job.set_missing(missing_pages.missing());
    job.memory.set_missing_pages(Some(missing_pages.clone()));
    missing_pages.drop_discarded(&job.memory);
    missing_pages.drop_recorded(ground.discards.since());
    let (pieces, mut record) = plan.parts();
    let supply = LazyRestore::new(job, source, &missing_pages, unread, pieces, record.is_some());
    let workers = usize::from(workers).min(MAX_READERS - SERVERS);
    let (whole, outcome) = run(&supply, record.as_mut(), workers, || {
        state.load(job)?;
        if !missing_pages.finish_load() {
            return Err(JobError::State(
                "what the VMM waited for as it loaded its state did not come".into(),
            ));
        }
        if supply.has_ended() {
            return Err(JobError::State(
                "the guest was not resumed, since its memory will not come".into(),
            ));
        }
        let late = match resume_guest(job, state.guest, &mut ground.handed_over) {
            // It may be waiting for memory, and its guest may run.
            Err(error @ JobError::Hook(HookError::Socket { .. })) => Some(error),
            resumed => resumed.map(|()| None)?,
        };
        job.enter(Phase::Prefetching);
        Ok(late)
    });
    registered.complete = whole;
    // No guest ever runs here. Nobody waits for a page of it any more, before the VMM is asked for
    // anything else: it may be waiting for one who does.
    if !ground.handed_over {
        missing_pages.unregister();
    }
    drop(registered);
    if let Some(record) = record.filter(|_| ground.handed_over && whole)
        && let Some(not_written) = record.write(&job.memory)
    {
        job.warn(not_written);
    }
    outcome
}

/// What can be told before anything is touched, and what is to be done about the working set.
///
/// # Errors
/// If the memory is of the wrong kind, or what is at the path of the working set must not be
/// overwritten.
pub fn plan(
    job: &Job, source: &Source, options: &RestoreOptions,
) -> Result<WorkingSetPlan, JobError> {
    check(job)?;
    let plan = WorkingSetPlan::of(&options.working_set, source, &job.memory)?;
    pool::check_available(&job.memory, &missing_of_image(job, source)?)?;
    job.hooks.ask(&Hook::ProbeFaults, job.options().hook_timeout)?;
    Ok(plan)
}

fn check(job: &Job) -> Result<(), RestoreError> {
    for block in job.memory.blocks() {
        let (id, size) = (block.geometry.id, block.backing.host_page_size());
        if block.backing.kind() == BackingKind::File {
            return Err(RestoreError::OnDisk { id });
        }
        if size > MAX_HOST_PAGE {
            return Err(RestoreError::HostPage { id, size, limit: MAX_HOST_PAGE });
        }
        if block.vmm_address == 0 {
            return Err(RestoreError::NotMapped { id });
        }
    }
    Ok(())
}

/// What the image has content of is missing, in whole host pages.
fn missing_of_image(job: &Job, source: &Source) -> Result<HostPageSet, JobError> {
    let host_pages: Vec<u64> =
        job.memory.blocks().iter().map(|block| block.backing.host_page_size()).collect();
    let missing = HostPageSet::empty(&job.memory, &host_pages)?;
    for (at, block) in job.memory.blocks().iter().enumerate() {
        for (word, bits) in source.present(at).nonzero_words(block.all()) {
            missing.add_pages(at, word, bits);
        }
    }
    Ok(missing)
}

/// Answers what is touched while `start` has the guest run, and until all is here. Returns whether
/// it is, and what became of the job. The VMM may be late to say that its guest runs: `start`
/// returns how, then, and that is what becomes of the job, with all its memory.
fn run(
    supply: &LazyRestore<'_>, record: Option<&mut WorkingSetRecorder>, workers: usize,
    start: impl FnOnce() -> Result<Option<JobError>, JobError>,
) -> (bool, Result<(), JobError>) {
    let stop = match StopEvent::new() {
        Ok(stop) => stop,
        Err(error) => return (false, Err(error)),
    };
    let (job, missing_pages) = (supply.job, supply.missing_pages);
    let mut asking = FaultForwarder::new(supply, record);
    std::thread::scope(|scope| {
        let (stopping, stop) = (stop.stop_on_drop(), stop.as_fd());
        let no_thread = |source| JobError::Io { what: "start a thread", source };
        let builder = std::thread::Builder::new;
        let faults = builder().spawn_scoped(scope, move || {
            handle_faults(job, missing_pages, &mut asking, stop, |error| supply.fail(error))
        });
        let faults = match faults {
            Ok(faults) => faults,
            Err(error) => return (false, Err(no_thread(error))),
        };
        let mut threads = Vec::with_capacity(SERVERS + workers);
        let mut refused = None;
        for index in 0..SERVERS + workers {
            let work = move || {
                supply.check(|| {
                    if index < SERVERS { supply.serve(index) } else { supply.prefetch(index) }
                });
            };
            match builder().spawn_scoped(scope, work) {
                Ok(thread) => threads.push(thread),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        let mut late = None;
        supply.check(|| {
            // All or none: a guest that waits must not depend on how many there are.
            refused.map_or(Ok(()), |error| Err(no_thread(error)))?;
            late = start()?;
            supply.follow()
        });
        let outcome = supply.end();
        let whole = outcome.is_ok();
        // What is a hole now is zero for good, and nobody waits any more.
        if whole {
            missing_pages.unregister();
        }
        drop(stopping);
        let joined =
            threads.into_iter().map(std::thread::ScopedJoinHandle::join).fold(Ok(()), Result::and);
        let ended = faults.join().and(joined).map_err(|_| JobError::Panicked);
        (whole, outcome.and(ended).and(late.map_or(Ok(()), Err)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::test_support::gigantic;

    #[test]
    fn host_pages_that_cannot_be_placed_at_once_are_restored_eagerly() {
        let error = check(&gigantic()).unwrap_err().to_string();
        assert!(
            error.contains("block 0") && error.contains("0x40000000") && error.contains("eager"),
            "{error}"
        );
    }
}
