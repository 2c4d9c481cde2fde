//! The guest's writes into pages that are not saved yet: a background snapshot, seen from the VMM.
//!
//! The agent asks for the registration while the guest runs, protects the memory, and has the guest
//! paused for a moment: what its memory is then is saved. Who writes into a protected page, a vCPU
//! or a thread of the VMM, waits until the agent has saved it. When all is saved the registration
//! is taken back.
//!
//! # If the agent dies in between
//!
//! Nothing is missing but the snapshot. So the registration is taken back at once, which lifts all
//! protection, and who waits writes and goes on (`vmm-survives`). The agent, if it lives after all,
//! finds that out when it next protects a page: nothing is registered there any more. But the
//! kernel asks only whether a mapping is registered, not with which userfaultfd: once the next
//! agent watches, one that was given up for hanging and wakes up again could protect, and lift, for
//! a moment. So it is dead before the next is attached
//! ([`Client::reattach`](crate::Client::reattach)).
//!
//! This must not take the thread of the hook channel, which may itself wait for a page, in a hook.
//! So the heartbeat does it, too: whichever comes first.

use crate::error::Error;
use crate::heartbeat::{BUSY_INTERVAL, Heartbeat, Probe, WatchedSockets};
use crate::link::Link;
use crate::memory::Memory;
use crate::registration::Registration;
use crate::sync::lock;
use pageferry_protocol::userfault::{RegisterMode, feature};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

/// The registration, if there is one. Shared by a client and its hook channels.
#[derive(Debug, Default)]
pub(crate) struct WatchedWrites {
    watched: Mutex<Option<Watch>>,
    /// The connection for which the VMM was told that writes are watched, and not yet that they are
    /// not. Held while the VMM is told: never by the heartbeat, which must not wait for a hook.
    announced: Mutex<Option<u64>>,
}

#[derive(Debug)]
struct Watch {
    _registered: Registration,
    _heartbeat: Heartbeat,
    /// The connection whose agent saves what is about to be written. Later ones have larger
    /// numbers.
    link: u64,
}

impl WatchedWrites {
    fn watched(&self) -> MutexGuard<'_, Option<Watch>> {
        lock(&self.watched)
    }

    fn announced(&self) -> MutexGuard<'_, Option<u64>> {
        lock(&self.announced)
    }

    /// Tells the VMM by `tell` that the agent of this connection watches writes. False, and nothing
    /// is told, if this agent, or a later one, does already. One that takes over from an earlier
    /// agent tells it again; the end of the earlier one is not told then.
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

    /// Tells the VMM by `tell` that writes are not watched any more, if it is this connection's
    /// agent that watched them.
    pub(crate) fn withdraw(&self, link: u64, tell: impl FnOnce()) {
        // The lock is held while it is told: who announces next comes after it.
        let mut announced = self.announced();
        if announced.take_if(|by| *by == link).is_some() {
            tell();
        }
    }

    /// Registers the mappings of all blocks, and has the agent watched. Returns the userfaultfd for
    /// the agent; `None` if this one, or one after it, has it already.
    pub(crate) fn watch(
        self: &Arc<Self>, memory: &Memory, link: Arc<Link>, probe: Probe,
    ) -> Result<Option<OwnedFd>, Error> {
        // Kept until the end: the heartbeat may find the agent dead at once, and is to find the
        // registration then.
        let mut watched = self.watched();
        let id = link.id;
        if watched.as_ref().is_some_and(|watched| watched.link >= id) {
            return Ok(None);
        }
        // An agent before this one, whose end its own heartbeat is just finding.
        *watched = None;
        let registered = Registration::register_all(
            memory,
            feature::WP_HUGETLBFS_SHMEM,
            RegisterMode::WriteProtect,
        )?;
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

    /// Takes the registration of this connection's agent back, if it has one. True if it had.
    pub(crate) fn unwatch(&self, link: u64) -> bool {
        // Dropped before the lock is: who comes second finds it done.
        self.watched().take_if(|watched| watched.link == link).is_some()
    }

    /// The same, since the agent is lost.
    pub(crate) fn agent_lost(&self, link: u64) {
        if self.unwatch(link) {
            log::warn!(
                "the agent is lost while writes were watched: its snapshot is, too, and the guest runs on"
            );
        }
    }
}
