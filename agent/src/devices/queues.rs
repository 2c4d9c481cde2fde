// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The queues of a connection: takes one buffer after another, and returns it.
//!
//! One thread serves all queues of a device. For each buffer the session is asked for its memory.
//! While a job allows no change, the buffer waits in the queue, and the thread looks again when it
//! is woken ([`DevicePort::wake`]).
//!
//! The guest may write anything into its queues. A queue whose driver breaks the rules is left
//! alone until the driver sets the device up again.

use super::buffer::{Buffer, Mapped};
use super::device::Handled;
use super::guest_map::{DeviceMemory, FrontEndTable, GuestMap};
use super::library_fds::is_writable;
use super::port::DevicePort;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::memory::bus_guard::GuardedRange;
use pageferry_protocol::memory::PageRange;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryRegion, GuestRegionMmap,
};

/// The memory of a front-end, which it can replace.
pub type Memory = GuestMemoryAtomic<Mapped>;
/// A queue, and the events of its driver.
pub(super) type Ring = VringMutex<Memory>;

/// How long a page that is missing may take to come. Then the queue waits for the next event.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Buffers of a queue before the others have their turn.
const TURN: u32 = 256;

/// The queues of a connection.
pub(super) struct Queues {
    port: Arc<DevicePort>,
    table: Mutex<Table>,
    /// Held while a buffer is handled.
    processing: Mutex<GuestMap>,
    /// Queues that are not served any more.
    broken: Mutex<Vec<bool>>,
    /// Known from the first event on.
    rings: OnceLock<Vec<Ring>>,
    ending: AtomicBool,
}

/// The front-end's memory.
#[derive(Default)]
struct Table {
    mapped: Option<Arc<GuardedMemory>>,
    regions: FrontEndTable,
    is_new: bool,
}

/// Memory that may be a file that shrinks ([`vmm-survives`](crate::invariants#vmm-survives)). Who
/// reads it keeps this.
struct GuardedMemory {
    // Before the memory, so that the guards are dropped first.
    _guards: Vec<GuardedRange>,
    memory: GuestMemoryLoadGuard<Mapped>,
}

/// Pages that must be here: indexes of blocks, and pages.
struct Needed {
    memory: Arc<GuestMemory>,
    pages: Vec<(usize, PageRange)>,
}

/// What has become of the next buffer of a queue.
enum Step {
    /// There is none, or the queue is not served.
    Idle,
    /// It was handled. The driver is to be told if it was returned.
    Handled {
        /// It was.
        returned: bool,
    },
    /// These pages of this memory must be here first.
    Needs(Needed),
}

impl Queues {
    pub(super) fn new(port: Arc<DevicePort>) -> Self {
        let broken = vec![false; port.device().max_queues()];
        Self {
            port,
            table: Mutex::default(),
            processing: Mutex::default(),
            broken: Mutex::new(broken),
            rings: OnceLock::new(),
            ending: AtomicBool::new(false),
        }
    }

    /// The front-end has set its memory.
    pub(super) fn set_memory(&self, memory: &Memory) {
        let memory = memory.memory();
        let guard = |region: &GuestRegionMmap<BitmapMmapRegion>| {
            let start = region.as_ptr() as usize;
            GuardedRange::new(start..start + region.len() as usize)
        };
        let guards = memory.iter().map(guard).collect();
        let regions = FrontEndTable::of(&memory);
        let mapped = Some(Arc::new(GuardedMemory { _guards: guards, memory }));
        let table = Table { mapped, regions, is_new: true };
        let before = std::mem::replace(&mut *lock(&self.table), table);
        // A buffer that is being handled keeps it.
        drop(before);
    }

    /// The driver sets up the device, and may use broken queues again.
    pub(super) fn mend(&self) {
        lock(&self.broken).fill(false);
    }

    /// Ends the work on the queues. A buffer that is being handled is completed.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.port.wake();
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// The queue is about to be stopped. The buffer that is being handled is returned before. Those
    /// that the device keeps come again when the queue is started where it was stopped.
    pub(super) fn stop(&self, queue: usize) {
        let _processing = lock(&self.processing);
        self.port.set_started(false);
        let kept = self.port.device().forget_kept(queue);
        if let Some(ring) = self.rings.get().and_then(|rings| rings.get(queue)) {
            let mut ring = ring.get_mut();
            let queue = ring.get_queue_mut();
            queue.set_next_avail(queue.next_avail().wrapping_sub(kept));
        }
    }

    /// The driver has put something into a queue.
    pub(super) fn kicked(&self, queue: usize, rings: &[Ring]) {
        let rings = self.rings.get_or_init(|| rings.to_vec());
        if queue < rings.len() {
            self.port.set_started(true);
            self.process(queue, rings);
        }
    }

    /// [`DevicePort::wake`] was called.
    pub(super) fn woken(&self, rings: &[Ring]) {
        self.port.wake_event().reset();
        let rings = self.rings.get_or_init(|| rings.to_vec());
        self.return_kept(rings);
        (0..rings.len()).for_each(|queue| self.process(queue, rings));
    }

    /// Handles what is in a queue.
    fn process(&self, queue: usize, rings: &[Ring]) {
        for _ in 0..TURN {
            if self.is_ending() {
                return;
            }
            let mut step = Step::Idle;
            let act = &mut |memory: &Arc<GuestMemory>| step = self.step(queue, rings, memory);
            // The thread is woken when it may go on.
            if !self.port.session().with_memory(act) {
                return;
            }
            match step {
                Step::Idle => return,
                Step::Handled { returned } => {
                    if returned {
                        tell_driver(&rings[queue]);
                    }
                    self.return_kept(rings);
                    if self.port.device().take_config_change() {
                        self.port.config_changed();
                    }
                }
                Step::Needs(needed) => {
                    if !self.fetch(queue, &needed) {
                        return;
                    }
                }
            }
        }
        self.port.wake();
    }

