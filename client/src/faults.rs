//! The guest's missing pages, while it runs before its memory is here: postcopy, seen from the VMM.
//!
//! The agent asks for the registration before the guest's state is loaded. From then on a touch of a page that is not here waits until the
//! agent has placed it. When all is here the registration is taken back, and holes are plain holes again.
//!
//! # If the agent dies in between
//!
//! What was missing then never comes: the guest cannot go on. Nobody may take the missing pages for zero, so the mappings stay registered, and who touches
//! them waits. The VMM is told at once ([`Hooks::memory_lost`](crate::Hooks::memory_lost)) and stops its guest. When the hook has returned, or after five seconds,
//! whoever still waits, such as the thread of a device, gets SIGBUS instead of waiting for ever, page by page as they are touched. The five seconds are for a
//! VMM whose hooks wait themselves: for a page, so that they do not hear of the end, or for a thread that waits for one.
//!
//! If no guest has run here yet, none is lost: who waits goes on, and what is missing is zero, of a guest that never runs here.
//!
//! An agent that hangs is found by asking it for a sign of life once a second, and counts as dead if it owes one for as long as any answer may
//! take ([`Config::request_timeout`](crate::Config::request_timeout)).

use crate::client::WeakClient;
use crate::error::Error;
use crate::memory::Memory;
use crate::ownership::{Ownership, SharedOwnership};
use pageferry_protocol::userfault::{Addresses, MAX_FAULTS, Register, Userfaultfd, feature};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the VMM has to stop its guest before those who wait for what never comes get an error: it may be one of them.
const GRACE: Duration = Duration::from_secs(5);
/// How often all who wait are woken once the agent is lost: one that is not dead may still read faults, and answers none.
const WAKE: Duration = Duration::from_millis(250);
/// Time between two signs of life of the agent.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The registration, if there is one. Shared by a client and its hook channels.
#[derive(Debug, Default)]
pub(crate) struct Faults(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    /// All memory is here.
    #[default]
    Whole,
    /// The agent places what is missing.
    Pending(Registered),
    /// It never will. Dropping the sender ends the thread that answers who touches what is missing.
    Lost {
        _registered: Arc<Registered>,
        _stop: Option<OwnedFd>,
        /// The VMM has been told.
        told: bool,
    },
}

#[derive(Debug)]
struct Registered {
    uffd: Userfaultfd,
    ranges: Vec<Addresses>,
    host_pages: Vec<u64>,
    /// Dropping it ends the heartbeat.
    _heartbeat: Option<Sender<()>>,
}

