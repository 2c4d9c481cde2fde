// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon (virtio id 5): the guest gives pages back, and takes them again without asking.
//!
//! What the guest puts into the balloon, and what it reports as free, is freed
//! ([`crate::memory::freed`]): it becomes a hole, and is ordinary memory again as soon as the guest
//! writes to it. So a deflate has nothing to do.
//!
//! - [`queues`]: what each queue is for;
//! - [`config`]: the configuration space;
//! - [`inflate`]: pages that come one by one, and host pages that are given back in parts;
//! - [`hints`]: free pages that a migration leaves out;
//! - [`stats`]: what the guest says about its memory;
//! - this file: the device.
//!
//! Virtio 1.3, section 5.5. Linux: `drivers/virtio/virtio_balloon.c`.

pub mod config;
pub mod hints;
pub mod inflate;
pub mod queues;
pub mod stats;

use super::buffer::Buffer;
use super::device::{Device, Handled};
use super::guest_map::DeviceMemory;
use crate::lock::lock;
use crate::memory::GuestMemory;
use config::Config;
use hints::{FreePages, Hints};
use inflate::Inflated;
use pageferry_protocol::control::devices::BalloonStatus;
use pageferry_protocol::control::request::BlockRange;
use pageferry_protocol::memory::PAGE_SIZE;
use queues::{MAX_QUEUES, Queue};
use stats::Stats;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Feature bits of the balloon.
pub mod feature {
    #![allow(missing_docs)]
    pub const STATS: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const HINTING: u64 = 1 << 3;
    pub const PAGE_POISON: u64 = 1 << 4;
    pub const REPORTING: u64 = 1 << 5;
}

/// The most bytes of a buffer with page numbers. Linux sends 1 KiB.
const MAX_PAGE_NUMBERS: usize = 1 << 20;
/// The most bytes of a buffer with statistics: a hundred of them.
const MAX_STATS: usize = 1000;

/// The balloon.
#[derive(Debug, Default)]
pub struct Balloon {
    state: Mutex<State>,
    /// Notified when the guest has sent statistics.
    stats_sent: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The features that the driver has chosen.
    features: Option<u64>,
    config: Config,
    inflated: Inflated,
    stats: Stats,
    hints: Hints,
    freed: u64,
    outside: u64,
}

impl Balloon {
    /// Sets what the balloon is to hold, in bytes, rounded down to pages. True if that has changed:
    /// then the driver must hear of it.
    ///
    /// # Errors
    /// If it is more than the device can count.
    pub fn set_target(&self, bytes: u64) -> Result<bool, String> {
        if (1..PAGE_SIZE).contains(&bytes) {
            return Err(format!("the target is {bytes} bytes, allowed: 0, or at least 4 KiB"));
        }
        let pages = u32::try_from(bytes / PAGE_SIZE)
            .map_err(|_| "the balloon can hold less than 16 TiB".to_owned())?;
        let mut state = lock(&self.state);
        Ok(std::mem::replace(&mut state.config.target_pages, pages) != pages)
    }

    /// Asks the driver for new statistics. `wake` has the device return its buffer. Waits until
    /// they are here, but not longer than `limit`.
    pub fn refresh_stats(&self, wake: impl FnOnce(), limit: Duration) {
        let mut state = lock(&self.state);
        if !state.stats.ask() {
            return;
        }
        let before = state.stats.count();
        wake();
        let is_old = |state: &mut State| state.stats.count() == before;
        drop(self.stats_sent.wait_timeout_while(state, limit, is_old));
    }

    /// Asks the driver for its free pages. `None` if it would not answer.
    pub fn begin_hints(&self, memory: &Arc<GuestMemory>) -> Option<Arc<FreePages>> {
        let mut state = lock(&self.state);
        if !state.has(feature::HINTING) {
            return None;
        }
        state.hints.begin(memory)
    }

    /// No job needs free pages any more: the driver may give them back to its guest.
    pub fn end_hints(&self) {
        lock(&self.state).hints.end();
    }

    /// Frees what the guest has given back. This may wait for a disk, so it does not hold the
    /// state, which operators and the driver read meanwhile.
    fn free(&self, memory: &DeviceMemory<'_>, ranges: &[BlockRange]) {
        if ranges.is_empty() {
            return;
        }
        match memory.memory().free(ranges) {
            Ok(pages) => lock(&self.state).freed += pages * PAGE_SIZE,
            // The ranges were made from the blocks, so this is a defect.
            Err(error) => log::error!("balloon: {}", crate::error::chain(&error)),
        }
    }

    /// What operators see.
    pub fn status(&self) -> BalloonStatus {
        let state = lock(&self.state);
        BalloonStatus {
            driver: state.features.is_some(),
            target: u64::from(state.config.target_pages) * PAGE_SIZE,
            actual: u64::from(state.config.actual_pages) * PAGE_SIZE,
            freed: state.freed,
            outside: state.outside,
            hinted: state.hints.pages() * PAGE_SIZE,
            stats: state.stats.all().to_vec(),
        }
    }
}

impl State {
    fn has(&self, feature: u64) -> bool {
        self.features.is_some_and(|features| features & feature != 0)
    }

