// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the threads of the connections share with the reactor's thread.

use crate::event::Event;
use crate::lock::lock;
use crate::session::shared::SharedSession;
use std::sync::{Arc, Mutex};

/// Shared by the threads of the connections and the reactor's thread.
#[derive(Debug)]
pub(super) struct Hub {
    /// The session with the VMM.
    pub(super) session: SharedSession,
    /// Wakes the reactor.
    pub(super) notify: Arc<Event>,
    /// Tokens of connections whose threads have ended.
    ended: Mutex<Vec<u64>>,
}

impl Hub {
    pub(super) fn new(session: SharedSession, notify: Arc<Event>) -> Self {
        Self { session, notify, ended: Mutex::default() }
    }

    /// Reports to the reactor that the thread of a connection ends.
    pub(super) fn connection_ended(&self, token: u64) {
        lock(&self.ended).push(token);
        self.notify.signal();
    }

    /// Takes the tokens of the connections whose threads have ended.
    pub(super) fn take_ended(&self) -> Vec<u64> {
        std::mem::take(&mut *lock(&self.ended))
    }
}
