// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an agent has started beside a running guest and has not stopped yet.
//!
//! Three things must not outlive the agent that asked for them: the VMM's own tracker
//! ([`Tracker`](crate::tracking::Tracker)), the registration of the mappings for write-protect
//! scanning, and a throttle ([`Hooks::throttle`](crate::Hooks::throttle)). The trackers cost the
//! guest a fault for each page that it writes, and the registration excludes every other
//! userfaultfd.
//!
//! A mapping can be registered with only one userfaultfd at a time. Scanning
//! (`UFFD_FEATURE_WP_ASYNC`) and background snapshots (write faults that wait) need different ones.
//! So while writes are watched, the registration is *suspended*, and made again afterwards. No scan
//! sees what is written meanwhile; the agent knows that and takes all pages for written.
//!
//! # Blocks that are added and removed
//!
//! A job keeps its blocks: a block is not added while a job runs, and a removal ends the job first.
//! But after a snapshot with `track` the registration stays, and an agent that hangs does not end
//! it. So a block that is removed is unregistered here, before the VMM uses its addresses for
//! something else. A block that is added meanwhile is not registered: a change of the blocks makes
//! an increment impossible, so the agent scans no more until it has started to scan anew, which
//! registers all blocks.
//!
//! # Two agents
//!
//! After a reattach the old channel may still have requests to handle, and its end comes on its own
//! thread. The old agent must not stop what the new one has started, start it again for itself, or
//! clear pages in a tracker that the new one reads. So each thing is recorded with the connection
//! that started it, and a request of an earlier connection is refused ([`Replaced`]). The lock of
//! what the VMM does is held while its hook runs.

use crate::error::Error;
use crate::mapping_process::UserfaultPurpose;
use crate::memory::Memory;
use crate::registration::Registration;
use crate::sync::lock;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::error::chain;
use std::sync::{Mutex, MutexGuard};

/// A client and its hook channels share it.
#[derive(Debug, Default)]
pub(crate) struct ActiveTrackers {
    by_hooks: Mutex<ByHooks>,
    /// Never held while a hook of the VMM runs, so that a thread that removes a block does not wait
    /// for a hook.
    scanning: Mutex<Option<Scan>>,
}

/// What the VMM does by its hooks.
#[derive(Debug, Default)]
struct ByHooks {
    /// The connection whose agent has started the VMM's own tracker.
    tracker: Option<u64>,
    /// The connection whose agent has the guest throttled.
    throttled: Option<u64>,
}

#[derive(Debug)]
struct Scan {
    /// The connection whose agent scans.
    link: u64,
    /// `None` while it is suspended.
    registered: Option<Registration>,
}

