// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the store serves.

use crate::guests::Time;

/// Requests to the store, and how the guests fared.
#[derive(Debug)]
pub(crate) struct Load {
    extent: u64,
    /// Number of requests in each second.
    seconds: Vec<u64>,
    /// Reads of guests.
    pub(crate) reads: f64,
    /// Reads that the host's cache could answer at once.
    pub(crate) hits: f64,
    /// Reads that waited for a request which another guest had made.
    pub(crate) shared: f64,
    /// Microseconds from the start of a guest until its working set was there.
    pub(crate) starts: Vec<Time>,
}

impl Load {
    /// No load yet, of extents of this size in bytes.
    pub(crate) fn new(extent: u64) -> Self {
        let (reads, hits, shared) = (0.0, 0.0, 0.0);
        Self { extent, seconds: Vec::new(), reads, hits, shared, starts: Vec::new() }
    }

    /// Counts a request.
    pub(crate) fn request(&mut self, at: Time) {
        let second = (at / 1_000_000) as usize;
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, 0);
        }
        self.seconds[second] += 1;
    }

    /// All requests.
    pub(crate) fn requests(&self) -> u64 {
        self.seconds.iter().sum()
    }

    /// Requests per second, from the start to the last request.
    pub(crate) fn mean(&self) -> f64 {
        self.requests() as f64 / self.seconds.len().max(1) as f64
    }

    /// Requests in the second with the most.
    pub(crate) fn peak(&self) -> u64 {
        self.seconds.iter().copied().max().unwrap_or(0)
    }

    /// Bytes that the store has sent.
    pub(crate) fn bytes(&self) -> u64 {
        self.requests() * self.extent
    }

    /// Seconds within which `percent` of the guests had their working set.
    pub(crate) fn started(&self, percent: usize) -> f64 {
        let mut starts = self.starts.clone();
        starts.sort_unstable();
        let index = (starts.len() * percent / 100).min(starts.len().saturating_sub(1));
        starts.get(index).map_or(0.0, |time| *time as f64 / 1e6)
    }
}
