// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What all jobs share.
//!
//! - [`deadline`]: the time by which a hand-over must be done;
//! - [`error`]: why a job failed;
//! - [`pause`]: a guest that stands still meanwhile;
//! - [`recovery`]: how a paused postcopy hears that it is to go on;
//! - this file: [`Job`], what the session and the job's threads both see.

pub mod deadline;
pub mod error;
pub mod pause;
pub mod recovery;

pub use crate::cancel::{Cancel, TooLate};
pub use crate::stats::{LiveCounters, add, get};
pub use deadline::Deadline;
pub use error::JobError;
pub use recovery::{Recovery, RecoveryRequest};

use crate::event::Event;
use crate::hooks::Hooks;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::memory::host_page_set::HostPageSet;
use crate::transport::Limiter;
use crate::waiting::may_wait;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::job::{
    Counters, JobKind, JobStatus, Mode, OutgoingOptions, Phase, RunState,
};
use pageferry_protocol::control::reply::ErrorCode;
use rustix::io::Errno;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A job, as the session and the job's threads see it.
#[derive(Debug)]
pub struct Job {
    /// Counted from 1.
    pub id: u64,
    /// What it is.
    pub kind: JobKind,
    /// The memory it started with.
    pub memory: Arc<GuestMemory>,
    /// The VMM.
    pub hooks: Arc<Hooks>,
    /// Stops it.
    pub cancel: Cancel,
    /// Its bandwidth limit.
    pub limiter: Limiter,
    /// The deadline of its stop, while its guest is paused for a hand-over.
    pub stop: Deadline,
    /// How it hears that it is to go on while it is paused.
    pub recovery: Recovery,
    /// Figures that workers count.
    pub live: Arc<LiveCounters>,
    started: Instant,
    state: Mutex<State>,
    /// The job entered a phase.
    entered: Condvar,
    /// Readable for the session when something changed that is worth an event.
    notify: Arc<Event>,
}

#[derive(Debug)]
struct State {
    status: JobStatus,
    options: OutgoingOptions,
    /// Populates are refused: the last sync is near or over.
    frozen: bool,
    /// What is still to be sent, or to come, in postcopy.
    missing: Option<Arc<HostPageSet>>,
    /// Since when a postcopy is paused.
    paused: Option<Instant>,
    /// The guest is to be moved before its memory, after this pass.
    switch: bool,
    /// It goes on with what another agent began.
    adopted: bool,
    /// What did not succeed beside what the job is for; empty for nothing.
    warning: String,
}

impl Job {
    /// A job that starts now.
    pub fn new(
        id: u64, kind: JobKind, memory: Arc<GuestMemory>, hooks: Arc<Hooks>,
        options: OutgoingOptions, notify: Arc<Event>,
    ) -> std::io::Result<Self> {
        let status = JobStatus { job: id, kind, phase: Phase::Connecting, ..JobStatus::default() };
        Ok(Self {
            id,
            kind,
            memory,
            hooks,
            cancel: Cancel::new()?,
            limiter: Limiter::new(options.bandwidth),
            stop: Deadline::default(),
            recovery: Recovery::new()?,
            live: Arc::default(),
            started: Instant::now(),
            state: Mutex::new(State {
                status,
                options,
                frozen: false,
                missing: None,
                paused: None,
                switch: false,
                adopted: false,
                warning: String::new(),
            }),
            entered: Condvar::new(),
            notify,
        })
    }

    /// The same job, of a VMM that has declared these trackers.
    #[must_use]
    pub fn tracked_by(self, declared: Trackers) -> Self {
        self.state().status.trackers = declared;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// How it stands.
    pub fn status(&self) -> JobStatus {
        let state = self.state();
        let mut status = state.status.clone();
        let counters = &mut status.counters;
        self.live.report(counters);
        if let Some(missing) = &state.missing {
            counters.remaining_pages = missing.remaining_pages();
        }
        if let Some(since) = state.paused {
            counters.paused_us += micros(since.elapsed());
        }
        drop(state);
        if !status.phase.is_final() {
            counters.total_us = micros(self.started.elapsed());
        }
        status
    }

    /// Goes on, unless the job was cancelled or the VMM has given this agent up.
    ///
    /// # Errors
    /// Which of the two.
    pub fn check(&self) -> Result<(), JobError> {
        self.cancel.check()?;
        Ok(self.memory.current.check()?)
    }

    /// Goes on if the VMM is there and still has this agent: to be asked right before what cannot
    /// be taken back. The word alone is not enough, since a VMM that died changes it no more.
    ///
    /// # Errors
    /// If it is not.
    pub fn check_wanted(&self) -> Result<(), JobError> {
        self.memory.current.check()?;
        if self.hooks.are_connected() { Ok(()) } else { Err(JobError::VmmGone) }
    }

    /// How long it runs by now.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Changes figures.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.state().status.counters);
    }

