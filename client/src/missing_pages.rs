//! The guest's missing pages, while it runs before its memory is here: postcopy, seen from the VMM.
//!
//! The agent asks for the registration before the guest's state is loaded. From then on a touch of
//! a page that is not here waits until the agent has placed it. When all is here the registration
//! is taken back, and holes are plain holes again.
//!
//! # If the agent dies in between
//!
//! What was missing then never comes: the guest cannot go on. Nobody may take the missing pages for
//! zero, so the mappings stay registered, and who touches them waits. The VMM is told at once
//! ([`Hooks::memory_lost`](crate::Hooks::memory_lost)) and stops its guest. When the hook has
//! returned, or after five seconds, whoever still waits, such as the thread of a device, gets
//! SIGBUS instead of waiting for ever, page by page as they are touched. The five seconds are for a
//! VMM whose hooks wait themselves: for a page, so that they do not hear of the end, or for a
//! thread that waits for one.
//!
//! If no guest has run here yet, none is lost: who waits goes on, and what is missing is zero, of a
//! guest that never runs here.
//!
//! What was lost concerns that guest only. As soon as another is awaited here, nobody gets an error
//! any more: the registration is taken back, and so are the marks in the page tables, which would
//! outlive it, whatever the new guest's memory holds there.
//!
//! Until then that guest is neither sent nor saved: a page that is missing is a hole of the file,
//! which would travel as zero. Without an agent's word it is not known which those are, so this
//! looks no closer than at the state: see [`MissingPages::is_complete`].
//!
//! An agent that lives, but whose image turns out to be damaged, says so by the hook channel. It
//! may be in vain, if a hook waits for one of the pages that never come: so how its job stands is
//! looked at, too.
//!
//! How a lost agent is found: see [`heartbeat`](crate::heartbeat).

use crate::error::Error;
use crate::heartbeat::{BUSY_INTERVAL, Heartbeat, Probe, WatchedSockets};
use crate::link::Link;
use crate::memory::Memory;
use crate::ownership::{Ownership, SharedOwnership};
use crate::registration::Registration;
use crate::stop::{StopSource, StopToken, stop_pair};
use crate::sync::lock;
use crate::threads::{catch_panic, spawn_thread};
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use pageferry_protocol::userfault::{MAX_FAULTS, Poisoned, RegisterMode, feature};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the VMM has to stop its guest before those who wait for what never comes get an error:
/// it may be one of them.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// What a userfaultfd for missing pages must be able to do.
const FEATURES: u64 = feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS | feature::POISON;
/// How often all who wait are woken once the agent is lost: one that is not dead may still read
/// faults, and answers none.
const WAKE_INTERVAL: Duration = Duration::from_millis(250);

/// The registration, if there is one. Shared by a client and its hook channels.
#[derive(Debug, Default)]
pub(crate) struct MissingPages(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    /// All memory is here.
    #[default]
    Complete,
    /// The agent places what is missing.
    Pending {
        registered: Registration,
        _heartbeat: Heartbeat,
        /// The connection whose agent does.
        link: u64,
    },
    /// It never will.
    Lost {
        registered: Arc<Registration>,
        poisoner: Option<Poisoner>,
        link: u64,
        /// The VMM has been told.
        reported: bool,
    },
}

/// The thread that answers who touches what is missing. Dropping this ends it.
#[derive(Debug)]
struct Poisoner {
    stop: StopSource,
    /// Returns the pages that it marked.
    thread: JoinHandle<Vec<Poisoned>>,
}

impl MissingPages {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Finds out whether [`MissingPages::register`] would work, without a trace: whoever touches a
    /// mapping meanwhile waits for a moment.
    pub(crate) fn probe(&self, memory: &Memory) -> Result<(), Error> {
        // What is registered now is not asked for again; what is lost is unregistered before.
        match &*self.state() {
            State::Complete => {
                Registration::register_all(memory, FEATURES, RegisterMode::Missing).map(drop)
            }
            State::Pending { .. } | State::Lost { .. } => Ok(()),
        }
    }

