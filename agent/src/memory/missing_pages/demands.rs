// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Missing host pages that a device of this agent needs: see [`crate::memory::fetch`].

use crate::event::Event;
use crate::lock::lock;
use crate::memory::host_page_set::HostPageSet;
use std::sync::Mutex;

/// Host pages that are to be fetched, and the event for the thread that handles faults.
#[derive(Debug)]
pub struct Demands {
    host_pages: Mutex<Vec<(usize, u64)>>,
    event: Event,
}

impl Demands {
    /// No demands.
    ///
    /// # Errors
    /// If the kernel refuses an event descriptor.
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { host_pages: Mutex::default(), event: Event::new()? })
    }

    /// Has these host pages fetched, as if the guest had touched them: indexes of blocks, and host
    /// pages.
    pub fn add(&self, host_pages: Vec<(usize, u64)>) {
        lock(&self.host_pages).extend(host_pages);
        self.event.signal();
    }

    /// Readable when there are demands.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Takes the demands that are still in `missing`.
    pub(super) fn take(&self, missing: &HostPageSet) -> Vec<(usize, u64)> {
        self.event.reset();
        let mut host_pages = std::mem::take(&mut *lock(&self.host_pages));
        host_pages.retain(|(at, host_page)| missing.block(*at).bits().contains(*host_page));
        host_pages.dedup();
        host_pages
    }
}
