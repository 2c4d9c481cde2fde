// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The counters of one worker of a migration.
//!
//! All workers of a job share its counters. If each of them added to these for each record, the
//! cache lines of the counters would travel from core to core all the time. So a worker counts by
//! itself, and publishes what it has counted once for each batch.

use super::{LiveCounters, add};

/// What a worker has counted and not published yet.
#[derive(Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are named like the counters of the job")]
pub struct WorkerCounters {
    pub pages_sent: u64,
    pub pages_received: u64,
    pub zero_pages: u64,
    pub discarded_pages: u64,
    pub freed_pages: u64,
    pub stray_pages: u64,
    pub wire_bytes: u64,
    pub pass_pages_done: u64,
}

impl WorkerCounters {
    /// Adds what was counted to the counters of the job, and begins anew.
    pub fn publish(&mut self, live: &LiveCounters) {
        let Self {
            pages_sent,
            pages_received,
            zero_pages,
            discarded_pages,
            freed_pages,
            stray_pages,
            wire_bytes,
            pass_pages_done,
        } = std::mem::take(self);
        for (count, counter) in [
            (pages_sent, &live.pages_sent),
            (pages_received, &live.pages_received),
            (zero_pages, &live.zero_pages),
            (discarded_pages, &live.discarded_pages),
            (freed_pages, &live.freed_pages),
            (stray_pages, &live.stray_pages),
            (wire_bytes, &live.wire_bytes),
            (pass_pages_done, &live.pass_pages_done),
        ] {
            // Most are zero, and an addition of zero takes the cache line, too.
            if count != 0 {
                add(counter, count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::Counters;

    #[test]
    fn what_is_published_is_added_once_under_its_name() {
        let live = LiveCounters::default();
        let mut counters = WorkerCounters {
            pages_sent: 1,
            pages_received: 2,
            zero_pages: 3,
            discarded_pages: 4,
            freed_pages: 5,
            stray_pages: 6,
            wire_bytes: 7,
            pass_pages_done: 8,
        };
        counters.publish(&live);
        assert_eq!(counters, WorkerCounters::default());
        counters.publish(&live);
        counters.wire_bytes = 10;
        counters.publish(&live);
        let mut reported = Counters::default();
        live.report(&mut reported);
        let expected = Counters {
            pages_sent: 1,
            pages_received: 2,
            zero_pages: 3,
            discarded_pages: 4,
            freed_pages: 5,
            stray_pages: 6,
            wire_bytes: 17,
            pass_pages_done: 8,
            ..Counters::default()
        };
        assert_eq!(reported, expected);
    }
}
