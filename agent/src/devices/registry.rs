// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of an agent, as its session and its jobs see them.

use super::balloon::Balloon;
use super::balloon::hints::FreePages;
use super::device::Device;
use super::mem::port::MemDevice;
use super::port::DevicePort;
use crate::memory::GuestMemory;
use std::sync::{Arc, OnceLock};

/// The devices. Each is set once, before the agent serves anybody.
#[derive(Debug, Default)]
pub struct Devices {
    balloon: OnceLock<(Arc<Balloon>, Arc<DevicePort>)>,
    mem: OnceLock<(Arc<MemDevice>, Arc<DevicePort>)>,
}

impl Devices {
    /// The agent has this balloon.
    pub fn set_balloon(&self, balloon: Arc<Balloon>, port: Arc<DevicePort>) {
        // Set twice only by a defect; then the first one counts.
        let _ = self.balloon.set((balloon, port));
    }

    /// The agent has this virtio-mem device.
    pub fn set_mem(&self, mem: Arc<MemDevice>, port: Arc<DevicePort>) {
        let _ = self.mem.set((mem, port));
    }

    /// The balloon.
    pub fn balloon(&self) -> Option<&(Arc<Balloon>, Arc<DevicePort>)> {
        self.balloon.get()
    }

    /// The virtio-mem device.
    pub fn mem(&self) -> Option<&(Arc<MemDevice>, Arc<DevicePort>)> {
        self.mem.get()
    }

    fn ports(&self) -> impl Iterator<Item = &Arc<DevicePort>> {
        let balloon = self.balloon().map(|(_, port)| port);
        balloon.into_iter().chain(self.mem().map(|(_, port)| port))
    }

    /// All devices.
    pub fn all(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        self.ports().map(|port| port.device())
    }

    /// A job has changed its phase: devices that may change the memory again go on.
    pub fn wake(&self) {
        self.ports().for_each(|port| port.wake());
    }

    /// Asks the guest for its free pages, until the result is dropped. `None` if there is no driver
    /// that would answer.
    pub fn ask_for_free_pages(&self, memory: &Arc<GuestMemory>) -> Option<AskedForFreePages> {
        let (balloon, port) = self.balloon()?.clone();
        let pages = balloon.begin_hints(memory)?;
        port.config_changed();
        Some(AskedForFreePages { balloon, port, pages })
    }
}

/// The guest was asked for its free pages. It keeps them until this is dropped.
#[derive(Debug)]
pub struct AskedForFreePages {
    balloon: Arc<Balloon>,
    port: Arc<DevicePort>,
    pages: Arc<FreePages>,
}

impl AskedForFreePages {
    /// The free pages, which the guest adds to all the time.
    pub fn pages(&self) -> &FreePages {
        &self.pages
    }
}

impl Drop for AskedForFreePages {
    fn drop(&mut self) {
        self.balloon.end_hints();
        self.port.config_changed();
    }
}
