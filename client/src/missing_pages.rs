// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Missing pages of a guest that already runs: postcopy and lazy restore, on the side of the VMM.
//!
//! Before the state of the guest is loaded, the agent asks the client to register the mappings of
//! all blocks with a userfaultfd. From then on an access to a missing page waits until the agent
//! has placed the page. When all memory is here, the client unregisters the mappings, and a hole is
//! an ordinary hole again.
//!
//! # The agent is lost before all memory is here
//!
//! What the next agent needs to bring the rest is here: the registration, the journal of the job,
//! and in each block the bitmap of owed pages. A page is owed until it was placed, or given back by
//! the guest. The agent clears its bit then, or the client while there is none. If a
//! [`Supervisor`](crate::Supervisor) gets agents, the thread of the heartbeat attaches the next one
//! ([`MissingPages::continue_with_next`]): every other thread may wait for a page. The accesses
//! that wait go on waiting meanwhile.
//!
//! Without a supervisor, or if it gets no agent in time, the missing pages never arrive, and the
//! guest cannot continue. Reading zero instead would corrupt it silently. So:
//!
//! 1. The mappings stay registered, and every access to a missing page waits.
//! 2. The VMM is told at once ([`Hooks::memory_lost`](crate::Hooks::memory_lost)) and stops its
//!    guest.
//! 3. When that hook has returned, but at the latest after [`STOP_TIMEOUT`], a
//!    [poisoner](crate::poison) answers each access to a missing page with SIGBUS. The timeout is
//!    for a VMM whose hook thread waits for a missing page itself: it never hears of step 2.
//!
//! If the guest was never resumed here, nothing is lost: the source still has it. The accesses that
//! wait continue and read zero, from a guest that never runs here.
//!
//! # After that
//!
//! A guest that has lost memory is neither sent nor saved. A missing page is a hole in the file and
//! would travel as zero, and without the agent nobody knows which holes are missing pages. So the
//! client refuses as long as the state is not [complete](MissingPages::is_complete).
//!
//! The loss ends with the guest. When the VMM awaits another guest, the client unregisters the
//! mappings and clears the poison marks. The marks are in the page tables and would otherwise hit
//! the next guest.
//!
//! # Who finds out
//!
//! - The end of the connection, or a missing sign of life: see [`heartbeat`](crate::heartbeat).
//! - An agent that lives but finds its image damaged says so on the hook channel. A hook that waits
//!   for a missing page would never hear that, so the heartbeat also looks at the status of the
//!   job.

use crate::block::Block;
use crate::continuation::{Attempts, Kept, Replacer};
use crate::error::Error;
use crate::heartbeat::{BUSY_INTERVAL, Heartbeat, Probe, WatchedSockets};
use crate::link::Link;
use crate::mapping_process::UserfaultPurpose;
use crate::memory::Memory;
use crate::ownership::{Ownership, SharedOwnership};
use crate::poison::Poisoner;
use crate::registration::Registration;
use crate::stop::StopToken;
use crate::sync::lock;
use crate::tracking::active::ActiveTrackers;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Time that the VMM has to stop its guest before accesses to missing pages become errors.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The registration, if there is one. A client and its hook channels share it.
#[derive(Debug, Default)]
pub(crate) struct MissingPages {
    state: Mutex<State>,
    /// Gets the next agent. Set once by a supervisor.
    replacer: OnceLock<Replacer>,
    /// Locked after the state, if both are.
    attempts: Mutex<Attempts>,
    /// All memory is here, and the VMM was not told: the thread that would is busy.
    complete_untold: AtomicBool,
}

#[derive(Debug, Default)]
enum State {
    /// All memory is here.
    #[default]
    Complete,
    /// The agent is placing the missing pages.
    Pending {
        registered: Registration,
        _heartbeat: Heartbeat,
        /// The connection of that agent.
        link: u64,
        /// How the next agent continues its job. Empty if none can, or no supervisor gets one.
        kept: Kept,
        /// The bitmaps of owed pages are those of these blocks.
        blocks: Vec<Arc<Block>>,
        /// The agent keeps these bitmaps.
        knows_owed: bool,
        /// No other agent has come in time, and none is awaited any more.
        is_given_up: bool,
    },
    /// The missing pages never arrive.
    Lost {
        registered: Arc<Registration>,
        poisoner: Option<Poisoner>,
        link: u64,
        /// The VMM was told.
        reported: bool,
    },
}

