// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the threads of the connections share with the reactor's thread.

use crate::devices::access::SessionMemory;
use crate::event::Event;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::metrics::Sample;
use crate::session::shared::SharedSession;
use crate::upgrade::wish::UpgradeWish;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// Shared by the threads of the connections and the reactor's thread.
#[derive(Debug)]
pub(super) struct Hub {
    /// The session with the VMM.
    pub(super) session: SharedSession,
    /// Wakes the reactor.
    pub(super) notify: Arc<Event>,
    /// An upgrade that an operator asks for.
    pub(super) upgrade: UpgradeWish,
    /// Tokens of connections whose threads have ended.
    ended: Mutex<Vec<u64>>,
    /// Number of connections.
    connections: AtomicUsize,
}

/// The session's memory for a device, which does not keep the hub.
#[derive(Debug)]
pub(super) struct HubMemory(pub(super) Weak<Hub>);

impl SessionMemory for HubMemory {
    fn with_memory(&self, act: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool {
        self.0.upgrade().is_some_and(|hub| hub.session.with_memory(act))
    }

    fn memory(&self) -> Option<Arc<GuestMemory>> {
        self.0.upgrade().map(|hub| hub.session.memory())
    }
}

impl Hub {
    pub(super) fn new(session: SharedSession, notify: Arc<Event>) -> Self {
        let (upgrade, ended, connections) = Default::default();
        Self { session, notify, upgrade, ended, connections }
    }

    /// Reports to the reactor that the thread of a connection ends.
    pub(super) fn connection_ended(&self, token: u64) {
        lock(&self.ended).push(token);
        self.notify.signal();
    }

    /// The upgrade that was checked is to be made.
    pub(super) fn want_upgrade(&self) {
        self.upgrade.want();
        self.notify.signal();
    }

    /// Takes the tokens of the connections whose threads have ended.
    pub(super) fn take_ended(&self) -> Vec<u64> {
        std::mem::take(&mut *lock(&self.ended))
    }

    /// Sets the number of connections, for metrics.
    pub(super) fn set_connections(&self, count: usize) {
        self.connections.store(count, Ordering::Relaxed);
    }

    /// What metrics say about this agent now.
    pub(super) fn sample(&self) -> Sample {
        let connections = self.connections.load(Ordering::Relaxed);
        Sample { connections, session: self.session.sample() }
    }
}