    /// Registers the mappings of all blocks, and has the agent watched. Returns the userfaultfd for
    /// the agent.
    pub(crate) fn register(
        self: &Arc<Self>, memory: &Memory, link: Arc<Link>, ownership: &Arc<SharedOwnership>,
        probe: Probe,
    ) -> Result<OwnedFd, Error> {
        self.forget_lost();
        let registered = Registration::register_all(memory, FEATURES, RegisterMode::Missing)?;
        let for_agent = registered.duplicate()?;
        // The heartbeat may find the agent dead at once, and is to find the registration then.
        let mut state = self.state();
        let id = link.id;
        let heartbeat = self.watch(link, ownership, probe)?;
        *state = State::Pending { registered, _heartbeat: heartbeat, link: id };
        Ok(for_agent)
    }

    /// Has the agent watched until what is returned is dropped.
    fn watch(
        self: &Arc<Self>, link: Arc<Link>, ownership: &Arc<SharedOwnership>, probe: Probe,
    ) -> Result<Heartbeat, Error> {
        let (weak, ownership, id) = (Arc::downgrade(self), Arc::clone(ownership), link.id);
        let lost = move |stopped: StopToken| {
            if let Some(faults) = weak.upgrade() {
                faults.wake_waiters(id, &ownership);
            }
            // The hook channel ends this when it has told the VMM.
            if !stopped.is_stopped_within(STOP_TIMEOUT)
                && ownership.lock().ownership() == Ownership::Ours
                && let Some(faults) = weak.upgrade()
            {
                log::error!(
                    "memory is lost, and the VMM has not stopped its guest: who waits for a page gets SIGBUS"
                );
                faults.set_lost(id, false);
            }
        };
        // A VMM without a hook channel may still have an agent that places pages.
        Heartbeat::start(
            probe,
            link,
            BUSY_INTERVAL,
            WatchedSockets::Control,
            failed_incomplete,
            lost,
        )
    }

    /// True while the guest may touch pages that are not here.
    pub(crate) fn is_pending(&self) -> bool {
        matches!(*self.state(), State::Pending { .. })
    }

    /// The same, if it is the agent of this connection that places them.
    pub(crate) fn is_pending_for(&self, of: u64) -> bool {
        matches!(*self.state(), State::Pending { link, .. } if link == of)
    }

