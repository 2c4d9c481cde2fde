// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device of the agent, as the rest of the agent sees it.

use super::access::SessionMemory;
use super::device::Device;
use crate::event::Event;
use crate::lock::lock;
use pageferry_protocol::control::FrameSocket;
use std::io;
use std::os::fd::OwnedFd;
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
    /// A connection that the VMM has handed over, and the event for who serves it.
    handed_over: Mutex<Option<OwnedFd>>,
    is_handed_over: Event,
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
        Ok(Arc::new(Self {
            device,
            session,
            wake: Event::new()?,
            front_end: Mutex::default(),
            handed_over: Mutex::default(),
            is_handed_over: Event::new()?,
        }))
    }

    /// Hands over a connection of a front-end. It is served when the one before has ended. False if
    /// another one waits for that already.
    pub(super) fn hand_over(&self, front_end: OwnedFd) -> bool {
        let mut handed_over = lock(&self.handed_over);
        if handed_over.is_some() {
            return false;
        }
        *handed_over = Some(front_end);
        self.is_handed_over.signal();
        true
    }

    /// Takes the connection that was handed over.
    pub(super) fn take_handed_over(&self) -> Option<OwnedFd> {
        let mut handed_over = lock(&self.handed_over);
        self.is_handed_over.reset();
        handed_over.take()
    }

    /// Readable when a connection was handed over.
    pub(super) fn handed_over_event(&self) -> &Event {
        &self.is_handed_over
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
