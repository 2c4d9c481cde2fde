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

use super::lazy_restore::LazyRestore;
use super::working_set::WorkingSetRecorder;
use crate::job::JobError;
use crate::memory::PageBuffer;
use crate::memory::runs::NEAR;
use crate::missing_faults::{HostPage, PageRequester};
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use pageferry_protocol::userfault::MAX_FAULTS;

/// Number of threads that read the pages that the guest waits for. Most of the time they wait for
/// the disk.
pub const FAULT_WORKERS: usize = 4;

/// Passes the pages that the guest touched to the fault workers.
#[derive(Debug)]
pub struct FaultForwarder<'a> {
    restore: &'a LazyRestore<'a>,
    pages: Vec<HostPage>,
    /// Records the touched pages, if this restore writes a working set.
    record: Option<&'a mut WorkingSetRecorder>,
}

impl<'a> FaultForwarder<'a> {
    /// Passes pages to the fault workers of `restore`.
    pub fn new(restore: &'a LazyRestore<'a>, record: Option<&'a mut WorkingSetRecorder>) -> Self {
        Self { restore, pages: Vec::with_capacity(MAX_FAULTS), record }
    }
}

impl PageRequester for FaultForwarder<'_> {
    fn request_pages(
        &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        read(&mut self.pages)?;
        for (at, host_page) in self.pages.drain(..) {
            self.restore.queue.push((at, host_page));
            let pages = self.restore.unread.block(at).pages(PageRange::new(host_page, 1));
            self.restore.cursor.fault(at, pages.end());
            self.restore.touched();
            if let Some(record) = &mut self.record {
                record.touched(at, pages);
            }
        }
        Ok(())
    }
}

impl LazyRestore<'_> {
    /// Runs one fault worker: reads and places the pages in the queue until the queue is closed.
    ///
    /// # Errors
    /// If the image cannot be read or is damaged, or if a page cannot be placed.
    pub fn run_fault_worker(&self, worker: usize) -> Result<(), JobError> {
        let mut buffer = PageBuffer::new(EXTENT_SIZE as usize);
        while let Some(host_page) = self.queue.next() {
            self.serve_fault(worker, host_page, &mut buffer)?;
        }
        Ok(())
    }

    /// Reads and places a host page that the guest waits for, and the pages claimed with it.
    pub(super) fn serve_fault(
        &self, worker: usize, (at, host_page): HostPage, buffer: &mut [u8],
    ) -> Result<(), JobError> {
        let unit = self.unread.block(at).unit();
        let wanted = PageRange::new(host_page * unit, unit);
        let range =
            if unit == 1 { self.claim_around(at, host_page) } else { self.claim(at, host_page) };
        let content = self.read(at, range, buffer)?;
        let start = ((wanted.first - range.first) * PAGE_SIZE) as usize;
        self.place(worker, at, wanted, &content[start..start + wanted.bytes() as usize])?;
        if range.count > wanted.count {
            self.place(worker, at, range, content)?;
        }
        Ok(())
    }

    fn claim(&self, at: usize, host_page: u64) -> PageRange {
        self.unread.take(at, host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        self.unread.block(at).pages(PageRange::new(host_page, 1))
    }

    /// Claims a page, and the unread pages around it if a page near it was read before (see the
    /// header).
    ///
    /// While the touched pages are recorded, only the kernel reads the pages around it from the
    /// disk, and they are not placed. The guest would not fault on a placed page, so the page would
    /// be missing in the record.
    pub(super) fn claim_around(&self, at: usize, page: u64) -> PageRange {
        let (word, first) = (page / WORD_BITS, page / NEAR * NEAR % WORD_BITS);
        let (unread, present) = (self.unread.block(at).bits(), self.source.present(at));
        let (around, itself) = (word_mask(first, first + NEAR), 1 << (page % WORD_BITS));
        let before = page
            .checked_sub(1)
            .is_some_and(|before| present.contains(before) && !unread.contains(before));
        let read = present.word(word) & !unread.word(word) & around & !itself;
        let wanted = if before || read != 0 { around } else { itself };
        let claimed =
            itself | self.unread.take(at, word, if self.recording { itself } else { wanted });
        let range = |bits: u64| {
            let (first, end) =
                (u64::from(bits.trailing_zeros()), WORD_BITS - u64::from(bits.leading_zeros()));
            PageRange::new(word * WORD_BITS + first, end - first)
        };
        if self.recording {
            self.source.will_need(at, range(claimed | unread.word(word) & wanted));
        }
        range(claimed)
    }
}
