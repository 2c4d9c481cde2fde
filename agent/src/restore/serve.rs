//! What the guest waits for.
//!
//! One thread reads the faults, and never a disk. It hands what is owed to a few others, which read it from the image while the next fault comes: by a ring of atomic places, and
//! an event descriptor that counts, so that one of them is woken for each.
//!
//! A guest that has touched one page and then one near it will touch those around them: so what is unread within 64 KiB is read with the second, which is placed first. With the
//! first it would cost a guest that jumps about twice the time for each page, from a disk and from memory.

use super::supply::Supply;
use super::working_set::Record;
use crate::faults::{HostPage, Supplier};
use crate::image::PageBuffer;
use crate::job::JobError;
use crate::memory::runs::NEAR;
use pageferry_protocol::image::EXTENT_SIZE;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, word_mask};
use pageferry_protocol::userfault::MAX_FAULTS;
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Threads that read what the guest waits for: they wait for the disk most of the time.
pub const SERVERS: usize = 4;
/// Places of the ring: more than guests have processors.
const PLACES: usize = 1024;
/// How long a full ring is left alone.
const FULL: Duration = Duration::from_micros(50);
/// Bits of a place that hold the host page.
const PAGE_BITS: u32 = 40;

/// Host pages on their way from the thread that reads the faults to those that answer them.
#[derive(Debug)]
pub struct Queue {
    /// The block's index plus one, and the host page; 0 if the place is free.
    places: Box<[AtomicU64]>,
    /// The place that is filled next. Only one thread does.
    tail: AtomicU64,
    /// The place that is emptied next.
    head: AtomicU64,
    /// Counts the places that are filled and not claimed.
    filled: OwnedFd,
    closed: AtomicBool,
}

impl Queue {
    /// An empty one.
    ///
    /// # Errors
    /// If the kernel has no event descriptor.
    pub fn new() -> Result<Self, JobError> {
        let filled = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE);
        Ok(Self {
            places: (0..PLACES).map(|_| AtomicU64::new(0)).collect(),
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            filled: filled.map_err(|errno| JobError::Io { what: "make an event descriptor", source: errno.into() })?,
            closed: AtomicBool::new(false),
        })
    }

    /// Hands a host page over. One thread does this.
    fn push(&self, (at, host_page): HostPage) {
        let tail = self.tail.load(Ordering::Relaxed);
        let place = &self.places[tail as usize % PLACES];
        while place.load(Ordering::Acquire) != 0 {
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            std::thread::sleep(FULL);
        }
        place.store(((at as u64 + 1) << PAGE_BITS) | host_page, Ordering::Release);
        self.tail.store(tail + 1, Ordering::Relaxed);
        self.wake(1);
    }

    fn wake(&self, count: u64) {
        // Fails only if it counts more than 2^64 - 2.
        let _ = rustix::io::write(&self.filled, &count.to_ne_bytes());
    }

    /// Waits for a host page; `None` once it is closed.
    fn next(&self) -> Result<Option<HostPage>, JobError> {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.filled, &mut count) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(JobError::Io { what: "read an event descriptor", source: errno.into() }),
            }
        }
        if self.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        // As many get past the descriptor as there are places filled, so this one is; perhaps it was another thread that heard of it, and came here before.
        let head = self.head.fetch_add(1, Ordering::AcqRel);
        let place = self.places[head as usize % PLACES].swap(0, Ordering::AcqRel);
        Ok(Some(((place >> PAGE_BITS).saturating_sub(1) as usize, place & ((1 << PAGE_BITS) - 1))))
    }

    /// Nothing more is handed out.
    pub fn close(&self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.wake(SERVERS as u64);
        }
    }
}

/// Has what is touched read from the image.
#[derive(Debug)]
pub struct Asking<'a> {
    supply: &'a Supply<'a>,
    pages: Vec<HostPage>,
    /// Where what is touched is written down.
    record: Option<&'a mut Record>,
}

impl<'a> Asking<'a> {
    /// By the threads of `supply`.
    pub fn new(supply: &'a Supply<'a>, record: Option<&'a mut Record>) -> Self {
        Self { supply, pages: Vec::with_capacity(MAX_FAULTS), record }
    }
}

impl Supplier for Asking<'_> {
    fn serve(&mut self, read: impl FnOnce(&mut Vec<HostPage>) -> Result<(), JobError>) -> Result<(), JobError> {
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

impl Supply<'_> {
    /// Answers what the guest waits for, until all is over.
    ///
    /// # Errors
    /// If the image cannot be read, or is damaged, or a page cannot be placed.
    pub fn serve(&self, worker: usize) -> Result<(), JobError> {
        let mut buffer = PageBuffer::new(EXTENT_SIZE as usize);
        while let Some((at, host_page)) = self.queue.next()? {
            let unit = self.unread.block(at).unit();
            let wanted = PageRange::new(host_page * unit, unit);
            let range = if unit == 1 { self.claim_around(at, host_page) } else { self.claim(at, host_page) };
            let content = self.read(at, range, &mut buffer)?;
            let start = ((wanted.first - range.first) * PAGE_SIZE) as usize;
            self.place(worker, at, wanted, &content[start..start + wanted.bytes() as usize])?;
            if range.count > wanted.count {
                self.place(worker, at, range, content)?;
            }
        }
        Ok(())
    }

    fn claim(&self, at: usize, host_page: u64) -> PageRange {
        self.unread.take(at, host_page / WORD_BITS, 1 << (host_page % WORD_BITS));
        self.unread.block(at).pages(PageRange::new(host_page, 1))
    }

    /// A page; and what is unread around it, if something there was read before: then the guest is at work around here. While what it touches is written down only
    /// the disk reads what is around, since a page that is placed untouched would be missing in the record.
    fn claim_around(&self, at: usize, page: u64) -> PageRange {
        let (word, first) = (page / WORD_BITS, page / NEAR * NEAR % WORD_BITS);
        let (unread, present) = (self.unread.block(at).bits(), self.source.present(at));
        let (around, itself) = (word_mask(first, first + NEAR), 1 << (page % WORD_BITS));
        let before = page.checked_sub(1).is_some_and(|before| present.contains(before) && !unread.contains(before));
        let read = present.word(word) & !unread.word(word) & around & !itself;
        let wanted = if before || read != 0 { around } else { itself };
        let claimed = itself | self.unread.take(at, word, if self.recording { itself } else { wanted });
        let range = |bits: u64| {
            let (first, end) = (u64::from(bits.trailing_zeros()), WORD_BITS - u64::from(bits.leading_zeros()));
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
    use std::sync::Mutex;

    #[test]
    fn each_page_is_handed_to_one_thread_and_all_end_when_it_is_closed() {
        let queue = Queue::new().unwrap();
        let found = Mutex::new(BTreeSet::new());
        std::thread::scope(|scope| {
            for _ in 0..SERVERS {
                scope.spawn(|| {
                    while let Some(page) = queue.next().unwrap() {
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
