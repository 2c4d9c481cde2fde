// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The counters of a running job, which several threads update at once.
//!
//! - [`latency`]: a histogram of the time that faults wait;
//! - [`stopwatch`]: the time that something lasts;
//! - [`totals`]: the sums over all jobs of the agent;
//! - [`worker`]: what one worker counts, published in batches;
//! - this file: the plain counters.

pub mod latency;
pub mod stopwatch;
pub mod totals;
pub mod worker;

use latency::Latency;
use pageferry_protocol::control::job::Counters;
use std::sync::atomic::{AtomicU64, Ordering};
use stopwatch::Stopwatch;

/// The counters of a running job. The numbers are relaxed atomics: they order no other memory.
#[derive(Debug, Default)]
pub struct LiveCounters {
    /// See [`Counters::pages_sent`].
    pub pages_sent: AtomicU64,
    /// See [`Counters::pages_received`].
    pub pages_received: AtomicU64,
    /// See [`Counters::pages_saved`].
    pub pages_saved: AtomicU64,
    /// See [`Counters::pages_restored`].
    pub pages_restored: AtomicU64,
    /// See [`Counters::zero_pages`].
    pub zero_pages: AtomicU64,
    /// See [`Counters::discarded_pages`].
    pub discarded_pages: AtomicU64,
    /// See [`Counters::freed_pages`].
    pub freed_pages: AtomicU64,
    /// See [`Counters::stray_pages`].
    pub stray_pages: AtomicU64,
    /// See [`Counters::wire_bytes`].
    pub wire_bytes: AtomicU64,
    /// See [`Counters::image_bytes`].
    pub image_bytes: AtomicU64,
    /// See [`Counters::pass_pages_done`].
    pub pass_pages_done: AtomicU64,
    /// See [`Counters::faults`].
    pub faults: AtomicU64,
    /// See [`Counters::write_faults`].
    pub write_faults: AtomicU64,
    /// See [`Counters::requested_pages`].
    pub requested_pages: AtomicU64,
    /// See [`Counters::pushed_pages`].
    pub pushed_pages: AtomicU64,
    /// See [`Counters::dropped_pages`].
    pub dropped_pages: AtomicU64,
    /// See [`Counters::released_pages`].
    pub released_pages: AtomicU64,
    /// See [`Counters::copied_before_write_pages`].
    pub copied_before_write_pages: AtomicU64,
    /// See [`Counters::copied_before_discard_pages`].
    pub copied_before_discard_pages: AtomicU64,
    /// See [`Counters::working_set_pages`].
    pub working_set_pages: AtomicU64,
    /// The time that faults waited.
    pub latency: Latency,
    /// See [`Counters::disconnected_us`].
    pub disconnected: Stopwatch,
}

impl LiveCounters {
    /// Writes the current values into `counters`, which a status reports.
    pub fn report(&self, counters: &mut Counters) {
        counters.pages_sent = get(&self.pages_sent);
        counters.pages_received = get(&self.pages_received);
        counters.pages_saved = get(&self.pages_saved);
        counters.pages_restored = get(&self.pages_restored);
        counters.zero_pages = get(&self.zero_pages);
        counters.discarded_pages = get(&self.discarded_pages);
        counters.freed_pages = get(&self.freed_pages);
        counters.stray_pages = get(&self.stray_pages);
        counters.wire_bytes = get(&self.wire_bytes);
        counters.image_bytes = get(&self.image_bytes);
        counters.pass_pages_done = get(&self.pass_pages_done);
        counters.faults = get(&self.faults);
        counters.write_faults = get(&self.write_faults);
        counters.requested_pages = get(&self.requested_pages);
        counters.pushed_pages = get(&self.pushed_pages);
        counters.dropped_pages = get(&self.dropped_pages);
        counters.released_pages = get(&self.released_pages);
        counters.copied_before_write_pages = get(&self.copied_before_write_pages);
        counters.copied_before_discard_pages = get(&self.copied_before_discard_pages);
        counters.working_set_pages = get(&self.working_set_pages);
        let [p50, p90, p99, max] = self.latency.summary();
        counters.fault_p50_us = p50;
        counters.fault_p90_us = p90;
        counters.fault_p99_us = p99;
        counters.fault_max_us = max;
        counters.disconnected_us = self.disconnected.micros();
    }
}

/// Adds to a counter. Only status reports and estimates read it, so relaxed ordering is enough.
pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// Reads a counter.
pub fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
