// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver of the balloon (virtio 1.3, section 5.5).

use super::driver::Driver;
use super::queue::Piece;
use crate::memory::TestMemory;
use pageferry_agent::devices::balloon::feature;
use pageferry_protocol::memory::PAGE_SIZE;
use std::path::Path;
use std::sync::Arc;

/// Offsets in the configuration space.
const ACTUAL: u32 = 4;
const HINT_COMMAND: u32 = 8;
const POISON: u32 = 12;

/// How a driver numbers its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbering {
    /// It counts those of the features that it has chosen, as Linux does.
    Counted,
    /// Each queue has the number of the specification.
    Fixed,
}

/// A driver of the balloon.
pub struct BalloonDriver {
    /// Connection and queues.
    pub driver: Driver,
    features: u64,
    numbering: Numbering,
}

impl BalloonDriver {
    /// Connects with these features. The queues lie from `area`.
    pub fn start(
        socket: &Path, memory: &Arc<TestMemory>, area: u64, features: u64, numbering: Numbering,
    ) -> Self {
        let driver = Driver::connect(socket, memory, area);
        let mut balloon = Self { driver, features, numbering };
        balloon.begin();
        balloon
    }

    /// A driver with all features, whose queues lie at the begin of memory.
    pub fn of(socket: &Path, memory: &Arc<TestMemory>) -> Self {
        let all = feature::STATS
            | feature::DEFLATE_ON_OOM
            | feature::HINTING
            | feature::PAGE_POISON
            | feature::REPORTING;
        Self::start(socket, memory, 0, all, Numbering::Counted)
    }

    /// The VMM connects to another agent, which has the guest's memory as it is or a copy of it.
    pub fn moved_to(self, socket: &Path, memory: &Arc<TestMemory>) -> Self {
        Self { driver: self.driver.moved_to(socket, memory), ..self }
    }

    /// Sets up all queues that the features need.
    fn begin(&mut self) {
        let needed = [0, feature::STATS, feature::HINTING, feature::REPORTING];
        let has = |wanted: &u64| *wanted == 0 || self.features & wanted != 0;
        let optional = needed[1..].iter().filter(|wanted| has(wanted));
        let mut queues = vec![0, 1];
        queues.extend(optional.map(|wanted| self.number_of(*wanted)));
        self.driver.begin(self.features, &queues);
    }

    /// The number of the queue of a feature that was chosen.
    fn number_of(&self, wanted: u64) -> usize {
        assert!(self.features & wanted != 0, "the feature was not chosen");
        let optional = [feature::STATS, feature::HINTING, feature::REPORTING];
        let before = optional.iter().take_while(|feature| **feature != wanted);
        2 + match self.numbering {
            Numbering::Counted => before.filter(|feature| self.features & **feature != 0).count(),
            Numbering::Fixed => before.count(),
        }
    }

    /// The numbers of the queues of statistics.
    pub fn stats_queue(&self) -> usize {
        self.number_of(feature::STATS)
    }

    /// The number of the queue of hints.
    pub fn hint_queue(&self) -> usize {
        self.number_of(feature::HINTING)
    }

    /// The number of the queue of reports.
    pub fn report_queue(&self) -> usize {
        self.number_of(feature::REPORTING)
    }

    fn pass_pages(&mut self, queue: usize, pages: &[u32]) {
        let numbers: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let gpa = self.driver.write_buffer(queue, &numbers);
        self.driver.queue(queue).round_trip(&[Piece::readable(gpa, numbers.len() as u32)]);
    }

    /// Puts pages into the balloon, and waits until the device has them. At most 1024.
    pub fn inflate(&mut self, pages: &[u32]) {
        self.pass_pages(0, pages);
    }

    /// Takes pages out of the balloon.
    pub fn deflate(&mut self, pages: &[u32]) {
        self.pass_pages(1, pages);
    }

    /// Reports free memory, in bytes, and waits until the device has it.
    pub fn report(&mut self, ranges: &[(u64, u64)]) {
        let pieces: Vec<Piece> = ranges.iter().map(writable).collect();
        let queue = self.report_queue();
        self.driver.queue(queue).round_trip(&pieces);
    }

    /// Sends statistics. The device keeps the buffer. Returns its head.
    pub fn send_stats(&mut self, stats: &[(u16, u64)]) -> u16 {
        let queue = self.stats_queue();
        let bytes: Vec<u8> = stats
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        let gpa = self.driver.write_buffer(queue, &bytes);
        let queue = self.driver.queue(queue);
        let head = queue.put(&[Piece::readable(gpa, bytes.len() as u32)]);
        queue.kick();
        head
    }

    /// What the device asks of hints: a round, or 0 or 1.
    pub fn hint_command(&mut self) -> u32 {
        self.driver.front_end.config_u32(HINT_COMMAND)
    }

    /// Says which round the next hints answer, or 0 that there are no more.
    pub fn answer_hints(&mut self, round: u32) {
        let queue = self.hint_queue();
        let gpa = self.driver.write_buffer(queue, &round.to_le_bytes());
        self.driver.queue(queue).round_trip(&[Piece::readable(gpa, 4)]);
    }

    /// Hints at free memory, in bytes.
    pub fn hint(&mut self, ranges: &[(u64, u64)]) {
        let queue = self.hint_queue();
        // Linux has one piece in each buffer.
        for range in ranges {
            self.driver.queue(queue).round_trip(&[writable(range)]);
        }
    }

    /// Pages that the balloon is to hold.
    pub fn target(&mut self) -> u32 {
        self.driver.front_end.config_u32(0)
    }

    /// Says how many pages the balloon holds.
    pub fn set_actual(&mut self, pages: u32) {
        self.driver.front_end.write_config(ACTUAL, &pages.to_le_bytes()).unwrap();
    }

    /// Says with what the guest fills its free pages.
    pub fn set_poison(&mut self, pattern: u32) {
        self.driver.front_end.write_config(POISON, &pattern.to_le_bytes()).unwrap();
    }
}

fn writable(range: &(u64, u64)) -> Piece {
    Piece::writable(range.0, u32::try_from(range.1).unwrap())
}

/// The numbers of these pages.
pub fn pages(first: u64, count: u64) -> Vec<u32> {
    (first..first + count).map(|page| page as u32).collect()
}

/// The bytes of these pages: address and length.
pub fn bytes(first: u64, count: u64) -> (u64, u64) {
    (first * PAGE_SIZE, count * PAGE_SIZE)
}
