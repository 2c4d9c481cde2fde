// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices of an agent, as its session and its jobs see them.

use super::access::SessionMemory;
use super::balloon::Balloon;
use super::balloon::hints::FreePages;
use super::device::Device;
use super::mem::port::{MemDevice, MemOptions};
use super::port::DevicePort;
use super::socket::DeviceSocket;
use crate::lock::lock;
use crate::memory::GuestMemory;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

/// The devices. Each is made once.
#[derive(Debug, Default)]
pub struct Devices {
    session: OnceLock<Arc<dyn SessionMemory>>,
    /// The threads that serve front-ends. Held while a device is made.
    sockets: Mutex<Vec<DeviceSocket>>,
    balloon: OnceLock<(Arc<Balloon>, Arc<DevicePort>)>,
    mem: OnceLock<(Arc<MemDevice>, Arc<DevicePort>)>,
}

/// A device that is to be made.
#[derive(Debug, Clone)]
pub enum NewDevice {
    /// The balloon.
    Balloon,
    /// virtio-mem.
    Mem(MemOptions),
}

/// Why a front-end of the VMM is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The device is configured already.
    #[error(
        "the virtio-mem device of this agent is block {:?} in units of {:#x} bytes, not block {:?} \
         in units of {:#x}", has.block, has.block_size, asked.block, asked.block_size
    )]
    OtherOptions {
        /// What it is.
        has: MemOptions,
        /// What was asked for.
        asked: MemOptions,
    },
    /// A front-end waits already.
    #[error("another front-end waits for the {0} already: end one of the two before it")]
    Busy(&'static str),
    /// The kernel refused.
    #[error("the device cannot be made")]
    Kernel(#[from] io::Error),
}

impl Devices {
    /// The devices change the memory of this session. Set once, before the agent serves anybody.
    pub fn set_session(&self, session: Arc<dyn SessionMemory>) {
        // Set twice only by a defect; then the first one counts.
        let _ = self.session.set(session);
    }

    /// Makes a device whose front-ends connect to `path`.
    ///
    /// # Errors
    /// If the path cannot be bound, or the kernel refuses a thread.
    pub fn listen(&self, new: NewDevice, path: &Path) -> io::Result<()> {
        let mut sockets = lock(&self.sockets);
        sockets.push(DeviceSocket::start(Some(path), self.make(new)?)?);
        Ok(())
    }

    /// Connects a front-end of the VMM to a device, which is made if there is none.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(&self, asked: NewDevice, front_end: OwnedFd) -> Result<(), ConnectError> {
        let mut sockets = lock(&self.sockets);
        let has = match &asked {
            NewDevice::Balloon => self.balloon().map(|(_, port)| port.clone()),
            NewDevice::Mem(asked) => match self.mem() {
                Some((mem, _)) if mem.options() != asked => {
                    let (has, asked) = (mem.options().clone(), asked.clone());
                    return Err(ConnectError::OtherOptions { has, asked });
                }
                mem => mem.map(|(_, port)| port.clone()),
            },
        };
        let port = match has {
            Some(port) => port,
            None => {
                let port = self.make(asked)?;
                sockets.push(DeviceSocket::start(None, port.clone())?);
                port
            }
        };
        let name = port.device().name();
        if port.hand_over(front_end) { Ok(()) } else { Err(ConnectError::Busy(name)) }
    }

    /// Ends the threads that serve front-ends.
    pub fn stop(&self) {
        let sockets = std::mem::take(&mut *lock(&self.sockets));
        drop(sockets);
    }

    fn make(&self, new: NewDevice) -> io::Result<Arc<DevicePort>> {
        let session = self.session.get().ok_or(io::ErrorKind::NotConnected)?;
        Ok(match new {
            NewDevice::Balloon => {
                let balloon = Arc::new(Balloon::default());
                let port = DevicePort::new(balloon.clone(), session.clone())?;
                self.balloon.get_or_init(|| (balloon, port)).1.clone()
            }
            NewDevice::Mem(options) => {
                let mem = Arc::new(MemDevice::new(options, session.clone()));
                let port = DevicePort::new(mem.clone(), session.clone())?;
                self.mem.get_or_init(|| (mem, port)).1.clone()
            }
        })
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
