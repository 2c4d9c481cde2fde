// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The side of the library `vhost-user-backend`: it handles the messages of a front-end, maps the
//! guest's memory, and calls this when a queue has something.
//!
//! The library ends its thread if this returns an error for an event. So nothing that a guest or a
//! front-end does is one.

use super::library_fds::ExitEvent;
use super::port::DevicePort;
use super::queues::{Memory, Queues, Ring};
use super::state_transfer::StateTransfer;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

/// Most descriptors of a queue.
const MAX_QUEUE_SIZE: usize = super::buffer::MAX_DESCRIPTORS;

/// A connection of a front-end to a device.
#[derive(Clone)]
pub struct Connection(Arc<State>);

struct State {
    port: Arc<DevicePort>,
    queues: Queues,
    transfer: StateTransfer,
    exit: ExitEvent,
    /// Dropped with the last copy of the connection.
    _alive: Sender<()>,
}

impl Connection {
    /// A front-end has connected. The receiver is disconnected when the connection and its threads
    /// have ended.
    pub fn new(port: Arc<DevicePort>) -> (Self, Receiver<()>) {
        let (alive, ended) = channel();
        port.device().connected();
        let state = State {
            queues: Queues::new(port.clone()),
            transfer: StateTransfer::new(port.device().clone()),
            port,
            exit: ExitEvent::default(),
            _alive: alive,
        };
        (Self(Arc::new(state)), ended)
    }

    /// The event by which the thread of the queues is woken has this number.
    pub fn wake_token(&self) -> u64 {
        // The library uses the numbers of the queues, and the one that follows.
        self.0.port.device().max_queues() as u64 + 1
    }

    /// Ends what the threads of this connection do and wait for.
    pub fn end(&self) {
        self.0.queues.end();
        self.0.transfer.end();
    }
}

impl VhostUserBackend for Connection {
    type Bitmap = BitmapMmapRegion;
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.0.port.device().max_queues()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let transport =
            VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        self.0.port.device().features() | 1 << VIRTIO_F_VERSION_1 | transport.bits()
    }

    fn acked_features(&self, features: u64) {
        self.0.port.device().set_driver_features(features);
        self.0.queues.mend();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    fn reset_device(&self) {
        self.0.port.device().reset();
        self.0.queues.mend();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.0.port.device().config();
        let (start, end) = (offset as usize, offset as usize + size as usize);
        // A front-end that asks for more than there is gets nothing, which the library refuses.
        config.get(start..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.0.port.device().write_config(offset, bytes);
        Ok(())
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.0.queues.set_memory(&memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.0.exit.make()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.0.queues.stop(queue as usize);
        Ok(())
    }

    fn handle_event(
        &self, event: u16, _set: EventSet, rings: &[Ring], _thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == self.wake_token() {
            self.0.queues.woken(rings);
        } else {
            self.0.queues.kicked(event.into(), rings);
        }
        Ok(())
    }

    fn set_device_state_fd(
        &self, direction: VhostTransferStateDirection, _phase: VhostTransferStatePhase, file: File,
    ) -> io::Result<Option<File>> {
        self.0.transfer.begin(direction, file)?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.0.transfer.finish()
    }
}
