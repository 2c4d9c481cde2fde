// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent whose devices are treated badly while it moves a guest.

use pageferry_client::{NonConvergence, OutgoingOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::front_end::balloon::pages;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, Piece};
use pageferry_tests::random::page_content;
use std::time::Duration;

/// An agent with a balloon that a test treats badly.
///
/// It moves its guest to another one all the time, and does not come to an end.
pub struct Victim {
    pub balloon: BalloonDriver,
    pub host: DeviceHost,
    /// None if it does not move.
    destination: Option<DeviceHost>,
    pages: u64,
}

impl Victim {
    /// An agent whose guest has this many pages.
    pub fn new(pages: u64) -> Self {
        let (host, destination) = (DeviceHost::ram(pages), DeviceHost::ram(pages));
        host.block(0).fill(PageRange::new(FIRST_FREE_PAGE, 1024), 1).unwrap();
        let options = OutgoingOptions {
            bandwidth: 64 << 10,
            max_passes: 0,
            policy: NonConvergence::KeepGoing,
            downtime_limit: Duration::ZERO,
            ..OutgoingOptions::default()
        };
        host.start_move(&destination, &options);
        Self { balloon: host.balloon(), host, destination: Some(destination), pages }
    }

    /// An agent whose guest stays where it is: it may lose all of its memory, and then a move
    /// would come to its end.
    pub fn alone(pages: u64) -> Self {
        let host = DeviceHost::ram(pages);
        Self { balloon: host.balloon(), host, destination: None, pages }
    }

    /// Waits until the device has looked at a queue that was kicked: one thread serves all queues,
    /// in the order of the kicks. Another queue is served still.
    #[track_caller]
    pub fn is_looked_at(&mut self, queue: usize) {
        let other = usize::from(queue == 0);
        let gpa = self.balloon.driver.write_buffer(other, &[0xff; 4]);
        self.balloon.driver.queue(other).round_trip(&[Piece::readable(gpa, 4)]);
    }

    /// The agent and its job live.
    #[track_caller]
    pub fn assert_alive(&mut self) {
        self.host.assert_alive();
        let status = self.host.vmm.client().status().unwrap();
        let moves = self.destination.is_some();
        assert!(!moves || !status.phase.is_final(), "{:?}: {}", status.phase, status.error_text());
    }

    /// Resets the device, and sets up no queue.
    pub fn begin_without_queues(&mut self) {
        let driver = &mut self.balloon.driver;
        driver.stop();
        driver.front_end.reset();
        driver.front_end.choose_features(0).unwrap();
    }

    /// Checks that the agent lives, and that a driver that begins anew is served.
    #[track_caller]
    pub fn is_as_good_as_new(&mut self, after: &str) {
        self.assert_alive();
        // The library ends the connection after some of the messages that it refuses.
        if self.balloon.driver.front_end.is_closed_within(Duration::ZERO) {
            self.balloon = self.host.balloon();
        } else {
            self.balloon.driver.reset();
        }
        let (first, last) = (FIRST_FREE_PAGE + 17, self.pages - 2);
        for page in [first, first + 1, last] {
            self.host.block(0).fill(PageRange::new(page, 1), 9).unwrap();
        }
        self.balloon.inflate(&[first as u32, last as u32]);
        for page in [first, last] {
            assert!(self.host.block(0).is_hole(PageRange::new(page, 1)).unwrap(), "{after}");
        }
        let kept = self.host.block(0).read_page(first + 1).unwrap();
        assert_eq!(kept, page_content(9, first + 1), "{after}");
        self.balloon.report(&[((first + 1) * PAGE_SIZE, PAGE_SIZE)]);
        assert!(self.host.block(0).is_hole(PageRange::new(first + 1, 1)).unwrap(), "{after}");
        self.balloon.deflate(&pages(first, 1));
    }
}