    /// True if nothing is missing: only then is what the memory holds the guest's.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(*self.state(), State::Complete)
    }

    /// True if something is missing that never comes.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(*self.state(), State::Lost { .. })
    }

    /// Takes the registration back: all is here, or nobody has run.
    pub(crate) fn unregister(&self) {
        let before = std::mem::take(&mut *self.state());
        // Out of the lock: it wakes and waits.
        drop(before);
    }

    /// Another guest is to come here: what the one before lost is no more. When this returns nobody
    /// gets an error for a page that is missing.
    pub(crate) fn forget_lost(&self) {
        let mut state = self.state();
        if !matches!(*state, State::Lost { .. }) {
            return;
        }
        let State::Lost { registered, poisoner, .. } = std::mem::take(&mut *state) else { return };
        if let Some(Poisoner { stop, thread }) = poisoner {
            drop(stop);
            // While it is registered: so this is the mapping that was marked, and not another in
            // its place.
            for page in thread.join().unwrap_or_default() {
                let start = page.range().start;
                if let Err(errno) = registered.uffd.clear_poison(page) {
                    log::debug!("cannot clear a mark at {start:#x}, unmapped by now? ({errno})");
                }
            }
        }
        // Within the lock: whoever comes second finds it done.
        drop(registered);
    }

    /// The agent is lost. If no guest has run here none will, and who waits for memory goes on: a
    /// device that loads its state does so on the thread of the hook channel, which hears of the
    /// end only after that.
    fn wake_waiters(&self, of: u64, ownership: &SharedOwnership) {
        if let State::Pending { registered, link, .. } = &*self.state()
            && *link == of
            && ownership.lock().stop_awaiting(of)
        {
            registered.unregister();
        }
    }

    /// True if memory is missing that never comes, now that the agent of this connection is lost,
    /// and the VMM is to be told.
    pub(crate) fn is_lost_unreported(&self, of: u64) -> bool {
        match *self.state() {
            State::Pending { link, .. } | State::Lost { reported: false, link, .. } => link == of,
            State::Complete | State::Lost { .. } => false,
        }
    }

    /// Answers who touches what is missing with SIGBUS from now on, as long as the client lives. To
    /// be called when the guest was stopped, of which the VMM was told, or had time enough to be.
    /// Nothing happens if the memory is not that of this connection's agent any more.
    pub(crate) fn set_lost(&self, of: u64, is_reported: bool) {
        let mut state = self.state();
        if !matches!(*state, State::Pending { link, .. } | State::Lost { link, .. } if link == of) {
            return;
        }
        match std::mem::take(&mut *state) {
            State::Pending { registered, link, .. } => {
                let registered = Arc::new(registered);
                let poisoner = start_poisoner(&registered).inspect_err(|error| {
                    log::error!(
                        "who touches a missing page waits for ever: {}",
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

/// True if the job that was to bring the memory ended without all of it.
fn failed_incomplete(status: &JobStatus) -> bool {
    let brings = matches!(status.kind, JobKind::Incoming | JobKind::Restore);
    // One that failed may have all of it here, such as when the VMM is late to say that its guest
    // runs.
    let failed = status.phase.is_final() && status.phase != Phase::Completed;
    brings && failed && status.counters.remaining_pages > 0
}

/// Starts the thread that poisons what is touched until what is returned is dropped.
fn start_poisoner(registered: &Arc<Registration>) -> Result<Poisoner, Error> {
    let (stop, stopped) = stop_pair()?;
    let weak = Arc::downgrade(registered);
    let run = move || {
        let mut faults = [0; MAX_FAULTS];
        let mut marked = Vec::new();
        while let Some(registered) = weak.upgrade() {
            // Who waits already was read by the agent, and has to come again. What is unmapped by
            // now nobody waits for.
            for range in &registered.ranges {
                let _ = registered.uffd.wake(*range);
            }
            match catch_panic(|| poison_faults(&registered, &stopped, &mut faults, &mut marked)) {
                Ok(true) => {}
                Ok(false) => break,
                // Whoever waits at a page has nobody else, so it goes on.
                Err(panic) => log::error!("answering who touches a missing page panicked: {panic}"),
            }
        }
        marked
    };
    Ok(Poisoner { stop, thread: spawn_thread("pageferry-poison", run)? })
}

/// Poisons the pages of the faults that come, for a while, and adds them to `marked`; false when it
/// is to end, or cannot.
fn poison_faults(
    registered: &Registration, stopped: &StopToken, faults: &mut [u64; MAX_FAULTS],
    marked: &mut Vec<Poisoned>,
) -> bool {
    let until = Instant::now() + WAKE_INTERVAL;
    while Instant::now() < until {
        let mut polled =
            [PollFd::new(&registered.uffd, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        let wake = Timespec { tv_sec: 0, tv_nsec: i64::from(WAKE_INTERVAL.subsec_nanos()) };
        match poll(&mut polled, Some(&wake)) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return false,
        }
        if !polled[1].revents().is_empty() {
            return false;
        }
        let Ok(count) = registered.uffd.read_faults(faults) else { return false };
        for address in &faults[..count] {
            let Some(page) = registered.page_of(*address) else { continue };
            // There may be a page by now, or another mark.
            match registered.uffd.poison(page) {
                Ok(page) => marked.push(page),
                Err(_) => {
                    let _ = registered.uffd.wake(page);
                }
            }
        }
    }
    true
}
