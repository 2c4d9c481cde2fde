// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device of the agent, as the rest of the agent sees it.

use super::access::SessionMemory;
use super::device::Device;
use crate::event::Event;
use crate::lock::lock;
use pageferry_protocol::control::FrameSocket;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// How long a front-end may leave the message of a change unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// A device of the agent, with or without a front-end.
#[derive(Debug)]
pub struct DevicePort {
    device: Arc<dyn Device>,
    session: Arc<dyn SessionMemory>,
    wake: Event,
    front_end: Mutex<FrontEnd>,
}

/// How the driver hears that the configuration has changed.
#[derive(Debug, Default)]
struct FrontEnd {
    /// The front-end's socket for that. The relay sets it.
    socket: Option<FrameSocket>,
    /// The driver has started its queues. QEMU 11.1 ends if it hears of a change before.
    has_started: bool,
    /// There was a change before the driver has started.
    is_late: bool,
}

impl DevicePort {
    /// A device that changes the memory of `session`.
    ///
    /// # Errors
    /// If the kernel refuses an event.
    pub fn new(device: Arc<dyn Device>, session: Arc<dyn SessionMemory>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { device, session, wake: Event::new()?, front_end: Mutex::default() }))
    }

    /// The memory that the device changes.
    pub(super) fn session(&self) -> &Arc<dyn SessionMemory> {
        &self.session
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Its name, for people.
    pub(super) fn name(&self) -> &'static str {
        self.device.name()
    }

    /// Has the thread of the queues look at all of them: a job has changed its phase, or the device
    /// has something to return.
    pub fn wake(&self) {
        self.wake.signal();
    }

    /// Readable after [`DevicePort::wake`].
    pub(super) fn wake_event(&self) -> &Event {
        &self.wake
    }

    /// Sets the socket by which the front-end hears of changes, and removes it.
    pub(super) fn set_front_end(&self, socket: Option<FrameSocket>) {
        *lock(&self.front_end) = FrontEnd { socket, ..FrontEnd::default() };
    }

    /// The driver has started its queues, or has stopped them.
    pub(super) fn set_started(&self, has_started: bool) {
        let mut front_end = lock(&self.front_end);
        front_end.has_started = has_started;
        if has_started && front_end.is_late {
            self.send_change(&mut front_end);
        }
    }

    /// Tells the driver that the configuration has changed, if there is one. It hears of a change
    /// from before it has started when it starts.
    pub fn config_changed(&self) {
        let mut front_end = lock(&self.front_end);
        if front_end.has_started {
            self.send_change(&mut front_end);
        } else {
            front_end.is_late = true;
        }
    }

    fn send_change(&self, front_end: &mut FrontEnd) {
        front_end.is_late = false;
        let deadline = Instant::now() + SEND_TIMEOUT;
        let sent = front_end
            .socket
            .as_ref()
            .map(|socket| socket.send_parts(CONFIG_CHANGE, 0, &[], &[], deadline));
        if let Some(Err(error)) = sent {
            log::warn!("{}: the front-end does not hear of a change: {error}", self.name());
            // It may be in the middle of a message.
            front_end.socket = None;
        }
    }
}
