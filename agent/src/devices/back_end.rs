// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The side of the library `vhost-user-backend`: it handles the messages of a front-end, maps the
//! guest's memory, and calls this when a queue has something.
//!
//! One thread serves all queues of a device, buffer after buffer. For each buffer the session is
//! asked for its memory. While a job allows no change, the buffer waits in the queue, and the
//! thread looks again when it is woken ([`DevicePort::wake`]).
//!
//! The library ends the thread if this returns an error. So nothing that a guest or a front-end
//! does is one: a queue whose driver breaks the rules is left alone until the driver sets it up
//! again.

use super::access::SessionMemory;
use super::buffer::{Buffer, Mapped};
use super::device::{Device, Handled};
use super::guest_map::{DeviceMemory, FrontEndTable, GuestMap};
use super::state_transfer::StateTransfer;
use crate::event::Event;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::memory::bus_guard::GuardedRange;
use pageferry_protocol::control::FrameSocket;
use pageferry_protocol::memory::PageRange;
use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// The memory of a front-end, which it can replace.
pub type Memory = GuestMemoryAtomic<Mapped>;
type Ring = VringMutex<Memory>;

/// Most descriptors of a queue.
const MAX_QUEUE_SIZE: usize = 1024;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// How long a page that is missing may take to come. Then the queue waits for the next event.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a front-end may leave the message of a change unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// A device of the agent, with or without a front-end.
#[derive(Debug)]
pub struct DevicePort {
    device: Arc<dyn Device>,
    session: Arc<dyn SessionMemory>,
    wake: Event,
    /// The socket by which the front-end hears of changes. The relay sets it.
    front_end: Mutex<Option<FrameSocket>>,
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
        *lock(&self.front_end) = socket;
    }

    /// Tells the driver that the configuration has changed, if there is one.
    pub fn config_changed(&self) {
        let mut front_end = lock(&self.front_end);
        let deadline = Instant::now() + SEND_TIMEOUT;
        let sent = front_end
            .as_ref()
            .map(|socket| socket.send_parts(CONFIG_CHANGE, 0, &[], &[], deadline));
        if let Some(Err(error)) = sent {
            let name = self.device.name();
            log::warn!("{name}: the front-end does not hear of a change: {error}");
            // It may be in the middle of a message.
            *front_end = None;
        }
    }
}

/// A connection of a front-end to a device.
#[derive(Clone)]
pub struct Connection(Arc<State>);

struct State {
    port: Arc<DevicePort>,
    table: Mutex<Table>,
    /// Held while a buffer is handled.
    processing: Mutex<GuestMap>,
    transfer: StateTransfer,
    /// Queues that are not served any more.
    broken: Mutex<Vec<bool>>,
    /// Dropped with the last copy of the connection.
    _alive: Sender<()>,
}

/// The front-end's memory.
#[derive(Default)]
struct Table {
    // Before the memory, so that the guards are dropped first.
    _guards: Vec<GuardedRange>,
    mapped: Option<GuestMemoryLoadGuard<Mapped>>,
    regions: FrontEndTable,
    is_new: bool,
}

impl Connection {
    /// A front-end has connected. The receiver is disconnected when the connection and its threads
    /// have ended.
    pub fn new(port: Arc<DevicePort>) -> (Self, Receiver<()>) {
        let (alive, ended) = channel();
        port.device.connected();
        let broken = vec![false; port.device.max_queues()];
        let state = State {
            transfer: StateTransfer::new(port.device.clone()),
            port,
            table: Mutex::default(),
            processing: Mutex::default(),
            broken: Mutex::new(broken),
            _alive: alive,
        };
        (Self(Arc::new(state)), ended)
    }

    /// The event by which the thread of the queues is woken has this number.
    pub fn wake_token(&self) -> u64 {
        // The library uses the numbers of the queues, and the one that follows.
        self.0.port.device.max_queues() as u64 + 1
    }
}