impl Registered {
    fn unregister(&self) {
        for range in &self.ranges {
            if let Err(errno) = self.uffd.unregister(*range) {
                log::debug!("cannot unregister {:#x} + {:#x}, unmapped by now? ({errno})", range.start, range.length);
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.unregister();
    }
}

impl Faults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers the mappings of all blocks, and has the agent watched. Returns the userfaultfd for the agent.
    pub(crate) fn register(&self, memory: &Memory, client: WeakClient) -> Result<OwnedFd, Error> {
        let mut registered = Registered {
            uffd: Userfaultfd::open(feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS | feature::POISON)?,
            ranges: Vec::new(),
            host_pages: Vec::new(),
            _heartbeat: None,
        };
        for block in memory.all() {
            let (id, length) = (block.geometry.id, block.geometry.length);
            if block.vmm_address == 0 {
                return Err(Error::NotMapped { id });
            }
            let range = Addresses { start: block.vmm_address, length };
            registered.uffd.register(range, Register::Missing)?;
            registered.ranges.push(range);
            registered.host_pages.push(block.host_page_size());
        }
        let for_agent = registered.uffd.as_fd().try_clone_to_owned().map_err(|source| Error::Kernel {
            what: "duplicate a userfaultfd",
            source: crate::block::errno(&source),
        })?;
        registered._heartbeat = Some(watch(client)?);
        *self.state() = State::Pending(registered);
        Ok(for_agent)
    }

    /// True while the guest may touch pages that are not here.
    pub(crate) fn pending(&self) -> bool {
        matches!(*self.state(), State::Pending(_))
    }

    /// Takes the registration back: all is here, or nobody has run.
    pub(crate) fn unregister(&self) {
        let before = std::mem::take(&mut *self.state());
        // Out of the lock: it wakes and waits.
        drop(before);
    }

    /// The agent is lost. If no guest has run here none will, and who waits for memory goes on: a device that loads its state does so on the thread of the hook
    /// channel, which hears of the end only after that.
    fn let_go(&self, ownership: &SharedOwnership) {
        if let State::Pending(registered) = &*self.state()
            && ownership.lock().forgo()
        {
            registered.unregister();
        }
    }

    /// True if memory is missing that never comes, now that the agent is lost, and the VMM is to be told.
    pub(crate) fn is_news(&self) -> bool {
        matches!(*self.state(), State::Pending(_) | State::Lost { told: false, .. })
    }

    /// Answers who touches what is missing with SIGBUS from now on, as long as the client lives. To be called when the guest was stopped, of which the VMM was
    /// told, or had time enough to be.
    pub(crate) fn give_up(&self, is_told: bool) {
        let mut state = self.state();
        match std::mem::take(&mut *state) {
            State::Pending(mut registered) => {
                registered._heartbeat = None;
                let registered = Arc::new(registered);
                let stop = poison(&registered).inspect_err(|error| {
                    log::error!("who touches a missing page waits for ever: {}", crate::error::with_sources(error));
                });
                *state = State::Lost { _registered: registered, _stop: stop.ok(), told: is_told };
            }
            State::Lost { _registered, _stop, told } => {
                *state = State::Lost { _registered, _stop, told: told || is_told };
            }
            State::Whole => {}
        }
    }
}

/// Starts the thread that asks the agent for signs of life until what is returned is dropped. A request that is not answered in time makes the client
/// give the agent up, which ends the hook channel.
fn watch(client: WeakClient) -> Result<Sender<()>, Error> {
    let (stop, stopped) = channel::<()>();
    let run = move || {
        while stopped.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
            let Some(client) = client.upgrade() else { return };
            if let Err(Error::AgentLost { .. }) = client.status() {
                client.faults().let_go(client.shared_ownership());
                break;
            }
        }
        // The hook channel ends this when it has told the VMM.
        if stopped.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout)
            && let Some(client) = client.upgrade()
            && client.ownership() == Ownership::Ours
        {
            log::error!("memory is lost, and the VMM has not stopped its guest: who waits for a page gets SIGBUS");
            client.faults().give_up(false);
        }
    };
    let thread = std::thread::Builder::new().name("pageferry-watch".into()).spawn(run);
    thread.map(|_| stop).map_err(|source| Error::Thread { source })
}

/// Starts the thread that poisons what is touched until what is returned is dropped.
fn poison(registered: &Arc<Registered>) -> Result<OwnedFd, Error> {
    let (stopped, stop) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(Error::kernel("make a pipe"))?;
    let weak = Arc::downgrade(registered);
    let run = move || {
        let mut faults = [0; MAX_FAULTS];
        while let Some(registered) = weak.upgrade() {
            // Who waits already was read by the agent, and has to come again. What is unmapped by now nobody waits for.
            for range in &registered.ranges {
                let _ = registered.uffd.wake(*range);
            }
            if !answer(&registered, &stopped, &mut faults) {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("pageferry-poison".into()).spawn(run);
    thread.map(|_| stop).map_err(|source| Error::Thread { source })
}

/// Poisons the pages of the faults that come, for a while; false when it is to end, or cannot.
fn answer(registered: &Registered, stopped: &OwnedFd, faults: &mut [u64; MAX_FAULTS]) -> bool {
    let until = Instant::now() + WAKE;
    while Instant::now() < until {
        let mut polled = [PollFd::new(&registered.uffd, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        let wake = Timespec { tv_sec: 0, tv_nsec: i64::from(WAKE.subsec_nanos()) };
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
            if registered.uffd.poison(page).is_err() {
                let _ = registered.uffd.wake(page);
            }
        }
    }
    true
}

impl Registered {
    /// The host page of an address.
    fn page_of(&self, address: u64) -> Option<Addresses> {
        let at = self.ranges.iter().position(|range| (range.start..range.start + range.length).contains(&address))?;
        let unit = self.host_pages[at];
        Some(Addresses { start: address / unit * unit, length: unit })
    }
}
