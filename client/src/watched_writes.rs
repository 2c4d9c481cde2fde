// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Watched writes: a background snapshot, on the side of the VMM.
//!
//! 1. While the guest runs, the agent asks the client to register the mappings of all blocks.
//! 2. The agent protects the memory and has the guest paused for a moment. The image will hold the
//!    memory as it is at that moment.
//! 3. A vCPU or a thread of the VMM that writes to a protected page waits until the agent has saved
//!    the page.
//! 4. When everything is saved, the client unregisters the mappings.
//!
//! # The agent is lost meanwhile
//!
//! Only the snapshot is lost. The client unregisters the mappings at once. That removes all
//! protection, and the writers that wait continue (`vmm-survives`). If the agent still lives, it
//! finds that out when it protects the next page.
//!
//! One case remains. The kernel checks only that a mapping is registered, not with which
//! userfaultfd. When the next agent watches writes, an earlier agent that was given up and wakes up
//! could protect pages for a moment, or remove protection. So the client attaches no agent before
//! the earlier one has exited ([`Client::reattach`](crate::Client::reattach)).
//!
//! The thread of the hook channel cannot be relied on to do this: it may itself wait for a page, in
//! a hook. So the heartbeat does it, too, and the first of the two succeeds.

use crate::error::Error;
use crate::heartbeat::{BUSY_INTERVAL, Heartbeat, Probe, WatchedSockets};
use crate::link::Link;
use crate::mapping_process::UserfaultPurpose;
use crate::memory::Memory;
use crate::registration::Registration;
use crate::sync::lock;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

/// The registration, if there is one. A client and its hook channels share it.
#[derive(Debug, Default)]
pub(crate) struct WatchedWrites {
    watched: Mutex<Option<Watch>>,
    /// The connection for which the VMM was told that writes are watched, and not yet that they are
    /// not. Locked while the VMM is told. The heartbeat never takes this lock, since it must not
    /// wait for a hook.
    announced: Mutex<Option<u64>>,
}

#[derive(Debug)]
struct Watch {
    _registered: Registration,
    _heartbeat: Heartbeat,
    /// The connection whose agent saves the pages. Later connections have larger numbers.
    link: u64,
}

impl WatchedWrites {
    fn watched(&self) -> MutexGuard<'_, Option<Watch>> {
        lock(&self.watched)
    }

    fn announced(&self) -> MutexGuard<'_, Option<u64>> {
        lock(&self.announced)
    }

    /// Tells the VMM by `tell` that the agent of this connection watches writes. Returns false and
    /// tells nothing if this agent or a later one does already. If an earlier one does, the VMM is
    /// told again, and does not hear of the end of the earlier one.
    pub(crate) fn announce<E>(
        &self, link: u64, tell: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut announced = self.announced();
        if announced.is_some_and(|by| by >= link) {
            return Ok(false);
        }
        tell()?;
        *announced = Some(link);
        Ok(true)
    }

    /// Tells the VMM by `tell` that writes are no longer watched, if the agent of this connection
    /// watched them.
    pub(crate) fn withdraw(&self, link: u64, tell: impl FnOnce()) {
        // Locked while the VMM is told, so that the next announcement comes after it.
        let mut announced = self.announced();
        if announced.take_if(|by| *by == link).is_some() {
            tell();
        }
    }

    /// Registers the mappings of all blocks and starts a heartbeat. Returns the userfaultfd for the
    /// agent; `None` if this agent or a later one has it already.
    pub(crate) fn watch(
        self: &Arc<Self>, memory: &Memory, link: Arc<Link>, probe: Probe,
    ) -> Result<Option<OwnedFd>, Error> {
        // Locked to the end: the heartbeat may find the agent dead at once, and then needs the
        // registration.
        let mut watched = self.watched();
        let id = link.id;
        if watched.as_ref().is_some_and(|watched| watched.link >= id) {
            return Ok(None);
        }
        // The registration of an earlier agent, whose heartbeat is about to find its end.
        *watched = None;
        let registered = Registration::register_all(memory, UserfaultPurpose::WatchedWrites)?;
        let for_agent = registered.duplicate()?;
        let weak = Arc::downgrade(self);
        let heartbeat = Heartbeat::start(
            probe,
            link,
            BUSY_INTERVAL,
            WatchedSockets::Both,
            |_| false,
            move |_| {
                if let Some(writes) = weak.upgrade() {
                    writes.agent_lost(id);
                }
            },
        )?;
        *watched = Some(Watch { _registered: registered, _heartbeat: heartbeat, link: id });
        Ok(Some(for_agent))
    }

    /// True while writes are watched.
    pub(crate) fn are_watched(&self) -> bool {
        self.watched().is_some()
    }

    /// Unregisters the mappings, if they are registered for this connection. True if they were.
    pub(crate) fn unwatch(&self, link: u64) -> bool {
        // Dropped before the lock: a second caller finds it done.
        self.watched().take_if(|watched| watched.link == link).is_some()
    }

    /// The same, since the agent is lost.
    pub(crate) fn agent_lost(&self, link: u64) {
        if self.unwatch(link) {
            log::warn!(
                "the agent is lost while it watched writes: its snapshot is lost, too, and the guest continues"
            );
        }
    }
}
