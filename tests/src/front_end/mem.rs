// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver of virtio-mem (virtio 1.3, section 5.15).

use super::driver::Driver;
use super::queue::Piece;
use crate::memory::TestMemory;
use pageferry_agent::devices::mem::wire::{
    FEATURE_UNPLUGGED_INACCESSIBLE, REQUEST_SIZE, RESPONSE_SIZE,
};
use std::path::Path;
use std::sync::Arc;

/// Types of requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What the device answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done. The number is the state of the blocks, if that was asked for.
    Ack(u16),
    /// The guest would have too much.
    Nack,
    /// Not now.
    Busy,
    /// The request is wrong.
    Error,
}

impl Answer {
    /// Reads an answer.
    pub fn of(bytes: &[u8]) -> Self {
        match u16::from_le_bytes([bytes[0], bytes[1]]) {
            0 => Self::Ack(u16::from_le_bytes([bytes[8], bytes[9]])),
            1 => Self::Nack,
            2 => Self::Busy,
            3 => Self::Error,
            other => panic!("answer {other}"),
        }
    }
}

/// A request as bytes.
pub fn request(kind: u16, addr: u64, count: u16) -> [u8; REQUEST_SIZE] {
    let mut bytes = [0; REQUEST_SIZE];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// A driver of virtio-mem. Blocks have numbers from 0 in the region.
pub struct MemDriver {
    /// Connection and queue.
    pub driver: Driver,
    block_size: u64,
    addr: u64,
}

impl MemDriver {
    /// Connects to the device at `socket`. The queue lies from `area`.
    pub fn start(socket: &Path, memory: &Arc<TestMemory>, area: u64) -> Self {
        let mut driver = Driver::connect(socket, memory, area);
        driver.begin(FEATURE_UNPLUGGED_INACCESSIBLE, &[0]);
        let (block_size, addr) = (driver.front_end.config_u64(0), driver.front_end.config_u64(16));
        Self { driver, block_size, addr }
    }

    /// The VMM connects to another agent, which has the guest's memory as it is or a copy of it.
    pub fn moved_to(self, socket: &Path, memory: &Arc<TestMemory>) -> Self {
        Self { driver: self.driver.moved_to(socket, memory), ..self }
    }

    /// Puts a request, kicks, and does not wait. Returns where the answer will be.
    pub fn put(&mut self, kind: u16, addr: u64, count: u16) -> u64 {
        let at = self.driver.write_buffer(0, &request(kind, addr, count));
        let answer = self.driver.write_buffer(0, &[0xff; RESPONSE_SIZE]);
        let pieces = [
            Piece::readable(at, REQUEST_SIZE as u32),
            Piece::writable(answer, RESPONSE_SIZE as u32),
        ];
        let queue = self.driver.queue(0);
        queue.put(&pieces);
        queue.kick();
        answer
    }

    /// Waits for the answer that will be at this address.
    #[track_caller]
    pub fn wait_answer(&mut self, at: u64) -> Answer {
        let used = self.driver.queue(0).wait_used();
        assert_eq!(used.length as usize, RESPONSE_SIZE);
        Answer::of(&self.driver.read(at, RESPONSE_SIZE))
    }

    /// Sends a request, and waits for the answer.
    #[track_caller]
    pub fn ask(&mut self, kind: u16, addr: u64, count: u16) -> Answer {
        let at = self.put(kind, addr, count);
        self.wait_answer(at)
    }

    fn addr_of(&self, first: u64) -> u64 {
        self.addr + first * self.block_size
    }

    /// Plugs blocks.
    #[track_caller]
    pub fn plug(&mut self, first: u64, count: u16) -> Answer {
        self.ask(PLUG, self.addr_of(first), count)
    }

    /// Puts a request to plug blocks. Returns where the answer will be.
    pub fn put_plug(&mut self, first: u64, count: u16) -> u64 {
        self.put(PLUG, self.addr_of(first), count)
    }

    /// Unplugs blocks.
    #[track_caller]
    pub fn unplug(&mut self, first: u64, count: u16) -> Answer {
        self.ask(UNPLUG, self.addr_of(first), count)
    }

    /// Unplugs all blocks.
    #[track_caller]
    pub fn unplug_all(&mut self) -> Answer {
        self.ask(UNPLUG_ALL, 0, 0)
    }

    /// Asks for the state of blocks.
    #[track_caller]
    pub fn state(&mut self, first: u64, count: u16) -> Answer {
        self.ask(STATE, self.addr_of(first), count)
    }

    /// Bytes that are plugged, by the configuration space.
    pub fn plugged(&mut self) -> u64 {
        self.driver.front_end.config_u64(40)
    }

    /// Bytes that are to be plugged, by the configuration space.
    pub fn requested(&mut self) -> u64 {
        self.driver.front_end.config_u64(48)
    }
}