impl MissingPages {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Finds out whether [`MissingPages::register`] would work, and leaves nothing registered. An
    /// access to a mapping may wait for a moment meanwhile.
    pub(crate) fn probe(&self, memory: &Memory, tracking: &ActiveTrackers) -> Result<(), Error> {
        // A registration that exists has worked; one of lost memory ends before the next begins.
        match &*self.state() {
            // The agent stops its trackers before it asks for the registration. That the mappings
            // can be registered shows in theirs.
            State::Complete if tracking.is_registered() => {
                memory.userfaults.check(&[UserfaultPurpose::MissingPages])
            }
            State::Complete => {
                Registration::register_all(memory, UserfaultPurpose::MissingPages).map(drop)
            }
            State::Pending { .. } | State::Lost { .. } => Ok(()),
        }
    }

    /// Registers the mappings of all blocks and starts a heartbeat. Returns the userfaultfd for the
    /// agent, which will set the owed pages.
    pub(crate) fn register(
        self: &Arc<Self>, memory: &Memory, link: Arc<Link>, ownership: &Arc<SharedOwnership>,
        probe: Probe,
    ) -> Result<OwnedFd, Error> {
        self.forget_lost();
        let blocks = memory.all();
        blocks.iter().for_each(|block| block.owe_nothing());
        self.complete_untold.store(false, Ordering::SeqCst);
        let registered = Registration::register_all(memory, UserfaultPurpose::MissingPages)?;
        let for_agent = registered.duplicate()?;
        // Locked first: the heartbeat may find the agent dead at once, and then needs the state.
        let mut state = self.state();
        let id = link.id;
        let heartbeat = self.watch(link, ownership, probe)?;
        *lock(&self.attempts) = Attempts::default();
        *state = State::Pending {
            registered,
            _heartbeat: heartbeat,
            link: id,
            kept: Kept::default(),
            blocks,
            knows_owed: false,
            is_given_up: false,
        };
        Ok(for_agent)
    }

