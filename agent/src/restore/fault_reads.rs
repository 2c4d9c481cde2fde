// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading the pages that the guest waits for (lazy restore).
//!
//! One thread reads the faults, and it never waits for a disk. It puts the missing host pages into
//! a queue. [`FAULT_WORKERS`] other threads take them from the queue, read them from the image and
//! place them, while the first thread reads the next fault.
//!
//! Read-around: a guest that touched two pages near each other will probably touch the pages
//! between and around them. So with the second page a fault worker also claims the unread pages
//! within the same 64 KiB. The page that the guest waits for is placed first. Reading around the
//! first page as well would cost a guest that jumps about twice the time for each page, both from a
//! disk and from the page cache.
//!
//! The queue has a bound (see [`super::queues`]). When it is full, the thread that reads faults
//! waits.

use super::image_pages::ImagePages;
use super::queues::FaultQueue;
use super::working_set::WorkingSetRecorder;
use crate::job::JobError;
use crate::memory::PageBuffer;
use crate::memory::runs::NEAR;
use crate::missing_faults::{HostPage, PageRequester};
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use pageferry_protocol::userfault::MAX_FAULTS;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Number of threads that read the pages that the guest waits for. Most of the time they wait for
/// the disk.
pub const FAULT_WORKERS: usize = 4;

/// When the guest last touched a missing page.
#[derive(Debug)]
pub struct LastTouch {
    start: Instant,
    /// Nanoseconds since `start`.
    at: AtomicU64,
}

impl LastTouch {
    /// Counts the present as a touch.
    pub fn now() -> Self {
        Self { start: Instant::now(), at: AtomicU64::new(0) }
    }

    fn touched(&self) {
        let since = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.at.store(since, Ordering::Relaxed);
    }

    /// The time of the last touch.
    pub fn time(&self) -> Instant {
        self.start + Duration::from_nanos(self.at.load(Ordering::Relaxed))
    }
}

/// Passes the pages that the guest touched to the fault workers.
#[derive(Debug)]
pub struct FaultForwarder<'a> {
    pages: &'a ImagePages<'a>,
    queue: &'a FaultQueue,
    last_touch: &'a LastTouch,
    touched: Vec<HostPage>,
    /// Records the touched pages, if this restore writes a working set.
    record: Option<&'a mut WorkingSetRecorder>,
}

impl<'a> FaultForwarder<'a> {
    /// Puts touched pages into `queue`.
    pub fn new(
        pages: &'a ImagePages<'a>, queue: &'a FaultQueue, last_touch: &'a LastTouch,
        record: Option<&'a mut WorkingSetRecorder>,
    ) -> Self {
        Self { pages, queue, last_touch, touched: Vec::with_capacity(MAX_FAULTS), record }
    }
}

impl PageRequester for FaultForwarder<'_> {
    fn request_pages(
        &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        read(&mut self.touched)?;
        for (at, host_page) in self.touched.drain(..) {
            self.queue.push((at, host_page));
            let pages = self.pages.unread.block(at).pages(PageRange::new(host_page, 1));
            self.pages.cursor.fault(at, pages.end());
            self.last_touch.touched();
            if let Some(record) = &mut self.record {
                record.touched(at, pages);
            }
        }
        Ok(())
    }
}

/// Reads and places the pages that the guest waits for.
#[derive(Debug)]
pub struct FaultWorker<'a> {
    pages: &'a ImagePages<'a>,
    /// The touched pages are recorded.
    recording: bool,
    /// Its number among all threads of the restore, which is also its slot in the fence.
    worker: usize,
    buffer: PageBuffer,
}

impl<'a> FaultWorker<'a> {
    /// The fault worker with the number `worker`. If the touched pages are recorded (`recording`),
    /// it places only those.
    pub fn new(pages: &'a ImagePages<'a>, recording: bool, worker: usize) -> Self {
        Self { pages, recording, worker, buffer: PageBuffer::new(EXTENT_SIZE as usize) }
    }

    /// Reads and places the pages in `queue` until the queue is closed.
    ///
    /// # Errors
    /// If the image cannot be read or is damaged, or if a page cannot be placed.
    pub fn run(&mut self, queue: &FaultQueue) -> Result<(), JobError> {
        while let Some(host_page) = queue.next() {
            self.serve_fault(host_page)?;
        }
        Ok(())
    }

    /// Reads and places a host page that the guest waits for, and the pages claimed with it.
    pub(super) fn serve_fault(&mut self, (at, host_page): HostPage) -> Result<(), JobError> {
        let (pages, worker) = (self.pages, self.worker);
        let unit = pages.unread.block(at).unit();
        let wanted = PageRange::new(host_page * unit, unit);
        let range =
            if unit == 1 { self.claim_around(at, host_page) } else { self.claim(at, host_page) };
        let content = pages.read(at, range, &mut self.buffer)?;
        let start = ((wanted.first - range.first) * PAGE_SIZE) as usize;
        pages.place(worker, at, wanted, &content[start..start + wanted.bytes() as usize])?;
        if range.count > wanted.count {
            pages.place(worker, at, range, content)?;
        }
        Ok(())
    }

    fn claim(&self, at: usize, host_page: u64) -> PageRange {
        self.pages.unread.take(at, host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        self.pages.unread.block(at).pages(PageRange::new(host_page, 1))
    }

    /// Claims a page, and the unread pages around it if a page near it was read before (see the
    /// header).
    ///
    /// While the touched pages are recorded, only the kernel reads the pages around it from the
    /// disk, and they are not placed. The guest would not fault on a placed page, so the page would
    /// be missing in the record.
    pub(super) fn claim_around(&self, at: usize, page: u64) -> PageRange {
        let (word, first) = (page / WORD_BITS, page / NEAR * NEAR % WORD_BITS);
        let (unread, present) = (self.pages.unread.block(at).bits(), self.pages.source.present(at));
        let (around, itself) = (word_mask(first, first + NEAR), 1 << (page % WORD_BITS));
        let before = page
            .checked_sub(1)
            .is_some_and(|before| present.contains(before) && !unread.contains(before));
        let read = present.word(word) & !unread.word(word) & around & !itself;
        let wanted = if before || read != 0 { around } else { itself };
        let claimed =
            itself | self.pages.unread.take(at, word, if self.recording { itself } else { wanted });
        let range = |bits: u64| {
            let (first, end) =
                (u64::from(bits.trailing_zeros()), WORD_BITS - u64::from(bits.leading_zeros()));
            PageRange::new(word * WORD_BITS + first, end - first)
        };
        if self.recording {
            self.pages.source.will_need(at, range(claimed | unread.word(word) & wanted));
        }
        range(claimed)
    }
}