    /// Fetches missing pages that a queue needs. False if they do not come.
    fn fetch(&self, queue: usize, needed: &Needed) -> bool {
        let came = needed.memory.fetch(&needed.pages, FETCH_TIMEOUT, || !self.is_ending());
        if !came {
            log::warn!("{}: queue {queue} waits: its memory does not come", self.port.name());
        }
        came
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
        let pages = ring_pages(ring.get_queue(), &view);
        if memory.are_discarded(&pages) {
            self.break_queue(queue, "it lies in discarded memory");
            return Step::Idle;
        }
        if may_be_missing && !memory.are_present(&pages) {
            return Step::Needs(Needed { memory: memory.clone(), pages });
        }
        let chains = ring.get_queue_mut().iter(mapped.memory.clone());
        let chain = match chains.map(|mut chains| chains.next()) {
            Ok(Some(chain)) => chain,
            Ok(None) => return Step::Idle,
            Err(error) => {
                self.break_queue(queue, &error.to_string());
                return Step::Idle;
            }
        };
        let mut buffer = match Buffer::new(&mapped.memory, chain) {
            Ok(buffer) => buffer,
            Err(why) => {
                self.break_queue(queue, why);
                return Step::Idle;
            }
        };
        let pages = buffer.touched_pages(&view);
        if memory.are_discarded(&pages) {
            self.break_queue(queue, "a buffer lies in discarded memory");
            return Step::Idle;
        }
        if may_be_missing && !memory.are_present(&pages) {
            ring.get_queue_mut().go_to_previous_position();
            return Step::Needs(Needed { memory: memory.clone(), pages });
        }
        drop(ring);
        let handled = self.port.device().handle(queue, &in_use, &mut buffer, &view);
        match handled {
            Handled::Return => self.give_back(&rings[queue], &buffer, &view),
            Handled::Keep => {}
            Handled::Break(why) => self.break_queue(queue, why),
        }
        Step::Handled { returned: handled == Handled::Return }
    }

    /// Brings the map up to date. `None` while the front-end has given no memory.
    fn look_at_table(
        &self, map: &mut GuestMap, memory: &Arc<GuestMemory>,
    ) -> Option<Arc<GuardedMemory>> {
        let mut table = lock(&self.table);
        let is_new = std::mem::take(&mut table.is_new);
        map.update(&table.regions, memory, is_new);
        table.mapped.clone()
    }

    fn break_queue(&self, queue: usize, why: &str) {
        log::warn!("{}: queue {queue} is not served any more: {why}", self.port.name());
        lock(&self.broken)[queue] = true;
    }

    /// Writes the answer, and returns the buffer to the driver.
    fn give_back(&self, ring: &Ring, buffer: &Buffer<'_>, view: &DeviceMemory<'_>) {
        let mut pages = used_pages(ring.get_ref().get_queue(), view);
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
        while let Some((queue, head)) = self.port.device().take_kept() {
            let mut needed = None;
            let returned = self.port.session().with_memory(&mut |memory| {
                let mut map = lock(&self.processing);
                let Some(_mapped) = self.look_at_table(&mut map, memory) else { return };
                let view = DeviceMemory::new(memory, &map);
                let Some(ring) = rings.get(queue).filter(|ring| ring.get_ref().get_queue().ready())
                else {
                    return;
                };
                let pages = used_pages(ring.get_ref().get_queue(), &view);
                if memory.are_discarded(&pages) {
                    self.break_queue(queue, "it lies in discarded memory");
                    return;
                }
                if !memory.are_present(&pages) {
                    needed = Some(Needed { memory: memory.clone(), pages });
                    return;
                }
                memory.write_by_device(&pages, || return_used(ring, head, 0));
            });
            if returned && needed.is_none() {
                rings.get(queue).inspect(|ring| tell_driver(ring));
                continue;
            }
            self.port.device().keep_again(queue, head);
            // Without pages to fetch, a job allows no change, and wakes the thread when it does.
            if !needed.is_some_and(|needed| self.fetch(queue, &needed)) {
                return;
            }
        }
    }
}

/// The pages of the ring in which the device returns buffers.
fn used_pages(queue: &Queue, view: &DeviceMemory<'_>) -> Vec<(usize, PageRange)> {
    // Flags and index, then 8 bytes for each buffer.
    view.pages(queue.used_ring(), 4 + 8 * u64::from(queue.size()) + 2)
}

/// The pages of a whole queue.
fn ring_pages(queue: &Queue, view: &DeviceMemory<'_>) -> Vec<(usize, PageRange)> {
    let size = u64::from(queue.size());
    let mut pages = view.pages(queue.desc_table(), 16 * size);
    pages.extend(view.pages(queue.avail_ring(), 4 + 2 * size + 2));
    pages.extend(used_pages(queue, view));
    pages
}

fn return_used(ring: &Ring, head: u16, length: u32) {
    if let Err(error) = ring.get_mut().add_used(head, length) {
        log::debug!("a buffer cannot be returned: {error}");
    }
}

/// Tells the driver of a used buffer. Not while a lock of the session is held: a front-end can make
/// the event one that waits.
fn tell_driver(ring: &Ring) {
    let ring = ring.get_ref();
    // If it is full, the driver has not read an earlier event yet, which says the same.
    if ring.get_call().as_ref().is_some_and(is_writable)
        && let Err(error) = ring.signal_used_queue()
    {
        log::debug!("the driver is not told of a buffer: {error}");
    }
}
