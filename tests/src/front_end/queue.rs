// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A split virtqueue as a driver has it (virtio 1.3, section 2.7).
//!
//! [`DriverQueue::put`] follows the rules. [`DriverQueue::write_descriptor`],
//! [`DriverQueue::offer`] and [`DriverQueue::set_available_index`] write what they are told to.

use super::PATIENCE;
use crate::memory::TestMemory;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Flag of a descriptor: another one follows.
pub const NEXT: u16 = 1;
/// Flag of a descriptor: the device writes to it.
pub const WRITE: u16 = 2;
/// Flag of a descriptor: it is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Where the parts of a queue lie: guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

impl Rings {
    /// A queue of `size` descriptors, one part behind the other from `gpa`, a multiple of 16.
    pub fn at(gpa: u64, size: u16) -> Self {
        let available = gpa + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(16);
        Self { size, descriptors: gpa, available, used }
    }
}

/// A piece of guest memory in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes to it.
    pub is_writable: bool,
}

impl Piece {
    /// Bytes that the device reads.
    pub fn readable(gpa: u64, length: u32) -> Self {
        Self { gpa, length, is_writable: false }
    }

    /// Bytes that the device may write.
    pub fn writable(gpa: u64, length: u32) -> Self {
        Self { gpa, length, is_writable: true }
    }
}

/// A buffer that the device has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Index of its first descriptor.
    pub head: u16,
    /// Bytes that the device has written.
    pub length: u32,
}

/// A queue of a driver. Its writes are marked in the dirty log, as those of an emulated device.
#[derive(Debug)]
pub struct DriverQueue {
    memory: Arc<TestMemory>,
    rings: Rings,
    /// The event by which the device hears of buffers.
    pub kick: EventFd,
    /// The event by which the driver hears of returned buffers.
    pub call: EventFd,
    /// Waits for `call`.
    called: Epoll,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
    /// By head: the descriptors of a buffer that the device has.
    chains: Vec<Vec<u16>>,
}

/// The events of a queue: by which the device hears of buffers, and by which the driver does. The
/// last one waits for the second.
fn events() -> (EventFd, EventFd, Epoll) {
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let (kick, call, called) = (event(), event(), Epoll::new().unwrap());
    let wanted = EpollEvent::new(EventSet::IN, 0);
    called.ctl(ControlOperation::Add, call.as_raw_fd(), wanted).unwrap();
    (kick, call, called)
}

impl DriverQueue {
    /// An empty queue.
    pub fn new(memory: &Arc<TestMemory>, rings: Rings) -> Self {
        let (kick, call, called) = events();
        let queue = Self {
            memory: memory.clone(),
            rings,
            kick,
            call,
            called,
            next_available: 0,
            next_used: 0,
            free: (0..rings.size).rev().collect(),
            chains: vec![Vec::new(); rings.size.into()],
        };
        // Flags and indexes.
        queue.write(rings.available, &[0; 4]);
        queue.write(rings.used, &[0; 4]);
        queue
    }

    /// The same queue after the guest has moved to `memory`. The device there begins at
    /// [`DriverQueue::available_index`] unless the front-end says otherwise.
    ///
    /// A VMM makes new events for each connection. The agent before may still read the old ones.
    pub fn moved_to(self, memory: &Arc<TestMemory>) -> Self {
        let (kick, call, called) = events();
        Self { memory: memory.clone(), kick, call, called, ..self }
    }

    /// Where it lies.
    pub fn rings(&self) -> Rings {
        self.rings
    }

    /// The index behind the last buffer that was made available.
    pub fn available_index(&self) -> u16 {
        self.next_available
    }

    /// Descriptors that are in no buffer.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn store(&self, gpa: u64, value: u16) {
        self.memory.guest().store(value.to_le(), GuestAddress(gpa), Ordering::Release).unwrap();
    }

    /// Writes descriptor `index`, whatever is in it.
    pub fn write_descriptor(&self, index: u16, gpa: u64, length: u32, flags: u16, next: u16) {
        self.write(
            self.rings.descriptors + 16 * u64::from(index),
            &descriptor(gpa, length, flags, next),
        );
    }

    /// Makes the descriptor `head` available, whatever is in it.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.rings.size);
        self.store(self.rings.available + 4 + 2 * slot, head);
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Sets the index of the available ring, whatever the ring has.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.store(self.rings.available + 2, index);
    }

    /// Makes a buffer of these pieces available, and does not kick. Returns its head.
    pub fn put(&mut self, pieces: &[Piece]) -> u16 {
        assert!(!pieces.is_empty() && pieces.len() <= self.free.len(), "the queue is full");
        let chain = self.free.split_off(self.free.len() - pieces.len());
        for (at, piece) in pieces.iter().enumerate() {
            let next = chain.get(at + 1);
            let more = if next.is_some() { NEXT } else { 0 };
            let flags = if piece.is_writable { WRITE } else { 0 } | more;
            let next = next.copied().unwrap_or(0);
            self.write_descriptor(chain[at], piece.gpa, piece.length, flags, next);
        }
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.offer(head);
        head
    }

    /// Has the device look at the queue.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The used index, as the device has written it.
    pub fn used_index(&self) -> u16 {
        let gpa = GuestAddress(self.rings.used + 2);
        u16::from_le(self.memory.guest().load(gpa, Ordering::Acquire).unwrap())
    }

    /// The next buffer that the device has returned.
    pub fn used(&mut self) -> Option<Used> {
        if self.used_index() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.rings.size);
        let mut entry = [0; 8];
        let gpa = GuestAddress(self.rings.used + 4 + 8 * slot);
        self.memory.guest().read_slice(&mut entry, gpa).unwrap();
        let [head, length] =
            [0, 4].map(|at| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()));
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free.append(&mut self.chains[usize::from(head)]);
        Some(Used { head, length })
    }

    /// As if the device had died before it returned the last buffer. The driver puts nothing else
    /// until it has that buffer.
    pub fn take_back_last_used(&mut self) {
        self.next_used = self.next_used.wrapping_sub(1);
        self.store(self.rings.used + 2, self.next_used);
    }

    /// Waits until the device has returned a buffer, or `timeout` is over.
    pub fn wait_within(&mut self, timeout: Duration) -> Option<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            // Before the look at the ring: what comes after it is called again.
            let is_called = self.call.read().is_ok();
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(used) = self.used() {
                // If this is only because time is up, the driver of a guest would wait for ever.
                // The device may also be about to call.
                let is_told = || is_called || !left.is_zero() || self.is_called_within(1000);
                assert!(is_told(), "a buffer is returned, and nobody is told");
                return Some(used);
            }
            if left.is_zero() {
                return None;
            }
            self.is_called_within(i32::try_from(left.as_millis() + 1).unwrap());
        }
    }

    /// Waits until the device calls. It may end early without a call.
    fn is_called_within(&self, milliseconds: i32) -> bool {
        matches!(self.called.wait(milliseconds, &mut [EpollEvent::default()]), Ok(1))
    }

    /// Waits until the device has returned a buffer.
    #[track_caller]
    pub fn wait_used(&mut self) -> Used {
        self.wait_within(PATIENCE).expect("the device returns a buffer")
    }

    /// Puts a buffer, kicks, and waits until the device returns it. Returns how many bytes it has
    /// written.
    #[track_caller]
    pub fn round_trip(&mut self, pieces: &[Piece]) -> u32 {
        let head = self.put(pieces);
        self.kick();
        let used = self.wait_used();
        assert_eq!(used.head, head, "another buffer is returned");
        used.length
    }
}

/// A descriptor as bytes.
pub fn descriptor(gpa: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