/// What has become of the next buffer of a queue.
enum Step {
    /// There is none, or the queue is not served.
    Idle,
    /// It was handled.
    Handled,
    /// These pages must be here first.
    Needs(Vec<(usize, PageRange)>),
}

impl State {
    /// Handles what is in a queue.
    fn process(&self, queue: usize, rings: &[Ring]) {
        loop {
            let mut step = Step::Idle;
            let act = &mut |memory: &Arc<GuestMemory>| step = self.step(queue, rings, memory);
            // The thread is woken when it may go on.
            if !self.port.session.with_memory(act) {
                return;
            }
            match step {
                Step::Idle => return,
                Step::Handled => {}
                Step::Needs(pages) => {
                    let memory = self.port.session.memory();
                    if !memory.is_some_and(|memory| memory.fetch(&pages, FETCH_TIMEOUT)) {
                        let name = self.port.device.name();
                        log::warn!("{name}: queue {queue} waits: its memory does not come");
                        return;
                    }
                }
            }
        }
    }

    /// Handles one buffer, if there is one.
    fn step(&self, queue: usize, rings: &[Ring], memory: &Arc<GuestMemory>) -> Step {
        let mut map = lock(&self.processing);
        let Some(mapped) = self.look_at_table(&mut map, memory) else { return Step::Idle };
        if lock(&self.broken)[queue] {
            return Step::Idle;
        }
        let in_use: Vec<bool> =
            rings.iter().map(|ring| ring.get_ref().get_queue().ready()).collect();
        let view = DeviceMemory::new(memory, &map);
        let mut ring = rings[queue].get_mut();
        if !ring.is_enabled() || !in_use[queue] {
            return Step::Idle;
        }
        let may_be_missing = memory.missing_pages().is_some();
        if may_be_missing {
            let pages = ring_pages(ring.get_queue(), &view);
            if !memory.are_present(&pages) {
                return Step::Needs(pages);
            }
        }
        let next = ring.get_queue_mut().iter(mapped.clone()).map(|mut chains| chains.next());
        let chain = match next {
            Ok(Some(chain)) => chain,
            Ok(None) => return Step::Idle,
            Err(error) => {
                self.break_queue(queue, &error.to_string());
                return Step::Idle;
            }
        };
        let mut buffer = Buffer::new(&mapped, chain);
        if may_be_missing {
            let pages = buffer.touched_pages(&view);
            if !memory.are_present(&pages) {
                ring.get_queue_mut().go_to_previous_position();
                return Step::Needs(pages);
            }
        }
        drop(ring);
        match self.port.device.handle(queue, &in_use, &mut buffer, &view) {
            Handled::Return => self.give_back(&rings[queue], &buffer, &view),
            Handled::Keep => {}
            Handled::Break(why) => self.break_queue(queue, why),
        }
        Step::Handled
    }

    /// Brings the map up to date. `None` while the front-end has given no memory.
    fn look_at_table(
        &self, map: &mut GuestMap, memory: &Arc<GuestMemory>,
    ) -> Option<GuestMemoryLoadGuard<Mapped>> {
        let mut table = lock(&self.table);
        let is_new = std::mem::take(&mut table.is_new);
        map.update(&table.regions, memory, is_new);
        table.mapped.clone()
    }

    fn break_queue(&self, queue: usize, why: &str) {
        let name = self.port.device.name();
        log::warn!("{name}: queue {queue} is not served any more: {why}");
        lock(&self.broken)[queue] = true;
    }

    /// Writes the answer, and returns the buffer to the driver.
    fn give_back(&self, ring: &Ring, buffer: &Buffer<'_>, view: &DeviceMemory<'_>) {
        let mut pages = used_pages(ring, view);
        for (gpa, bytes) in buffer.answer() {
            pages.extend(view.pages(gpa, bytes.len() as u64));
        }
        view.memory().write_by_device(&pages, || {
            let length = buffer.write_answer();
            return_used(ring, buffer.head(), length);
        });
    }

