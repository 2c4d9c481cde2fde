// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A QEMU that is attached, as the hooks and the main loop share it.

use super::claims::Claims;
use super::guest_memory::{self, FoundBlock, GuestMemoryError};
use super::monitor::Monitor;
use crate::process::target::TargetProcess;
use pageferry_client::{HookError, JobStatus};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

/// The QEMU.
#[derive(Debug)]
pub(super) struct Machine {
    monitor: Mutex<Monitor>,
    pub(super) process: TargetProcess,
    state: Mutex<State>,
    /// Files that no other process may serve.
    claims: Mutex<Claims>,
    /// Readable when `state` has news for the main loop.
    news: OwnedFd,
}

/// Whether a QEMU has a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Guest {
    /// QEMU was started for a guest that comes from elsewhere, and nothing of it is here.
    Awaited,
    /// Its devices were loaded. It has not arrived yet: its source may still keep it.
    Loaded,
    /// It is here.
    #[default]
    Here,
}

/// What the hooks and the main loop tell each other.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The account of QEMU's memory when the blocks were looked at last.
    pub(super) account: Value,
    /// Why QEMU cannot be served since it was looked at last: a device that was plugged in, or
    /// memory that is not understood.
    pub(super) cannot_serve: Option<String>,
    /// The blocks that the agent knows.
    pub(super) known: Vec<FoundBlock>,
    /// Jobs that have ended, for the main loop.
    pub(super) ended: Vec<JobStatus>,
    /// QEMU was started for the guest of a migration that the agent listens for.
    pub(super) listens: bool,
    /// Whether there is a guest.
    pub(super) guest: Guest,
    /// Why there is no guest any more, and this QEMU can take no other; and since when.
    pub(super) is_useless: Option<(String, Instant)>,
}

impl Machine {
    pub(super) fn new(
        monitor: Monitor, process: TargetProcess, guest: Guest,
    ) -> std::io::Result<Arc<Self>> {
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let state = State { guest, ..State::default() };
        let (monitor, state, claims) = (Mutex::new(monitor), Mutex::new(state), Mutex::default());
        Ok(Arc::new(Self { monitor, process, state, claims, news }))
    }

    pub(super) fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The monitor, unless a hook uses it.
    pub(super) fn free_monitor(&self) -> Option<MutexGuard<'_, Monitor>> {
        match self.monitor.try_lock() {
            Ok(monitor) => Some(monitor),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never held while QEMU or the agent is asked.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the main loop.
    pub(super) fn notify(&self) {
        // Fails only if the counter is full, and then the loop is awake.
        let _ = rustix::io::write(&self.news, &1u64.to_ne_bytes());
    }

    pub(super) fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// Nothing new until the next [`Machine::notify`].
    pub(super) fn clear_news(&self) {
        let _ = rustix::io::read(&self.news, &mut [0; 8]);
    }

    /// Refuses if QEMU has other memory or devices than when they were looked at last.
    pub(super) fn check_unchanged(&self, monitor: &mut Monitor) -> Result<(), HookError> {
        if let Some(why) = &self.state().cannot_serve {
            return Err(HookError::new(why));
        }
        if self.has_known_memory(monitor)? {
            return Ok(());
        }
        self.notify();
        Err(HookError::new(
            "memory or a device was plugged in or out while the job ran: start it again",
        ))
    }

    /// True if QEMU has the memory and devices that were looked at last.
    pub(super) fn has_known_memory(&self, monitor: &mut Monitor) -> Result<bool, GuestMemoryError> {
        let account = guest_memory::account(monitor)?;
        let mappings = self.process.mappings()?;
        let state = self.state();
        let is_mapped = |block: &FoundBlock| block.is_mapped(&mappings);
        Ok(state.account == account && state.known.iter().all(is_mapped))
    }

    /// The guest is here, if its devices were loaded.
    pub(super) fn guest_arrived(&self) {
        let mut state = self.state();
        if state.guest == Guest::Loaded {
            state.guest = Guest::Here;
        }
    }

    /// There is no guest here any more.
    pub(super) fn set_useless(&self, why: impl Into<String>) {
        self.state().is_useless.get_or_insert((why.into(), Instant::now()));
        self.notify();
    }
}