    /// Pages that the driver has put into the balloon. Returns what is to be freed.
    fn inflate(&mut self, buffer: &Buffer<'_>, memory: &DeviceMemory<'_>) -> Taken {
        let numbers = read_page_numbers(buffer)?;
        let mut ranges = Vec::new();
        for (first, count) in inflate::runs(&numbers) {
            self.outside += memory.ranges(first * PAGE_SIZE, count * PAGE_SIZE, &mut ranges);
        }
        Ok(self.inflated.add(memory.memory(), &ranges))
    }

    /// Pages that the driver takes out of the balloon. It may have used them already.
    fn deflate(&mut self, buffer: &Buffer<'_>, memory: &DeviceMemory<'_>) -> Taken {
        let numbers = read_page_numbers(buffer)?;
        let mut ranges = Vec::new();
        for (first, count) in inflate::runs(&numbers) {
            memory.ranges(first * PAGE_SIZE, count * PAGE_SIZE, &mut ranges);
        }
        self.inflated.remove(memory.memory(), &ranges);
        Ok(Vec::new())
    }

    /// Free memory that the driver does not use until it gets the buffer back. Returns what is to
    /// be freed.
    fn report(&mut self, buffer: &Buffer<'_>, memory: &DeviceMemory<'_>) -> Taken {
        let mut ranges = Vec::new();
        if self.expects_poison() {
            return Ok(ranges);
        }
        for piece in buffer.writable() {
            self.outside += memory.ranges(piece.gpa, piece.length, &mut ranges);
        }
        Ok(ranges)
    }

    /// What the driver says about free pages.
    fn take_hints(&mut self, buffer: &Buffer<'_>, memory: &DeviceMemory<'_>) -> Taken {
        let number = buffer.read(4).ok_or("a number of a round of hints does not lie in memory")?;
        self.hints.set_round(&number);
        // As for reports: such a driver reads its free pages.
        if !self.expects_poison() {
            for piece in buffer.writable() {
                self.hints.add(memory, piece.gpa, piece.length);
            }
        }
        Ok(Vec::new())
    }

    /// The driver fills free pages with a pattern, and expects to find it there.
    fn expects_poison(&self) -> bool {
        self.has(feature::PAGE_POISON) && self.config.poison != 0
    }
}

/// What a buffer gives back, or why it cannot be handled.
type Taken = Result<Vec<BlockRange>, &'static str>;

fn read_page_numbers(buffer: &Buffer<'_>) -> Result<Vec<u8>, &'static str> {
    buffer.read(MAX_PAGE_NUMBERS).ok_or("a buffer of page numbers does not lie in memory")
}

impl Device for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn max_queues(&self) -> usize {
        MAX_QUEUES
    }

    fn features(&self) -> u64 {
        feature::STATS
            | feature::DEFLATE_ON_OOM
            | feature::HINTING
            | feature::PAGE_POISON
            | feature::REPORTING
    }

    fn set_driver_features(&self, features: u64) {
        lock(&self.state).features = Some(features);
    }

    fn disconnected(&self) {
        let mut state = lock(&self.state);
        state.features = None;
        state.stats.forget_buffers();
        state.hints.reset();
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        // A driver that begins anew has nothing in its balloon.
        state.features = None;
        state.config.actual_pages = 0;
        state.config.poison = 0;
        state.inflated = Inflated::default();
        state.stats = Stats::default();
        state.hints.reset();
    }

    fn config(&self) -> Vec<u8> {
        let state = lock(&self.state);
        state.config.to_bytes(state.hints.command())
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) {
        lock(&self.state).config.write(offset, bytes);
    }

    fn handle(
        &self, queue: usize, in_use: &[bool], buffer: &mut Buffer<'_>, memory: &DeviceMemory<'_>,
    ) -> Handled {
        let mut state = lock(&self.state);
        let Some(features) = state.features else {
            return Handled::Break("the driver has chosen no features");
        };
        let taken = match queues::purpose(queue, features, in_use) {
            Some(Queue::Inflate) => state.inflate(buffer, memory),
            Some(Queue::Deflate) => state.deflate(buffer, memory),
            Some(Queue::Stats) => {
                let Some(bytes) = buffer.read(MAX_STATS) else {
                    return Handled::Break("a buffer of statistics does not lie in memory");
                };
                state.stats.set(&bytes, buffer.head());
                self.stats_sent.notify_all();
                return Handled::Keep;
            }
            Some(Queue::Hint) => state.take_hints(buffer, memory),
            Some(Queue::Report) => state.report(buffer, memory),
            None => Err("no feature that the driver has chosen uses it"),
        };
        drop(state);
        match taken {
            Ok(ranges) => self.free(memory, &ranges),
            Err(why) => return Handled::Break(why),
        }
        Handled::Return
    }

    fn take_kept(&self) -> Option<(usize, u16)> {
        let mut state = lock(&self.state);
        let head = state.stats.take_due()?;
        // Statistics come third in every numbering.
        Some((queues::STATS, head))
    }

    fn keep_again(&self, _queue: usize, head: u16) {
        lock(&self.state).stats.keep_due(head);
    }

    fn forget_kept(&self, queue: usize) -> u16 {
        if queue == queues::STATS { lock(&self.state).stats.forget_buffers() } else { 0 }
    }

    fn save(&self) -> Vec<u8> {
        lock(&self.state).config.save()
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let config = Config::load(state)?;
        lock(&self.state).config = config;
        Ok(())
    }
}
