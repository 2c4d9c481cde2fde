// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection to a device, with the queues of its driver.
//!
//! Queues and their buffers lie in an area of guest memory: [`QUEUE_AREA`] bytes for each queue.

use super::connection::FrontEnd;
use super::queue::{DriverQueue, Rings};
use crate::memory::TestMemory;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of guest memory for the rings and the buffers of a queue.
pub const QUEUE_AREA: u64 = 64 << 10;
/// Where the buffers begin, behind the rings.
const BUFFERS: u64 = 16 << 10;
/// Bytes of a buffer.
const BUFFER: u64 = 4 << 10;
/// Descriptors of a queue.
pub const QUEUE_SIZE: u16 = 128;

/// A driver of any device.
pub struct Driver {
    /// The connection.
    pub front_end: FrontEnd,
    /// The queues by their numbers.
    pub queues: BTreeMap<usize, DriverQueue>,
    area: u64,
    features: u64,
    /// Buffers that were used so far.
    buffers: u64,
}

impl Driver {
    /// Connects to the device at `socket`. The queues are to lie from `area`.
    pub fn connect(socket: &Path, memory: &Arc<TestMemory>, area: u64) -> Self {
        Self::over(FrontEnd::connect(socket, memory), area)
    }

    /// Like [`Driver::connect`], over an existing connection.
    pub fn over(front_end: FrontEnd, area: u64) -> Self {
        Self { front_end, queues: BTreeMap::new(), area, features: 0, buffers: 0 }
    }

    /// Chooses features, and sets up empty queues with these numbers.
    pub fn begin(&mut self, features: u64, queues: &[usize]) {
        self.features = features;
        self.front_end.choose_features(features).unwrap();
        for index in queues {
            let gpa = self.area_of(*index);
            // So that buffers allocate nothing later, where a test counts.
            self.write(gpa, &[0; QUEUE_AREA as usize]);
            self.begin_queue(*index, Rings::at(gpa, QUEUE_SIZE));
        }
    }

    /// Sets up an empty queue.
    pub fn begin_queue(&mut self, index: usize, rings: Rings) {
        let queue = DriverQueue::new(self.front_end.memory(), rings);
        self.front_end.start_queue(index, &queue, 0).unwrap();
        self.queues.insert(index, queue);
    }

    /// The area of a queue.
    pub fn area_of(&self, index: usize) -> u64 {
        self.area + index as u64 * QUEUE_AREA
    }

    /// A queue.
    pub fn queue(&mut self, index: usize) -> &mut DriverQueue {
        self.queues.get_mut(&index).unwrap()
    }

    /// Writes `bytes` into the next buffer of a queue. Returns its address.
    pub fn write_buffer(&mut self, index: usize, bytes: &[u8]) -> u64 {
        assert!(bytes.len() as u64 <= BUFFER);
        self.buffers += 1;
        let slot = self.buffers % ((QUEUE_AREA - BUFFERS) / BUFFER);
        let gpa = self.area_of(index) + BUFFERS + slot * BUFFER;
        self.write(gpa, bytes);
        gpa
    }

    /// Writes to guest memory.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.front_end.memory().guest().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Reads from guest memory.
    pub fn read(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.front_end.memory().guest().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// The VMM pauses its guest: stops all queues. Returns where each of them goes on.
    pub fn stop(&self) -> BTreeMap<usize, u16> {
        self.queues.keys().map(|index| (*index, self.front_end.stop_queue(*index))).collect()
    }

    /// The VMM resumes its guest, as QEMU does: features, and then the queues.
    pub fn start_again(&mut self, bases: &BTreeMap<usize, u16>) {
        self.front_end.choose_features(self.features).unwrap();
        for (index, queue) in &self.queues {
            self.front_end.start_queue(*index, queue, bases[index]).unwrap();
            // A back-end looks at its queue when it is kicked.
            queue.kick();
        }
    }

    /// The VMM connects to another agent, which has the guest's memory as it is or a copy of it.
    pub fn moved_to(self, socket: &Path, memory: &Arc<TestMemory>) -> Self {
        let Self { front_end, queues, area, features, buffers } = self;
        drop(front_end);
        let moved = queues.into_iter().map(|(index, queue)| (index, queue.moved_to(memory)));
        let front_end = FrontEnd::connect(socket, memory);
        let mut driver = Self { front_end, queues: moved.collect(), area, features, buffers };
        // What was not returned is handled again.
        let bases = driver.queues.iter().map(|(index, queue)| (*index, queue.used_index()));
        let bases = bases.collect();
        driver.start_again(&bases);
        driver
    }

    /// The driver resets the device, and sets it up again with empty queues.
    pub fn reset(&mut self) {
        let queues: Vec<usize> = self.queues.keys().copied().collect();
        // As a VMM does: the device is stopped, and reset then.
        self.stop();
        self.front_end.reset();
        self.begin(self.features, &queues);
    }
}
