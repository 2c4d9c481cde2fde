//! What an agent has started to track and has not stopped yet.
//!
//! Two things in the VMM must not outlive the agent that asked for them: the VMM's own tracker
//! ([`Hooks::start_tracking`](crate::Hooks::start_tracking)), and the registration of the mappings
//! that write-protect scanning goes by. Both cost the guest a fault for each page that it writes,
//! and the registration keeps every other userfaultfd away.
//!
//! A mapping can be registered with one userfaultfd at a time, and scanning
//! (`UFFD_FEATURE_WP_ASYNC`) and background snapshots (write faults that wait) need different ones.
//! So while writes are watched the registration is *suspended*, and made again afterwards. What is
//! written meanwhile no scan can see; the agent knows, and takes all pages for written.
//!
//! The lock is held while the VMM's tracker is started or stopped. After a reattach the end of the
//! old channel comes on a thread of its own: it must not stop what the new agent has just started.

use crate::error::Error;
use crate::memory::Memory;
use crate::registration::Registered;
use pageferry_protocol::userfault::{Register, feature};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Features that write-protect scanning needs.
pub(crate) const SCANNING: u64 = feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED | feature::WP_ASYNC;

/// Shared by a client and its hook channels.
#[derive(Debug, Default)]
pub(crate) struct Tracking(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The connection whose agent has started the VMM's own tracker.
    hooks: Option<u64>,
    scanning: Option<Scanning>,
}

#[derive(Debug)]
struct Scanning {
    /// The connection whose agent scans.
    link: u64,
    /// `None` while it is suspended.
    registered: Option<Registered>,
}

impl Tracking {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent of this connection has the VMM's own tracker started, by `start`.
    pub(crate) fn start_hooks<E>(&self, link: u64, start: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.state();
        // Before it is known: a start that failed may have started something.
        state.hooks = Some(link);
        start()
    }

    /// The agent of this connection has it stopped, by `stop`.
    pub(crate) fn stop_hooks<E>(&self, link: u64, stop: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.state();
        if state.hooks.is_some_and(|by| by != link) {
            return Ok(());
        }
        state.hooks = None;
        stop()
    }

    /// Registers the mappings of all blocks for the agent of this connection to scan. Where they are
    /// registered already that one goes first: nothing is protected then.
    pub(crate) fn start_scanning(&self, link: u64, memory: &Memory) -> Result<(), Error> {
        let mut state = self.state();
        state.scanning = None;
        state.scanning = Some(Scanning { link, registered: Some(register(memory)?) });
        Ok(())
    }

    /// Takes the registration back.
    pub(crate) fn stop_scanning(&self, link: u64) {
        // Dropped before the lock is: who comes second finds it done.
        self.state().scanning.take_if(|scanning| scanning.link == link);
    }

    /// Takes the registration back for a while, if there is one.
    pub(crate) fn suspend(&self) {
        if let Some(scanning) = &mut self.state().scanning {
            scanning.registered = None;
        }
    }

    /// Registers again what was suspended.
    pub(crate) fn resume(&self, memory: &Memory) {
        let mut state = self.state();
        let Some(scanning) = state.scanning.as_mut().filter(|scanning| scanning.registered.is_none()) else { return };
        match register(memory) {
            Ok(registered) => scanning.registered = Some(registered),
            // The agent's next scan finds mappings that are not registered, and fails by that.
            Err(error) => {
                let error = pageferry_protocol::error::chain(&error);
                log::warn!("write-protect tracking ends, the mappings cannot be registered again: {error}");
            }
        }
    }

    /// The agent of this connection is lost: nothing is left registered for it, and its tracker is
    /// stopped by `stop`, if it is on.
    pub(crate) fn lost<E>(&self, link: u64, stop: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        self.stop_scanning(link);
        let mut state = self.state();
        match state.hooks.take_if(|by| *by == link) {
            Some(_) => stop(),
            None => Ok(()),
        }
    }
}

fn register(memory: &Memory) -> Result<Registered, Error> {
    Registered::all(memory, SCANNING, Register::WriteProtect)
}