    /// Says what the guest's run state is where the job brings it.
    pub fn set_guest_state(&self, run_state: RunState) {
        self.state().status.guest = Some(run_state);
    }

    /// Says that the guest is here from now on: the source gave it up to this side.
    pub fn guest_arrived(&self) {
        self.state().status.arrived = true;
    }

    /// Says that the guest, of which nobody knew where it is, was resumed here by force.
    pub fn resumed_by_force(&self) {
        let mut state = self.state();
        state.status.phase = Phase::Failed;
        state.status.error =
            format!("the guest was resumed here by force; before that: {}", state.status.error);
    }

    /// Enters a phase, and tells the VMM and all who watch.
    pub fn enter(&self, phase: Phase) {
        log::info!("job {}: {}", self.id, phase.name());
        self.state().status.phase = phase;
        self.entered.notify_all();
        self.announce();
    }

    /// Waits until the job has ended; false if it has not within `timeout`.
    pub fn wait_until_final(&self, timeout: Duration) -> bool {
        may_wait("wait for the end of a job");
        let runs = |state: &mut State| !state.status.phase.is_final();
        let waited = self.entered.wait_timeout_while(self.state(), timeout, runs);
        waited.unwrap_or_else(PoisonError::into_inner).0.status.phase.is_final()
    }

    /// Tells the VMM and all who watch how the job stands.
    pub fn announce(&self) {
        self.hooks.send_status(&self.status());
        self.notify.signal();
    }

    /// Says in the status what an operator should know or do while the job goes on; empty for
    /// nothing. Whoever watches is told if it is news.
    pub fn note(&self, what: &str) {
        let mut state = self.state();
        // Why a postcopy is paused is not to be lost.
        if state.status.error == what || state.paused.is_some() || state.status.phase.is_final() {
            return;
        }
        what.clone_into(&mut state.status.error);
        drop(state);
        self.announce();
    }

    /// Says what did not succeed beside what the job is for: in the log now, and in the status once
    /// the job has completed.
    pub fn warn(&self, what: String) {
        log::warn!("job {}: {what}", self.id);
        self.state().warning = what;
    }

    /// Says what is still to be sent, or to come, in postcopy.
    pub fn set_missing(&self, missing: &Arc<HostPageSet>) {
        self.state().missing = Some(missing.clone());
    }

    /// A connection of a postcopy was lost, or could not be made again: it waits until somebody has
    /// it recovered.
    pub fn pause(&self, why: &JobError) {
        let why = crate::error::chain(why);
        log::error!("job {} is paused in postcopy, to be recovered: {why}", self.id);
        let mut state = self.state();
        state.status.error = why;
        state.paused.get_or_insert_with(Instant::now);
        drop(state);
        self.enter(Phase::PostcopyPaused);
    }

    /// The connections are back.
    pub fn unpause(&self) {
        let mut state = self.state();
        state.status.error.clear();
        if let Some(since) = state.paused.take() {
            state.status.counters.paused_us += micros(since.elapsed());
        }
        drop(state);
        self.enter(Phase::Postcopy);
    }

    /// Asks for the switch to postcopy after the pass that runs. False if the job is not of mode
    /// hybrid, or past its passes.
    pub fn request_postcopy(&self) -> bool {
        let mut state = self.state();
        let possible = state.options.mode == Mode::Hybrid && state.status.phase <= Phase::Passes;
        state.switch |= possible;
        possible
    }

    /// True if the switch to postcopy was asked for.
    pub fn is_postcopy_requested(&self) -> bool {
        self.state().switch
    }

    /// It goes on with what another agent began.
    pub fn set_adopted(&self) {
        self.state().adopted = true;
    }

    /// Refuses to have the guest run from its memory here, when that is not whole any more, or may
    /// not be.
    ///
    /// # Errors
    /// If pages were released, or an agent that began the job may have done so.
    pub fn check_whole(&self) -> Result<(), Released> {
        let (pages, state) = (get(&self.live.released_pages), self.state());
        match pages {
            0 if state.adopted && state.options.release => Err(Released::Perhaps),
            0 => Ok(()),
            pages => Err(Released::Pages(pages)),
        }
    }