    /// Returns the buffers that the device has kept until now.
    fn return_kept(&self, rings: &[Ring]) {
        while let Some((queue, head)) = self.port.device.take_kept() {
            let returned = self.port.session.with_memory(&mut |memory| {
                let mut map = lock(&self.processing);
                if self.look_at_table(&mut map, memory).is_none() {
                    return;
                }
                let view = DeviceMemory::new(memory, &map);
                let Some(ring) = rings.get(queue).filter(|ring| ring.get_ref().get_queue().ready())
                else {
                    return;
                };
                let pages = used_pages(ring, &view);
                memory.write_by_device(&pages, || return_used(ring, head, 0));
            });
            if !returned {
                self.port.device.keep_again(queue, head);
                return;
            }
        }
    }
}

/// The pages of the ring in which the device returns buffers.
fn used_pages(ring: &Ring, view: &DeviceMemory<'_>) -> Vec<(usize, PageRange)> {
    used_pages_of(ring.get_ref().get_queue(), view)
}

fn used_pages_of(queue: &Queue, view: &DeviceMemory<'_>) -> Vec<(usize, PageRange)> {
    // Flags and index, then 8 bytes for each buffer.
    view.pages(queue.used_ring(), 4 + 8 * u64::from(queue.size()) + 2)
}

/// The pages of a whole queue.
fn ring_pages(queue: &Queue, view: &DeviceMemory<'_>) -> Vec<(usize, PageRange)> {
    let size = u64::from(queue.size());
    let mut pages = view.pages(queue.desc_table(), 16 * size);
    pages.extend(view.pages(queue.avail_ring(), 4 + 2 * size + 2));
    pages.extend(used_pages_of(queue, view));
    pages
}

fn return_used(ring: &Ring, head: u16, length: u32) {
    let mut ring = ring.get_mut();
    let returned = ring.add_used(head, length);
    if let Err(error) = returned {
        log::debug!("a buffer cannot be returned: {error}");
        return;
    }
    if let Err(error) = ring.signal_used_queue() {
        log::debug!("the driver is not told of a buffer: {error}");
    }
}

impl VhostUserBackend for Connection {
    type Bitmap = BitmapMmapRegion;
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.0.port.device.max_queues()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let transport =
            VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        self.0.port.device.features() | 1 << VIRTIO_F_VERSION_1 | transport.bits()
    }

    fn acked_features(&self, features: u64) {
        self.0.port.device.set_driver_features(features);
        lock(&self.0.broken).fill(false);
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
        self.0.port.device.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.0.port.device.config();
        let (start, end) = (offset as usize, offset as usize + size as usize);
        // A front-end that asks for more than there is gets nothing, which the library refuses.
        config.get(start..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.0.port.device.write_config(offset, bytes);
        Ok(())
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let mapped = memory.memory();
        // The guest's memory may be a file that shrinks (`vmm-survives`).
        let guard = |region: &vm_memory::GuestRegionMmap<BitmapMmapRegion>| {
            let start = region.as_ptr() as usize;
            GuardedRange::new(start..start + region.len() as usize)
        };
        let guards = mapped.iter().map(guard).collect();
        let regions = FrontEndTable::of(&mapped);
        let table = Table { _guards: guards, mapped: Some(mapped), regions, is_new: true };
        let before = std::mem::replace(&mut *lock(&self.0.table), table);
        drop(before);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        // The buffer that is being handled is returned before.
        drop(lock(&self.0.processing));
        Ok(())
    }

    fn handle_event(
        &self, event: u16, _set: EventSet, rings: &[Ring], _thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == self.wake_token() {
            self.0.port.wake.reset();
            self.0.return_kept(rings);
            (0..rings.len()).for_each(|queue| self.0.process(queue, rings));
        } else if usize::from(event) < rings.len() {
            self.0.process(event.into(), rings);
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
