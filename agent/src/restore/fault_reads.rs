//! What the guest waits for.
//!
//! One thread reads the faults, and never a disk. It hands what is missing to a few others, which
//! read it from the image while the next fault comes.
//!
//! A guest that has touched one page and then one near it will touch those around them: so what is
//! unread within 64 KiB is read with the second, which is placed first. With the first it would
//! cost a guest that jumps about twice the time for each page, from a disk and from memory.

use super::lazy_restore::LazyRestore;
use super::working_set::WorkingSetRecorder;
use crate::image::PageBuffer;
use crate::job::JobError;
use crate::memory::runs::NEAR;
use crate::missing_faults::{HostPage, PageRequester};
use crossbeam_channel::{Receiver, Sender, bounded, select_biased};
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use pageferry_protocol::userfault::MAX_FAULTS;
use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

/// Threads that read what the guest waits for: they wait for the disk most of the time.
pub const SERVERS: usize = 4;
/// Most host pages that wait: more than guests have processors.
const PLACES: usize = 1024;

/// Host pages on their way from the thread that reads the faults to those that answer them.
#[derive(Debug)]
pub struct FaultQueue {
    to: Sender<HostPage>,
    from: Receiver<HostPage>,
    /// Nothing is ever sent here: it ends when `open` is taken.
    closed: Receiver<Infallible>,
    open: Mutex<Option<Sender<Infallible>>>,
}

impl Default for FaultQueue {
    fn default() -> Self {
        let (to, from) = bounded(PLACES);
        let (open, closed) = bounded(0);
        Self { to, from, closed, open: Mutex::new(Some(open)) }
    }
}

impl FaultQueue {
    /// Hands a host page over; waits while there is no place.
    fn push(&self, page: HostPage) {
        select_biased! {
            recv(self.closed) -> _ => {}
            // The other end is here.
            send(self.to, page) -> _ => {}
        }
    }

    /// Waits for a host page; `None` once it is closed.
    fn next(&self) -> Option<HostPage> {
        select_biased! {
            recv(self.closed) -> _ => None,
            recv(self.from) -> page => page.ok(),
        }
    }

    /// Nothing more is handed out.
    pub fn close(&self) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Has what is touched read from the image.
#[derive(Debug)]
pub struct FaultForwarder<'a> {
    supply: &'a LazyRestore<'a>,
    pages: Vec<HostPage>,
    /// Where what is touched is written down.
    record: Option<&'a mut WorkingSetRecorder>,
}

impl<'a> FaultForwarder<'a> {
    /// By the threads of `supply`.
    pub fn new(supply: &'a LazyRestore<'a>, record: Option<&'a mut WorkingSetRecorder>) -> Self {
        Self { supply, pages: Vec::with_capacity(MAX_FAULTS), record }
    }
}

impl PageRequester for FaultForwarder<'_> {
    fn request_pages(
        &mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        read(&mut self.pages)?;
        for (at, host_page) in self.pages.drain(..) {
            self.supply.queue.push((at, host_page));
            let pages = self.supply.unread.block(at).pages(PageRange::new(host_page, 1));
            self.supply.cursor.fault(at, pages.end());
            self.supply.touched();
            if let Some(record) = &mut self.record {
                record.touched(at, pages);
            }
        }
        Ok(())
    }
}

impl LazyRestore<'_> {
    /// Answers what the guest waits for, until all is over.
    ///
    /// # Errors
    /// If the image cannot be read, or is damaged, or a page cannot be placed.
    pub fn serve(&self, worker: usize) -> Result<(), JobError> {
        let mut buffer = PageBuffer::new(EXTENT_SIZE as usize);
        while let Some(host_page) = self.queue.next() {
            self.answer(worker, host_page, &mut buffer)?;
        }
        Ok(())
    }

    /// Reads and places a host page, and what is read along with it.
    pub(super) fn answer(
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

    /// A page; and what is unread around it, if something there was read before: then the guest is
    /// at work around here. While what it touches is written down only the disk reads what is
    /// around, since a page that is placed untouched would be missing in the record.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_page_is_handed_to_one_thread_and_all_end_when_it_is_closed() {
        let queue = FaultQueue::default();
        let found = Mutex::new(BTreeSet::new());
        std::thread::scope(|scope| {
            for _ in 0..SERVERS {
                scope.spawn(|| {
                    while let Some(page) = queue.next() {
                        assert!(found.lock().unwrap().insert(page), "{page:?} came twice");
                    }
                });
            }
            let pages = (0..5 * PLACES as u64).map(|page| (page as usize % 3, page << 5));
            pages.for_each(|page| queue.push(page));
            while found.lock().unwrap().len() < 5 * PLACES {
                std::thread::yield_now();
            }
            queue.close();
        });
    }
}