    /// Ends the job. A cancelled job fails in many ways, depending on where it was: users are
    /// told that it was cancelled. Whether it was is decided here, once, together with what a
    /// later cancel is told: a cancel that is accepted is how the job ends.
    pub fn finish(&self, outcome: Result<(), JobError>) {
        let outcome = match (self.cancel.end(), outcome) {
            (true, Err(error)) if !matches!(error, JobError::Cancelled | JobError::Panicked) => {
                let how = crate::error::chain(&error);
                log::warn!("job {} was cancelled, and ended so: {how}", self.id);
                Err(JobError::Cancelled)
            }
            (_, outcome) => outcome,
        };
        let (phase, error) = match &outcome {
            Ok(()) => (Phase::Completed, std::mem::take(&mut self.state().warning)),
            Err(error @ JobError::Cancelled) => (Phase::Cancelled, error.to_string()),
            Err(error @ (JobError::Unconfirmed { .. } | JobError::Stranded { .. })) => {
                (Phase::Unconfirmed, crate::error::chain(error))
            }
            Err(error) if is_of_ended_vmm(error) => {
                (Phase::Failed, format!("the VMM is gone: {}", crate::error::chain(error)))
            }
            Err(error) => (Phase::Failed, crate::error::chain(error)),
        };
        if outcome.is_err() {
            log::error!("job {} {}: {error}", self.id, phase.name());
        }
        let mut state = self.state();
        state.status.counters.total_us = micros(self.started.elapsed());
        state.status.error = error;
        // A guest that was handed over, or perhaps was, is not this side's to change any more.
        let here =
            self.kind == JobKind::Incoming || matches!(phase, Phase::Failed | Phase::Cancelled);
        state.frozen = state.frozen && !here;
        drop(state);
        self.enter(phase);
    }

    /// The options as they are now.
    pub fn options(&self) -> OutgoingOptions {
        self.state().options.clone()
    }

    /// How long the VMM may take to answer a hook: less than the options say near the end of a
    /// stop.
    pub fn hook_timeout(&self) -> Duration {
        self.stop.cap_timeout(self.state().options.hook_timeout)
    }

    /// Changes what may be changed while it runs.
    pub fn set_parameters(&self, new: &OutgoingOptions) {
        let mut state = self.state();
        let OutgoingOptions { streams, compression, mode, urgent_streams, release, resume, .. } =
            state.options;
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = state.options;
        let kept =
            OutgoingOptions { streams, compression, mode, urgent_streams, release, ..new.clone() };
        state.options = OutgoingOptions { resume, peer_timeout, hook_timeout, ..kept };
        self.limiter.set_rate(new.bandwidth);
    }

    /// Changes the limit of the bandwidth, which is all that may be changed of a job that is no
    /// migration.
    pub fn set_bandwidth(&self, bandwidth: u64) {
        self.state().options.bandwidth = bandwidth;
        self.limiter.set_rate(bandwidth);
    }

    /// Runs a populate, whose caller holds [`GuestMemory::populating`], unless the last sync is
    /// near, and what it marks would not be seen any more; or the memory is being restored, and is
    /// not the VMM's to change.
    ///
    /// # Errors
    /// Which of the two.
    pub fn populate_unless_frozen<T>(&self, populate: impl FnOnce() -> T) -> Result<T, Frozen> {
        // Let go of before populating, which may wait: whoever asks how the job stands needs it.
        let (frozen, phase) = {
            let state = self.state();
            (state.frozen, state.status.phase)
        };
        let gone = phase.is_postcopy() || matches!(phase, Phase::Completed | Phase::Unconfirmed);
        match (frozen, self.kind) {
            (false, _) => Ok(populate()),
            (true, JobKind::Restore) => Err(Frozen::Restoring(self.id)),
            (true, JobKind::Outgoing) if gone => Err(Frozen::Gone(self.id, phase.name())),
            (true, _) => Err(Frozen::PastLastSync(self.id)),
        }
    }

    /// Refuses populates from now on, and waits for the one that is under way.
    pub fn freeze(&self) {
        self.state().frozen = true;
        drop(self.memory.populating());
    }

    /// The same for a job that has not started yet, asked for by the only one who populates: there
    /// is nothing to wait for.
    pub fn start_frozen(&self) {
        self.state().frozen = true;
    }

    /// Takes populates again: the guest is here.
    pub fn thaw(&self) {
        self.state().frozen = false;
    }
}

/// True if the kernel refused something since the process is gone, or has ended, whose memory it
/// was asked for: that of the VMM.
fn is_of_ended_vmm(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        let errno = cause.downcast_ref::<Errno>().copied().or(io.map(Errno::from_raw_os_error));
        errno == Some(Errno::SRCH)
    })
}

/// A populate while a job cannot take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Frozen {
    /// A migration, with this number.
    #[error(
        "job {0} is past its last sync, or waits for a guest: populate again when the guest runs here"
    )]
    PastLastSync(u64),
    /// The guest left by a migration, with this number, which is in the phase of this name.
    #[error(
        "the guest is gone: job {0} ({1}) has handed it over, and its memory here is not in use any more"
    )]
    Gone(u64, &'static str),
    /// A restore, with this number.
    #[error(
        "job {0} restores the memory: populate again once the guest runs, or the restore has failed"
    )]
    Restoring(u64),
}

