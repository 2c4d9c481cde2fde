// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What all jobs share.
//!
//! - [`consent`]: a guest that its VMM gives up for one that an operator wants to bring;
//! - [`deadline`]: the time by which a hand-over must be done;
//! - `error`: how a job ends if it does not complete;
//! - [`options`]: the options that all kinds of jobs have;
//! - [`pause`]: a guest that a job has paused;
//! - [`recovery`]: requests to recover a paused postcopy;
//! - this file: [`Job`], the part that every job has.
//!
//! What only an outgoing or only an incoming migration has is in [`crate::outgoing::job`] and
//! [`crate::incoming::job`].

pub mod consent;
pub mod deadline;
mod error;
pub mod options;
pub mod pause;
pub mod recovery;

pub use crate::cancel::{Cancel, CancelledBy, TooLate};
pub use crate::stats::{LiveCounters, add, get};
pub use deadline::Deadline;
pub use error::JobError;
pub use options::CommonOptions;
pub use recovery::{Recovery, RecoveryRequest};

use crate::devices::registry::Devices;
use crate::event::Event;
use crate::hooks::Hooks;
use crate::image::ImageKey;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::placing_report::PlacingReport;
use crate::opener;
use crate::transport::{Limiter, PlainNetworks};
use crate::trust::Trust;
use crate::waiting::may_wait;
use consent::OwnGuest;
use pageferry_protocol::control::Trackers;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{Counters, JobKind, JobStatus, Phase, RunState};
use pageferry_protocol::control::journal::Journal;
use pageferry_protocol::control::reply::ErrorCode;
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ends the error of a job that has asked its VMM in vain to let the guest go on. Who reads it
/// promises nothing about the guest.
pub const GUEST_UNCERTAIN: &str =
    "; the VMM has not confirmed that its guest goes on: look at it, it may be paused or gone";

/// A job, as the session and the job's threads see it.
#[derive(Debug)]
pub struct Job {
    /// The number of the job, counted from 1.
    pub id: u64,
    /// The kind of the job.
    pub kind: JobKind,
    /// The memory that the guest had when the job started.
    pub memory: Arc<GuestMemory>,
    /// Asks the VMM.
    pub hooks: Arc<Hooks>,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
    /// Cancels the job.
    pub cancel: Arc<Cancel>,
    /// Limits the bandwidth.
    pub limiter: Arc<Limiter>,
    /// The deadline of a stop, while the guest is paused for its hand-over.
    pub stop: Deadline,
    /// Counters that several threads update at once.
    pub live: Arc<LiveCounters>,
    /// How the job places pages.
    pub placing: Arc<PlacingReport>,
    /// The devices of the agent.
    pub devices: Arc<Devices>,
    /// Whom the agent trusts on a network.
    pub trust: Trust,
    /// The key of images; `None` if they are in plain text.
    pub image_key: Option<ImageKey>,
    /// Where plain TCP may go.
    pub plain: PlainNetworks,
    started: Instant,
    state: Mutex<State>,
    /// Notified when the job enters a phase.
    entered: Condvar,
    /// Signalled when something changed that watchers want to know.
    notify: Arc<Event>,
}

#[derive(Debug)]
struct State {
    status: JobStatus,
    /// True if populates are refused: the last sync is near or over.
    populates_refused: bool,
    /// The pages that are still to be sent, received, saved or restored, once they are known.
    remaining: Option<Arc<HostPageSet>>,
    /// A failure that does not end the job.
    warning: Option<String>,
    /// What becomes of the VMM's own guest if the one of this job does not come.
    own_guest: OwnGuest,
    /// The VMM did not confirm that its own guest goes on after this job.
    is_guest_uncertain: bool,
    /// An operator has resumed the guest that this job has brought.
    resumed: bool,
    /// The VMM keeps what another agent needs to continue this job.
    is_kept: bool,
    /// The phase in which the job ended. A resume by force changes the phase afterwards.
    ended_as: Option<Phase>,
}

