// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of this agent: what they may do to the session's memory, and what operators ask of
//! them.

use super::native_requests::{Answer, Success};
use super::shared::SharedSession;
use super::{invalid, take_fds};
use crate::devices::mem::port::MemOptions;
use crate::devices::registry::{ConnectError, Devices, NewDevice};
use crate::error::chain;
use crate::memory::GuestMemory;
use crate::transport::address::check_socket;
use crate::waiting::may_wait;
use pageferry_protocol::control::devices::DeviceSpec;
use pageferry_protocol::control::reply::{ErrorCode, RemoteError};
use pageferry_protocol::error::size;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How long the guest may take to send statistics. It sends them in a millisecond, unless it is
/// paused.
const STATS_TIMEOUT: Duration = Duration::from_secs(2);

/// As [`SharedSession::wait_for_devices`], for the sets of blocks that share the order of `memory`.
pub(super) fn wait_for_devices(memory: &GuestMemory) {
    may_wait("wait for a buffer of a device");
    drop(memory.populating());
}

impl SharedSession {
    /// The devices of the agent.
    pub fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// See [`SessionMemory`](crate::devices::access::SessionMemory).
    pub fn with_memory(&self, act: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool {
        loop {
            let memory = self.lock().memory.clone();
            let _populating = memory.populating();
            let job = {
                let session = self.lock();
                if !Arc::ptr_eq(&session.memory, &memory) {
                    // The VMM has changed its blocks, and need not wait for this device any more.
                    continue;
                }
                session.job.as_ref().map(|(job, _)| job.clone())
            };
            // Another agent may have the memory by now.
            if memory.current.check().is_err() {
                return false;
            }
            return match job {
                Some(job) => job.populate_if_allowed(|| act(&memory)).is_ok(),
                None => {
                    act(&memory);
                    true
                }
            };
        }
    }

    /// Waits until no device is in the middle of a buffer that it began before this call. A device
    /// that begins later finds the session as it is now.
    pub(super) fn wait_for_devices(&self) {
        let memory = self.lock().memory.clone();
        wait_for_devices(&memory);
    }

    /// The memory, to look at.
    pub fn memory(&self) -> Arc<GuestMemory> {
        self.lock().memory.clone()
    }

    /// Answers CONNECT_DEVICE.
    pub(super) fn connect_device(&self, device: DeviceSpec, fds: Vec<OwnedFd>) -> Answer {
        let [front_end] = take_fds("connect device", fds)?;
        if let Some(id) = self.memory().clone_block() {
            let sentence = format!(
                "block {id} is a clone's, whose memory no device of another process can map: use \
                 the VMM's own devices"
            );
            return Err(RemoteError::new(ErrorCode::Invalid, sentence));
        }
        let front_end = check_socket(front_end).map_err(|error| invalid(&error))?;
        let device = match device {
            DeviceSpec::Balloon => NewDevice::Balloon,
            DeviceSpec::Mem { block, block_size } => {
                NewDevice::Mem(MemOptions { block, block_size })
            }
        };
        self.devices.connect(device, front_end).map_err(|error| {
            let code = match &error {
                ConnectError::OtherOptions { .. } => ErrorCode::Invalid,
                ConnectError::Busy(_) => ErrorCode::Busy,
                ConnectError::Kernel(_) => ErrorCode::System,
            };
            RemoteError::new(code, chain(&error))
        })?;
        Ok(Success::Done)
    }

    /// Answers PLUGGED_MEMORY.
    pub(super) fn plugged_memory(&self, requested: Option<u64>) -> Answer {
        let Some((mem, port)) = self.devices.mem() else {
            let sentence = "this agent has no virtio-mem device: start it with --mem PATH, or have \
                            the VMM connect to one (Client::device_socket); a QEMU of pageferry \
                            qemu uses its own (virtio-mem-pci)";
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
        let Some((balloon, port)) = self.devices.balloon() else {
            let sentence = "this agent has no balloon: start it with --balloon PATH, or have the \
                            VMM connect to one (Client::device_socket); a QEMU of pageferry qemu \
                            uses its own (balloon in its monitor)";
            return Err(RemoteError::new(ErrorCode::NotFound, sentence));
        };
        if let Some(target) = target {
            let memory: u64 =
                self.memory().blocks().iter().map(|block| block.geometry.length).sum();
            if target > memory {
                let sentence = format!(
                    "the target is {}, allowed: at most the {} of the VM",
                    size(target),
                    size(memory)
                );
                return Err(RemoteError::new(ErrorCode::Invalid, sentence));
            }
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