impl Frozen {
    /// Whether it is of use to try again.
    pub fn code(self) -> ErrorCode {
        match self {
            Self::Gone(..) => ErrorCode::Gone,
            Self::PastLastSync(_) | Self::Restoring(_) => ErrorCode::Busy,
        }
    }
}

/// The guest's memory is not whole here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Released {
    /// This many were freed once the destination had them.
    #[error("{0} pages of the guest were released here: its memory is not whole any more")]
    Pages(u64),
    /// The agent that began this is gone.
    #[error(
        "the agent that began this migration may have released pages of the guest here: its memory may not be whole any more"
    )]
    Perhaps,
}

/// A duration in whole microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The event descriptor by which jobs wake the session.
///
/// # Errors
/// If the kernel has none.
pub fn notifier() -> std::io::Result<Arc<Event>> {
    Ok(Arc::new(Event::new()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryError;
    use crate::memory::copy_before_write::CaptureError;
    use crate::memory::missing_pages::PlaceError;
    use std::sync::Barrier;

    #[test]
    fn a_process_that_the_kernel_does_not_find_is_called_the_vmm() {
        let ended = |error: JobError| {
            let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
            let (options, notify) = (OutgoingOptions::default(), notifier().unwrap());
            let job = Job::new(1, JobKind::Snapshot, memory, hooks, options, notify).unwrap();
            job.finish(Err(error));
            job.status().error
        };
        let gone = ended(CaptureError::Protection { id: 3, source: Errno::SRCH }.into());
        assert!(gone.starts_with("the VMM is gone: block 3"), "{gone}");
        let gone = ended(CaptureError::Faults(Errno::SRCH).into());
        assert!(gone.starts_with("the VMM is gone: cannot read write faults"), "{gone}");
        let gone = ended(PlaceError::Read(Errno::SRCH).into());
        assert!(gone.starts_with("the VMM is gone: cannot read faults"), "{gone}");
        let place = PlaceError::Place { id: 3, host_page: 9, source: Errno::SRCH };
        let gone = ended(MemoryError::not_placed(&GuestMemory::default(), 0, place).into());
        assert!(gone.starts_with("the VMM is gone: host page 0x9 of block 3"), "{gone}");
        let gone = ended(JobError::Io { what: "read", source: Errno::SRCH.into() });
        assert!(gone.starts_with("the VMM is gone: cannot read"), "{gone}");
        let other = ended(CaptureError::Protection { id: 3, source: Errno::INVAL }.into());
        assert!(other.starts_with("block 3"), "{other}");
    }

    #[test]
    fn a_cancel_does_not_hide_that_a_thread_panicked() {
        for error in [JobError::Panicked, CaptureError::Panicked.into()] {
            let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
            let (options, notify) = (OutgoingOptions::default(), notifier().unwrap());
            let job = Job::new(1, JobKind::Snapshot, memory, hooks, options, notify).unwrap();
            job.cancel.cancel().unwrap();
            job.finish(Err(error));
            let status = job.status();
            assert_eq!(
                (status.phase, &*status.error),
                (Phase::Failed, "a worker of the job panicked")
            );
        }
    }

    /// The cancel comes just as the job fails. The window is a few instructions wide, so it takes
    /// many jobs to meet it.
    #[test]
    fn a_cancel_that_is_accepted_is_how_the_job_ends() {
        const JOBS: u64 = 5_000;
        let (notify, start) = (notifier().unwrap(), Barrier::new(2));
        let job = |id| {
            let (memory, hooks) = (Arc::new(GuestMemory::default()), Arc::new(Hooks::new(None)));
            let options = OutgoingOptions::default();
            Job::new(id, JobKind::Outgoing, memory, hooks, options, notify.clone()).unwrap()
        };
        let next = Mutex::new(Arc::new(job(0)));
        let mut otherwise = Vec::new();
        std::thread::scope(|scope| {
            // A panic in here would leave the other thread waiting.
            let operator = scope.spawn(|| {
                let mut otherwise = Vec::new();
                for _ in 0..JOBS {
                    start.wait();
                    let job = lock(&next).clone();
                    start.wait();
                    let accepted = job.cancel.cancel();
                    start.wait();
                    let (expected, phase) =
                        (accepted.map_or(Phase::Failed, |()| Phase::Cancelled), job.status().phase);
                    if phase != expected {
                        otherwise.push((accepted, phase));
                    }
                }
                otherwise
            });
            for id in 1..=JOBS {
                let job = Arc::new(job(id));
                *lock(&next) = job.clone();
                start.wait();
                start.wait();
                job.finish(Err(JobError::Abandoned));
                start.wait();
            }
            otherwise = operator.join().unwrap();
        });
        assert_eq!(otherwise, [], "what the cancel said, and how the job ended");
    }
}