impl Job {
    /// A job that starts now.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor.
    pub fn new(
        id: u64, kind: JobKind, memory: Arc<GuestMemory>, hooks: Arc<Hooks>,
        options: CommonOptions, notify: Arc<Event>,
    ) -> std::io::Result<Self> {
        let status = JobStatus { job: id, kind, phase: Phase::Connecting, ..JobStatus::default() };
        Ok(Self {
            id,
            kind,
            memory,
            hooks,
            hook_timeout: options.hook_timeout,
            cancel: Arc::new(Cancel::new()?),
            limiter: Arc::new(Limiter::new(options.bandwidth)),
            stop: Deadline::default(),
            live: Arc::default(),
            placing: Arc::default(),
            devices: Arc::default(),
            trust: Trust::default(),
            image_key: None,
            plain: PlainNetworks::default(),
            started: Instant::now(),
            state: Mutex::new(State {
                status,
                populates_refused: false,
                remaining: None,
                warning: None,
                own_guest: OwnGuest::default(),
                is_guest_uncertain: false,
                resumed: false,
                is_kept: false,
                ended_as: None,
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

    /// The same job, of an agent with these devices.
    #[must_use]
    pub fn with_devices(self, devices: Arc<Devices>) -> Self {
        Self { devices, ..self }
    }

    /// The same job, of an agent that trusts these.
    #[must_use]
    pub fn that_trusts(self, trust: Trust) -> Self {
        Self { trust, ..self }
    }

    /// The same job, of an agent that seals images with this key, if there is one.
    #[must_use]
    pub fn with_image_key(self, image_key: Option<ImageKey>) -> Self {
        Self { image_key, ..self }
    }

    /// The same job, of an agent whose plain TCP may go there.
    #[must_use]
    pub fn with_plain_networks(self, plain: PlainNetworks) -> Self {
        Self { plain, ..self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The status of the job.
    pub fn status(&self) -> JobStatus {
        let state = self.state();
        let mut status = state.status.clone();
        self.placing.report(&mut status);
        let counters = &mut status.counters;
        self.live.report(counters);
        if let Some(remaining) = &state.remaining {
            counters.remaining_pages = remaining.remaining_pages();
        } else if self.kind == JobKind::Outgoing
            && matches!(status.phase, Phase::Passes | Phase::Stopping)
        {
            counters.remaining_pages = counters.pass_pages.saturating_sub(counters.pass_pages_done);
        }
        drop(state);
        if !status.phase.is_final() {
            counters.total_us = micros(self.started.elapsed());
        }
        status
    }

    /// The phase of the job.
    pub fn phase(&self) -> Phase {
        self.state().status.phase
    }

    /// The phase in which the job ended; `None` if it has not.
    pub fn ended_as(&self) -> Option<Phase> {
        self.state().ended_as
    }

    /// Checks that the job may continue.
    ///
    /// # Errors
    /// If the job was cancelled, or the VMM has given this agent up.
    pub fn check(&self) -> Result<(), JobError> {
        self.cancel.check()?;
        Ok(self.memory.current.check()?)
    }

    /// Checks that the VMM is there and still has this agent. Call it right before a step that
    /// cannot be undone. The fence word alone is not enough, because a VMM that died does not
    /// change it any more.
    ///
    /// # Errors
    /// If the VMM is gone, or has given this agent up.
    pub fn check_vmm_connected(&self) -> Result<(), JobError> {
        self.memory.current.check()?;
        if self.hooks.are_connected() { Ok(()) } else { Err(JobError::VmmGone) }
    }

    /// The time since the job started.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Changes counters.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.state().status.counters);
    }

    /// Sets the run state that the guest has where the job brings it.
    pub fn set_guest_state(&self, run_state: RunState) {
        self.state().status.guest = Some(run_state);
    }

    /// Records that the guest belongs to this VMM from now on: the source has committed.
    pub fn guest_arrived(&self) {
        self.state().status.arrived = true;
    }

    /// True if this job has brought a guest here, with all its memory, that does not run yet.
    pub fn has_left_guest_paused(&self) -> bool {
        let state = self.state();
        let JobStatus { phase, guest, .. } = state.status;
        let brings = matches!(self.kind, JobKind::Incoming | JobKind::Restore);
        let is_paused = guest == Some(RunState::Paused) && !state.resumed;
        brings && phase == Phase::Completed && is_paused
    }

    /// True if a guest that was here before this job is still here. Not if that is not known.
    pub fn has_kept_guest(&self) -> bool {
        let state = self.state();
        match self.kind {
            JobKind::Incoming | JobKind::Restore => state.own_guest == OwnGuest::Kept,
            JobKind::Outgoing => {
                matches!(state.status.phase, Phase::Failed | Phase::Cancelled)
            }
            JobKind::Snapshot | JobKind::None => true,
        }
    }

    /// Records that an operator has resumed the guest that a job had left paused.
    pub fn set_resumed(&self) {
        let mut state = self.state();
        state.resumed = true;
        if matches!(self.kind, JobKind::Incoming | JobKind::Restore) {
            state.status.guest = Some(RunState::Running);
        }
        drop(state);
        self.announce();
    }

    /// Records that the guest was resumed here by force, after it was not known where it runs.
    pub fn set_resumed_by_force(&self) {
        let mut state = self.state();
        state.status.phase = Phase::Failed;
        let before = state.status.error_text();
        let error = format!("the guest was resumed here by force; before that: {before}");
        state.status.error = Some(error);
    }

    /// Enters a phase, and announces the status. Does nothing if the job has ended: a request that
    /// was accepted just before the end must not make it run again.
    pub fn enter(&self, phase: Phase) {
        let mut state = self.state();
        if state.status.phase.is_final() {
            log::debug!("job {} has ended, and does not enter {}", self.id, phase.name());
            return;
        }
        state.status.phase = phase;
        state.ended_as = phase.is_final().then_some(phase);
        drop(state);
        log::info!("job {}: {}", self.id, phase.name());
        self.entered.notify_all();
        self.announce();
    }

    /// Waits until the job has ended. Returns false if that takes longer than `timeout`.
    pub fn wait_until_final(&self, timeout: Duration) -> bool {
        may_wait("wait for the end of a job");
        let runs = |state: &mut State| !state.status.phase.is_final();
        let waited = self.entered.wait_timeout_while(self.state(), timeout, runs);
        waited.unwrap_or_else(PoisonError::into_inner).0.status.phase.is_final()
    }

    /// Sends the status to the VMM and to all watchers.
    pub fn announce(&self) {
        self.hooks.send_status(&self.status());
        self.notify.signal();
    }

    /// Sets the sentence of the status that tells an operator what to know or to do while the job
    /// continues; empty for nothing. Announces the status if the sentence is new.
    pub fn note(&self, what: &str) {
        let mut state = self.state();
        let phase = state.status.phase;
        // The reason of a pause must not be lost.
        let is_paused = matches!(phase, Phase::PostcopyPaused | Phase::Recovering);
        if state.status.error_text() == what || is_paused || phase.is_final() {
            return;
        }
        state.status.error = (!what.is_empty()).then(|| what.to_owned());
        drop(state);
        self.announce();
    }

    /// Reports a failure that does not end the job: in the log now, and in the status once the job
    /// has completed.
    pub fn warn(&self, what: String) {
        log::warn!("job {}: {what}", self.id);
        self.state().warning = Some(what);
    }

    /// Sets the pages that are still to be sent, received, saved or restored.
    pub fn set_remaining(&self, remaining: &Arc<HostPageSet>) {
        self.state().remaining = Some(remaining.clone());
    }

    /// Pauses a postcopy that lost its connections, or could not connect again. It waits until it
    /// is recovered.
    pub fn suspend_postcopy(&self, why: &JobError) {
        let why = crate::error::chain(why);
        log::error!("job {} is paused in postcopy, to be recovered: {why}", self.id);
        let mut state = self.state();
        if !state.status.phase.is_final() {
            // Together with the phase: otherwise a note could replace the reason.
            state.status.error = Some(why);
            state.status.phase = Phase::PostcopyPaused;
        }
        drop(state);
        self.live.disconnected.start();
        self.enter(Phase::PostcopyPaused);
    }

    /// Tells the VMM how another agent continues this job, if the VMM keeps the owed pages.
    pub fn keep_journal(&self, journal: &Journal) {
        if !self.memory.keeps_owed() {
            return;
        }
        let hook = Hook::KeepJournal { journal: journal.encode() };
        // The next agent has an opener of its own, which must know what was granted to this one.
        let granted = opener::granted().unwrap_or_default();
        let granted: Vec<_> = granted.iter().map(AsFd::as_fd).collect();
        match self.hooks.ask_with(&hook, &granted, self.hook_timeout) {
            Ok(_) => self.set_kept(),
            Err(error) => {
                let why = crate::error::chain(&error);
                log::info!("job {}: no other agent can continue it: {why}", self.id);
            }
        }
    }

    /// The VMM keeps what another agent needs to continue this job.
    pub fn set_kept(&self) {
        self.state().is_kept = true;
    }

    /// True if this agent may end now, and the next one continues the job: the guest runs, and the
    /// VMM keeps what that needs.
    pub fn is_continued_by_next(&self) -> bool {
        let state = self.state();
        let guest_runs = match self.kind {
            JobKind::Restore => state.status.phase == Phase::Prefetching,
            JobKind::Incoming => matches!(
                state.status.phase,
                Phase::Postcopy | Phase::PostcopyPaused | Phase::Recovering
            ),
            JobKind::Outgoing | JobKind::Snapshot | JobKind::None => false,
        };
        state.is_kept && guest_runs && !self.cancel.is_cancelled()
    }

    /// Continues a postcopy whose connections are back.
    pub fn continue_postcopy(&self) {
        self.state().status.error = None;
        self.live.disconnected.stop();
        self.enter(Phase::Postcopy);
    }

    /// Ends the job. A cancelled job fails in many ways, depending on where it was. The status says
    /// that it was cancelled. Whether it was is decided here, in one step with the answer to a
    /// later cancel: if a cancel is accepted, the job ends as cancelled.
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
            Ok(()) => (Phase::Completed, self.state().warning.take()),
            Err(error @ JobError::Cancelled) => {
                let by = self.cancel.cancelled_by().map(|by| by.to_string());
                (Phase::Cancelled, Some(by.unwrap_or_else(|| error.to_string())))
            }
            Err(error @ (JobError::Unconfirmed { .. } | JobError::Stranded { .. })) => {
                (Phase::Unconfirmed, Some(crate::error::chain(error)))
            }
            Err(error @ JobError::VmmGone) => (Phase::Failed, Some(error.to_string())),
            Err(error @ JobError::Replaced(_)) => (Phase::Failed, Some(error.to_string())),
            Err(error) if is_of_ended_vmm(error) || self.has_lost_vmm() => {
                (Phase::Failed, Some(format!("the VMM is gone: {}", crate::error::chain(error))))
            }
            Err(error) => (Phase::Failed, Some(crate::error::chain(error))),
        };
        if let (Err(_), Some(error)) = (&outcome, &error) {
            log::error!("job {} {}: {error}", self.id, phase.name());
        }
        self.live.disconnected.stop();
        let mut state = self.state();
        state.status.counters.total_us = micros(self.started.elapsed());
        let lost = match outcome {
            Err(_) if state.is_guest_uncertain => GUEST_UNCERTAIN,
            Err(_) if !state.status.arrived => state.own_guest.in_words(),
            _ => "",
        };
        state.status.error = error.map(|error| error + lost);
        // The memory of a guest that was handed over, or may have been, is not changed any more.
        let here =
            self.kind == JobKind::Incoming || matches!(phase, Phase::Failed | Phase::Cancelled);
        state.populates_refused = state.populates_refused && !here;
        drop(state);
        self.placing.log_huge_pages(self.id);
        self.enter(phase);
    }

    /// Records that the VMM did not confirm that its own guest goes on.
    fn set_guest_uncertain(&self) {
        self.state().is_guest_uncertain = true;
    }

    /// True if the VMM had a socket for hooks, and has closed it.
    fn has_lost_vmm(&self) -> bool {
        self.hooks.are_set() && !self.hooks.are_connected()
    }

    fn set_own_guest(&self, own_guest: OwnGuest) {
        self.state().own_guest = own_guest;
    }

    /// How long the VMM may take to answer a hook: near the end of a stop, less than the operator
    /// allows.
    pub fn hook_timeout_in_stop(&self) -> Duration {
        self.stop.cap_timeout(self.hook_timeout)
    }

    /// Runs a populate. The caller holds [`GuestMemory::populating`].
    ///
    /// # Errors
    /// If the last sync is near or over, which would not see what the populate marks; or if the
    /// memory is being restored, and does not belong to the VMM yet.
    pub fn populate_if_allowed<T>(
        &self, populate: impl FnOnce() -> T,
    ) -> Result<T, PopulateRefused> {
        // The populate may wait, and a query of the status needs the lock.
        let (populates_refused, phase) = {
            let state = self.state();
            (state.populates_refused, state.status.phase)
        };
        let gone = phase.is_postcopy() || matches!(phase, Phase::Completed | Phase::Unconfirmed);
        match (populates_refused, self.kind) {
            (false, _) => Ok(populate()),
            (true, JobKind::Restore) => Err(PopulateRefused::Restoring(self.id)),
            (true, JobKind::Outgoing) if gone => Err(PopulateRefused::Gone(self.id, phase.name())),
            (true, _) => Err(PopulateRefused::PastLastSync(self.id)),
        }
    }

    /// Refuses populates from now on, and waits for a populate that is running.
    pub fn refuse_populates(&self) {
        self.state().populates_refused = true;
        drop(self.memory.populating());
    }

    /// Refuses populates from the start. Only for a job that has not started, and on the connection
    /// that populates, so no populate is running. A device may be, and the job's thread waits for
    /// it.
    pub fn start_refusing_populates(&self) {
        self.state().populates_refused = true;
    }

    /// Accepts populates again: the guest is here.
    pub fn allow_populates(&self) {
        self.state().populates_refused = false;
    }
}

/// True if the kernel did not find a process: the VMM has ended, and the error is about its memory.
fn is_of_ended_vmm(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        let errno = cause.downcast_ref::<Errno>().copied().or(io.map(Errno::from_raw_os_error));
        errno == Some(Errno::SRCH)
    })
}

/// Why a job refuses a populate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PopulateRefused {
    /// The migration with this number.
    #[error(
        "job {0} is past its last sync, or waits for a guest: populate again when the guest runs here"
    )]
    PastLastSync(u64),
    /// The migration with this number, in the phase with this name, has moved the guest away.
    #[error(
        "the guest is gone: job {0} ({1}) has handed it over, and its memory here is not in use any more"
    )]
    Gone(u64, &'static str),
    /// The restore with this number.
    #[error(
        "job {0} restores the memory: populate again once the guest runs, or the restore has failed"
    )]
    Restoring(u64),
}

impl PopulateRefused {
    /// The code tells the client whether it should try again.
    pub fn code(self) -> ErrorCode {
        match self {
            Self::Gone(..) => ErrorCode::Gone,
            Self::PastLastSync(_) | Self::Restoring(_) => ErrorCode::Busy,
        }
    }
}

/// A duration in whole microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The event descriptor with which jobs wake the session.
///
/// # Errors
/// If the kernel refuses an event descriptor.
pub fn notifier() -> std::io::Result<Arc<Event>> {
    Ok(Arc::new(Event::new()?))
}

#[cfg(test)]
mod tests;