    /// Keeps the journal of the agent of connection `of`.
    ///
    /// # Errors
    /// Why it would be of no use.
    pub(crate) fn keep_journal(&self, of: u64, new: Kept) -> Result<(), &'static str> {
        match &mut *self.state() {
            State::Pending { link, kept, knows_owed, .. } if *link == of => {
                *knows_owed = true;
                if self.replacer.get().is_none() {
                    return Err("no supervisor replaces a lost agent");
                }
                *kept = new;
                Ok(())
            }
            _ => Err("no mappings are registered for missing pages"),
        }
    }

    /// From now on an agent that is lost while memory is missing is replaced in this way.
    pub(crate) fn replace_by(&self, replacer: Replacer) {
        // Set once, since a client has one supervisor.
        let _ = self.replacer.set(replacer);
    }

    /// True if the agent of connection `of` was to place the missing pages, and another agent could
    /// and may continue in its place. A thread then sees to that.
    pub(crate) fn is_continued_without(&self, of: u64) -> bool {
        matches!(&*self.state(), State::Pending { link, kept, is_given_up: false, .. }
            if *link == of && !kept.is_empty())
    }

    /// True if pages are missing, and another agent could continue to bring them.
    pub(crate) fn is_continuable(&self) -> bool {
        matches!(&*self.state(), State::Pending { kept, is_given_up: false, .. }
            if !kept.is_empty())
    }

    /// What the next agent gets to continue, if pages are missing and it can: the journal and the
    /// userfaultfd. Nothing without a supervisor: then the VMM may have been told already that the
    /// memory is lost.
    pub(crate) fn to_continue(&self) -> Result<Option<(Kept, OwnedFd)>, Error> {
        match &*self.state() {
            State::Pending { registered, kept, is_given_up: false, .. } if !kept.is_empty() => {
                let again = Kept::new(kept.journal.clone(), &kept.grants);
                let again = again.map_err(Error::io("duplicate a descriptor"))?;
                Ok(Some((again, registered.duplicate()?)))
            }
            _ => Ok(None),
        }
    }

    /// The agent of this connection places the missing pages from now on.
    ///
    /// # Errors
    /// If no heartbeat can be started, or the memory was given up meanwhile.
    pub(crate) fn continued_by(
        self: &Arc<Self>, next: Arc<Link>, ownership: &Arc<SharedOwnership>, probe: Probe,
    ) -> Result<(), Error> {
        let mut state = self.state();
        let State::Pending { _heartbeat, link, is_given_up: false, .. } = &mut *state else {
            return Err(Error::MemoryLost);
        };
        let id = next.id;
        // The thread of the heartbeat before may be the one that runs this. It ends after it.
        *_heartbeat = self.watch(next, ownership, probe)?;
        *link = id;
        lock(&self.attempts).attached(Instant::now());
        Ok(())
    }

    /// Attaches one agent after the other until one continues in place of that of connection `of`.
    /// True if there is nothing more to do for the memory.
    ///
    /// It holds `weak` only for moments, so that the last client can be dropped meanwhile.
    fn continue_with_next(weak: &Weak<Self>, of: u64, stopped: &StopToken) -> bool {
        if !weak.upgrade().is_some_and(|pages| pages.is_continued_without(of)) {
            return false;
        }
        loop {
            let Some(pages) = weak.upgrade().filter(|pages| pages.is_continued_without(of)) else {
                return true;
            };
            let Some(replacer) = pages.replacer.get() else { return false };
            // Before the lock: others take it while they hold the state.
            let owed = pages.owed_pages();
            let mut attempts = lock(&pages.attempts);
            attempts.lost(Instant::now(), owed, replacer.limit);
            let next = attempts.next(Instant::now(), replacer.limit);
            drop(attempts);
            let Some(pause) = next else {
                pages.give_up(of);
                log::error!("no agent brings the memory of the guest, which is lost");
                replacer.wakeup.wake();
                return false;
            };
            drop(pages);
            if stopped.is_stopped_within(pause) {
                return true;
            }
            let Some(pages) = weak.upgrade() else { return true };
            let Some(Err(why)) = pages.replacer.get().map(|replacer| (replacer.replace)(of)) else {
                continue;
            };
            log::warn!("no agent continues to bring memory yet: {why}");
        }
    }

    /// Number of pages that are owed.
    fn owed_pages(&self) -> u64 {
        match &*self.state() {
            State::Pending { blocks, .. } => blocks.iter().map(|block| block.owed_pages()).sum(),
            _ => 0,
        }
    }

    /// If the agent of connection `of` has brought all pages, and was lost before it could say so,
    /// unregisters the mappings. True then: all memory is here.
    pub(crate) fn complete_without(&self, of: u64) -> bool {
        let mut state = self.state();
        let is_complete = matches!(&*state, State::Pending { link, blocks, knows_owed: true, .. }
            if *link == of && !blocks.iter().any(|block| block.owes()));
        let before = if is_complete { std::mem::take(&mut *state) } else { State::Complete };
        drop(state);
        // Outside the lock: dropping wakes threads and may wait for one.
        drop(before);
        is_complete
    }

    /// True once if all memory is here and the VMM was not told.
    pub(crate) fn take_complete_untold(&self) -> bool {
        self.complete_untold.swap(false, Ordering::SeqCst)
    }

    /// No other agent continues in place of that of connection `of`.
    fn give_up(&self, of: u64) {
        if let State::Pending { link, is_given_up, .. } = &mut *self.state()
            && *link == of
        {
            *is_given_up = true;
        }
    }

    /// Watches the agent until the result is dropped.
    fn watch(
        self: &Arc<Self>, link: Arc<Link>, ownership: &Arc<SharedOwnership>, probe: Probe,
    ) -> Result<Heartbeat, Error> {
        let (weak, ownership, id) = (Arc::downgrade(self), Arc::clone(ownership), link.id);
        let watched = Arc::clone(&link);
        let lost = move |stopped: StopToken| {
            if let Some(faults) = weak.upgrade() {
                faults.wake_waiters(id, &ownership);
                // An agent that lives and says that its job has failed is not replaced: the next
                // one would fail, too.
                let is_lost = watched.end_in_words().is_some();
                let is_ours = ownership.lock().ownership() == Ownership::Ours;
                drop(faults);
                if is_lost && is_ours && Self::continue_with_next(&weak, id, &stopped) {
                    return;
                }
            }
            // The hook channel drops this heartbeat when it has told the VMM.
            if !stopped.is_stopped_within(STOP_TIMEOUT)
                && ownership.lock().ownership() == Ownership::Ours
                && let Some(faults) = weak.upgrade()
            {
                if faults.complete_without(id) {
                    faults.complete_untold.store(true, Ordering::SeqCst);
                    return;
                }
                log::error!(
                    "memory is lost, and the VMM has not stopped its guest in time: accesses to missing pages get SIGBUS"
                );
                faults.set_lost(id, false);
            }
        };
        let weak = Arc::downgrade(self);
        let has_failed = move |status: &JobStatus| {
            let faults = weak.upgrade();
            faults.iter().for_each(|faults| lock(&faults.attempts).answered(Instant::now()));
            failed_incomplete(status)
        };
        // Only the control channel: a VMM without a hook channel may still have an agent that
        // places pages.
        let watched = WatchedSockets::Control;
        Heartbeat::start(probe, link, BUSY_INTERVAL, watched, has_failed, lost)
    }

    /// True while the guest may access pages that are still missing.
    pub(crate) fn is_pending(&self) -> bool {
        matches!(*self.state(), State::Pending { .. })
    }

    /// The same, if the agent of connection `of` places them.
    pub(crate) fn is_pending_for(&self, of: u64) -> bool {
        matches!(*self.state(), State::Pending { link, .. } if link == of)
    }

    /// True if no page is missing. Only then the memory here is the memory of the guest.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(*self.state(), State::Complete)
    }

    /// True if pages are missing that never arrive.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(*self.state(), State::Lost { .. })
    }

    /// Unregisters the mappings: all memory is here, or the guest never ran here.
    pub(crate) fn unregister(&self) {
        let before = std::mem::take(&mut *self.state());
        // Outside the lock: dropping wakes threads and may wait for one.
        drop(before);
    }

    /// Forgets what was lost, since another guest is awaited. When this returns, no access gets an
    /// error for a missing page.
    pub(crate) fn forget_lost(&self) {
        let mut state = self.state();
        if !matches!(*state, State::Lost { .. }) {
            return;
        }
        let State::Lost { registered, poisoner, .. } = std::mem::take(&mut *state) else { return };
        if let Some(poisoner) = poisoner {
            // The mappings are still registered, so these are the mappings that were marked.
            for page in poisoner.end() {
                let start = page.range().start;
                if let Err(errno) = registered.uffd.clear_poison(page) {
                    log::debug!(
                        "cannot clear the poison mark at {start:#x}, perhaps unmapped: {errno}"
                    );
                }
            }
        }
        // Inside the lock: a second caller finds it done.
        drop(registered);
    }

    /// Called when the agent is lost. If the guest was not resumed here yet, it never will be, so
    /// accesses that wait may continue. One of them may be the thread of the hook channel, which
    /// loads the state of a device and hears of the loss only after that.
    fn wake_waiters(&self, of: u64, ownership: &SharedOwnership) {
        if let State::Pending { registered, link, .. } = &*self.state()
            && *link == of
            && ownership.lock().stop_awaiting(of)
        {
            registered.unregister();
        }
    }

    /// True if the loss of the agent of connection `of` means that memory is lost, and the VMM was
    /// not told.
    pub(crate) fn is_lost_unreported(&self, of: u64) -> bool {
        match *self.state() {
            State::Pending { link, .. } | State::Lost { reported: false, link, .. } => link == of,
            State::Complete | State::Lost { .. } => false,
        }
    }

    /// From now on an access to a missing page gets SIGBUS, for as long as the client lives. Call
    /// this when the VMM has stopped its guest, or has had enough time to. Does nothing unless the
    /// missing pages are those of connection `of`.
    pub(crate) fn set_lost(&self, of: u64, is_reported: bool) {
        let mut state = self.state();
        if !matches!(*state, State::Pending { link, .. } | State::Lost { link, .. } if link == of) {
            return;
        }
        match std::mem::take(&mut *state) {
            State::Pending { registered, link, .. } => {
                let registered = Arc::new(registered);
                let poisoner = Poisoner::start(&registered).inspect_err(|error| {
                    log::error!(
                        "accesses to missing pages wait for ever: {}",
                        pageferry_protocol::error::chain(error)
                    );
                });
                *state = State::Lost {
                    registered,
                    poisoner: poisoner.ok(),
                    link,
                    reported: is_reported,
                };
            }
            State::Lost { registered, poisoner, link, reported } => {
                *state =
                    State::Lost { registered, poisoner, link, reported: reported || is_reported };
            }
            State::Complete => {}
        }
    }
}

impl Drop for MissingPages {
    /// Without a client nobody takes the registration back: to unregister would make zero of pages
    /// that are missing, while the guest may run. Its accesses wait for ever, or get SIGBUS.
    fn drop(&mut self) {
        match std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner)) {
            State::Complete => {}
            State::Pending { registered, .. } => std::mem::forget(registered),
            lost @ State::Lost { .. } => std::mem::forget(lost),
        }
    }
}

/// True if the job that was to bring the memory ended without all of it.
fn failed_incomplete(status: &JobStatus) -> bool {
    let brings = matches!(status.kind, JobKind::Incoming | JobKind::Restore);
    // A job may fail with all memory here, for example if the VMM confirms the resume too late.
    let failed = status.phase.is_final() && status.phase != Phase::Completed;
    brings && failed && status.counters.remaining_pages > 0
}