/// The agent of a later connection has started this meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another agent was attached in place of this one, and has started {0} itself")]
pub(crate) struct Replaced(&'static str);

impl Replaced {
    /// Refuses a request of `link` if a later connection has started `what`.
    fn check(what: &'static str, started_by: Option<u64>, link: u64) -> Result<(), Self> {
        if started_by.is_some_and(|by| by > link) { Err(Self(what)) } else { Ok(()) }
    }
}

impl From<Replaced> for RemoteError {
    fn from(replaced: Replaced) -> Self {
        Self::new(ErrorCode::State, replaced)
    }
}

impl ActiveTrackers {
    fn by_hooks(&self) -> MutexGuard<'_, ByHooks> {
        lock(&self.by_hooks)
    }

    fn scanning(&self) -> MutexGuard<'_, Option<Scan>> {
        lock(&self.scanning)
    }

    /// Starts the VMM's own tracker by `start`, for the agent of this connection.
    pub(crate) fn start_hooks(&self, link: u64, start: impl FnOnce() -> Reply<()>) -> Reply<()> {
        let mut by_hooks = self.by_hooks();
        Replaced::check("the VMM's tracker", by_hooks.tracker, link)?;
        // Recorded before the result is known: a start that failed may have started a part.
        by_hooks.tracker = Some(link);
        start()
    }

    /// Reads the VMM's own tracker or clears pages in it by `call`, for the agent of this
    /// connection. The next agent does not see what an earlier one clears.
    pub(crate) fn use_hooks(&self, link: u64, call: impl FnOnce() -> Reply<()>) -> Reply<()> {
        let by_hooks = self.by_hooks();
        Replaced::check("the VMM's tracker", by_hooks.tracker, link)?;
        call()
    }

    /// Stops the VMM's own tracker by `stop`, for the agent of this connection.
    pub(crate) fn stop_hooks<E>(
        &self, link: u64, stop: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut by_hooks = self.by_hooks();
        if by_hooks.tracker.is_some_and(|by| by != link) {
            return Ok(());
        }
        by_hooks.tracker = None;
        stop()
    }

    /// Throttles the guest by `throttle`, for the agent of this connection. 0 percent ends the
    /// throttle.
    pub(crate) fn throttle(
        &self, link: u64, percent: u32, throttle: impl FnOnce() -> Reply<()>,
    ) -> Reply<()> {
        let mut by_hooks = self.by_hooks();
        Replaced::check("to throttle the guest", by_hooks.throttled, link)?;
        match throttle() {
            Ok(()) if percent == 0 => by_hooks.throttled = None,
            Ok(()) => by_hooks.throttled = Some(link),
            // A hook that panics may have begun before.
            Err(error) => {
                if percent > 0 && error.code == ErrorCode::Panicked {
                    by_hooks.throttled = Some(link);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Registers the mappings of all blocks, for the agent of this connection to scan. An existing
    /// registration is dropped first, so that nothing is protected at the start.
    pub(crate) fn start_scanning(&self, link: u64, memory: &Memory) -> Reply<()> {
        let mut scanning = self.scanning();
        Scan::check(scanning.as_ref(), link)?;
        *scanning = None;
        let registered =
            register(memory).map_err(|error| RemoteError::new(ErrorCode::System, chain(&error)))?;
        *scanning = Some(Scan { link, registered: Some(registered) });
        Ok(())
    }

    /// True while the mappings are registered for scanning, which excludes another registration.
    pub(crate) fn is_registered(&self) -> bool {
        self.scanning().as_ref().is_some_and(|scan| scan.registered.is_some())
    }

    /// Unregisters the mappings.
    pub(crate) fn stop_scanning(&self, link: u64) {
        // Dropped before the lock: a second caller finds it done.
        self.scanning().take_if(|scanning| scanning.link == link);
    }

    /// Unregisters the mapping at this address, whose block is removed.
    pub(crate) fn forget_mapping(&self, vmm_address: u64) {
        let mut scanning = self.scanning();
        if let Some(registered) = scanning.as_mut().and_then(|scan| scan.registered.as_mut()) {
            registered.forget(vmm_address);
        }
    }

    /// Unregisters the mappings for a while, since the agent of this connection watches writes.
    pub(crate) fn suspend(&self, link: u64) -> Result<(), Replaced> {
        let mut scanning = self.scanning();
        Scan::check(scanning.as_ref(), link)?;
        if let Some(scanning) = &mut *scanning {
            scanning.registered = None;
        }
        Ok(())
    }

    /// Registers the suspended mappings again.
    pub(crate) fn resume(&self, memory: &Memory) {
        let mut scanning = self.scanning();
        let Some(scanning) = scanning.as_mut().filter(|scanning| scanning.registered.is_none())
        else {
            return;
        };
        match register(memory) {
            Ok(registered) => scanning.registered = Some(registered),
            // The next scan of the agent finds the mappings unregistered and fails.
            Err(error) => {
                let error = chain(&error);
                log::warn!(
                    "write-protect tracking ends: the mappings cannot be registered again: {error}"
                );
            }
        }
    }

    /// The agent of this connection is lost: unregisters its mappings, and stops its tracker by
    /// `stop` if it has started one.
    pub(crate) fn agent_lost<E>(
        &self, link: u64, stop: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        self.stop_scanning(link);
        let mut by_hooks = self.by_hooks();
        match by_hooks.tracker.take_if(|by| *by == link) {
            Some(_) => stop(),
            None => Ok(()),
        }
    }

    /// The agent of this connection is lost: ends its throttle by `lift`.
    pub(crate) fn lift_throttle<E>(
        &self, link: u64, lift: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut by_hooks = self.by_hooks();
        match by_hooks.throttled.take_if(|by| *by == link) {
            Some(_) => lift(),
            None => Ok(()),
        }
    }
}

impl Scan {
    /// Refuses a request of `link` if the agent of a later connection scans.
    fn check(scanning: Option<&Self>, link: u64) -> Result<(), Replaced> {
        Replaced::check("write-protect scanning", scanning.map(|scan| scan.link), link)
    }
}

fn register(memory: &Memory) -> Result<Registration, Error> {
    Registration::register_all(memory, UserfaultPurpose::WriteTracking)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: u64 = 7;
    const NEW: u64 = 8;

    fn nothing() -> Reply<()> {
        Ok(())
    }

    fn not_called() -> Reply<()> {
        panic!("the VMM is called for an agent that was replaced")
    }

    #[test]
    fn what_the_next_agent_has_started_the_one_before_neither_starts_nor_clears_nor_stops() {
        let tracking = ActiveTrackers::default();
        tracking.start_hooks(OLD, nothing).unwrap();
        tracking.start_hooks(NEW, nothing).unwrap();
        tracking.throttle(NEW, 30, nothing).unwrap();
        for refused in [
            tracking.start_hooks(OLD, not_called),
            tracking.use_hooks(OLD, not_called),
            tracking.throttle(OLD, 0, not_called),
        ] {
            assert_eq!(refused.unwrap_err().code, ErrorCode::State);
        }
        tracking.stop_hooks(OLD, not_called).unwrap();
        tracking.agent_lost(OLD, not_called).unwrap();
        tracking.lift_throttle(OLD, not_called).unwrap();
        let mut calls = 0;
        let mut called = || {
            calls += 1;
            nothing()
        };
        tracking.agent_lost(NEW, &mut called).unwrap();
        tracking.lift_throttle(NEW, &mut called).unwrap();
        assert_eq!(calls, 2);
    }

    #[test]
    fn only_what_was_throttled_is_lifted() {
        let fails = |code| move || Err(RemoteError::new(code, "no throttle"));
        for (code, throttled) in [(ErrorCode::Other, false), (ErrorCode::Panicked, true)] {
            let tracking = ActiveTrackers::default();
            tracking.throttle(NEW, 20, fails(code)).unwrap_err();
            let mut lifted = false;
            let mut lift = || {
                lifted = true;
                nothing()
            };
            tracking.lift_throttle(NEW, &mut lift).unwrap();
            assert_eq!(lifted, throttled, "{code:?}");
        }
        // A throttle that cannot be raised or ended is still on.
        for percent in [0, 40] {
            let tracking = ActiveTrackers::default();
            tracking.throttle(NEW, 20, nothing).unwrap();
            tracking.throttle(NEW, percent, fails(ErrorCode::Other)).unwrap_err();
            assert_eq!(tracking.by_hooks().throttled, Some(NEW), "{percent}");
        }
    }

    #[test]
    fn the_agent_before_takes_no_registration_from_the_scan_of_the_next_one() {
        let tracking = ActiveTrackers::default();
        *tracking.scanning() = Some(Scan { link: NEW, registered: None });
        let memory = Memory::new(1 << 30, None).unwrap();
        assert_eq!(tracking.start_scanning(OLD, &memory).unwrap_err().code, ErrorCode::State);
        assert_eq!(tracking.suspend(OLD), Err(Replaced("write-protect scanning")));
        tracking.stop_scanning(OLD);
        assert_eq!(tracking.scanning().as_ref().map(|scan| scan.link), Some(NEW));
        tracking.suspend(NEW).unwrap();
    }
}
