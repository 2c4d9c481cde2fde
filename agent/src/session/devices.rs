// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of this agent: what they may do to the session's memory, and what operators ask of
//! them.

use super::native_requests::{Answer, Success};
use super::shared::SharedSession;
use crate::devices::back_end::DevicePort;
use crate::devices::balloon::Balloon;
use crate::devices::mem::port::MemDevice;
use crate::memory::GuestMemory;
use crate::waiting::may_wait;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long the guest may take to send statistics. It sends them in a millisecond, unless it is
/// paused.
const STATS_TIMEOUT: Duration = Duration::from_secs(2);

/// The devices. Each is set once, before the agent serves anybody.
#[derive(Debug, Default)]
pub struct Devices {
    balloon: OnceLock<(Arc<Balloon>, Arc<DevicePort>)>,
    mem: OnceLock<(Arc<MemDevice>, Arc<DevicePort>)>,
}

impl Devices {
    fn ports(&self) -> impl Iterator<Item = &Arc<DevicePort>> {
        let balloon = self.balloon.get().map(|(_, port)| port);
        balloon.into_iter().chain(self.mem.get().map(|(_, port)| port))
    }
}

impl SharedSession {
    /// The agent has this balloon.
    pub fn set_balloon(&self, balloon: Arc<Balloon>, port: Arc<DevicePort>) {
        // Set twice only by a defect; then the first one counts.
        let _ = self.devices.balloon.set((balloon, port));
    }

    /// The agent has this virtio-mem device.
    pub fn set_mem(&self, mem: Arc<MemDevice>, port: Arc<DevicePort>) {
        let _ = self.devices.mem.set((mem, port));
    }

    /// A job has changed its phase: devices that may change the memory again go on.
    pub fn wake_devices(&self) {
        self.devices.ports().for_each(|port| port.wake());
    }

    /// See [`SessionMemory`](crate::devices::access::SessionMemory).
    pub fn with_memory(&self, act: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool {
        let memory = self.lock().memory.clone();
        let populating = memory.populating();
        let job = self.lock().job.as_ref().map(|(job, _)| job.clone());
        let allowed = match job {
            Some(job) => job.populate_if_allowed(|| act(&memory)).is_ok(),
            None => {
                act(&memory);
                true
            }
        };
        drop(populating);
        allowed
    }

    /// The memory, to look at.
    pub fn memory(&self) -> Arc<GuestMemory> {
        self.lock().memory.clone()
    }

    /// Answers PLUGGED_MEMORY.
    pub(super) fn plugged_memory(&self, requested: Option<u64>) -> Answer {
        let Some((mem, port)) = self.devices.mem.get() else {
            let sentence = "this agent has no virtio-mem device: start it with --mem PATH";
            return Err(RemoteError::new(ErrorCode::NotFound, sentence));
        };
        if let Some(requested) = requested {
            let changed = mem
                .set_requested_size(requested)
                .map_err(|sentence| RemoteError::new(ErrorCode::Invalid, sentence))?;
            if changed {
                port.config_changed();
            }
        }
        Ok(Success::PluggedMemory(mem.status()))
    }

    /// Answers BALLOON.
    pub(super) fn balloon(&self, target: Option<u64>, ask_stats: bool) -> Answer {
        let Some((balloon, port)) = self.devices.balloon.get() else {
            let sentence = "this agent has no balloon: start it with --balloon PATH";
            return Err(RemoteError::new(ErrorCode::NotFound, sentence));
        };
        if let Some(target) = target {
            let changed = balloon
                .set_target(target)
                .map_err(|sentence| RemoteError::new(ErrorCode::Invalid, sentence))?;
            if changed {
                port.config_changed();
            }
        }
        if ask_stats {
            may_wait("ask the guest for statistics");
            balloon.refresh_stats(|| port.wake(), STATS_TIMEOUT);
        }
        Ok(Success::Balloon(balloon.status()))
    }
}
