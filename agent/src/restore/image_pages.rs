// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The missing pages of a lazy restore, and how a thread reads and places them.
//!
//! A host page that has content in the image is in two sets:
//!
//! - *unread* until a thread begins to read it. A thread that prefetches reads only what it takes
//!   from this set, so no page is prefetched twice. A fault worker reads the page
//!   in any case: a prefetch thread may hold the page already, but read megabytes before it.
//! - *missing* until it is placed or discarded, whatever was read of it. See
//!   [`crate::memory::missing_pages`].
//!
//! If there is no memory to place a page in, the thread tries again for `NO_MEMORY_TIMEOUT` while
//! the guest waits. If the store of the image does not answer, it tries again until it does.

use super::source::Source;
use crate::job::{Job, JobError, add};
use crate::memory::MemoryError;
use crate::memory::cursor::Cursor;
use crate::memory::host_page_set::HostPageSet;
use crate::memory::missing_pages::MissingPages;
use crate::memory::page_placer::PlaceError;
use crate::missing_faults::{RETRY, ShortageReport};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a page may fail to be placed for want of memory before the restore fails.
const NO_MEMORY_TIMEOUT: Duration = Duration::from_secs(60);

/// The pause before a store is asked again that did not answer.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// The missing pages of a guest, and the image that has their content.
#[derive(Debug)]
pub struct ImagePages<'a> {
    /// The job.
    pub job: &'a Job,
    /// The image to read from.
    pub source: &'a Source,
    /// The missing pages, and how to place them.
    pub missing_pages: &'a MissingPages,
    /// The host pages that no thread has begun to read.
    pub unread: HostPageSet,
    /// The position of the prefetch.
    pub cursor: Cursor,
    ended: AtomicBool,
}

impl<'a> ImagePages<'a> {
    /// The pages of `source` that are missing. All of them are still `unread`.
    pub fn new(
        job: &'a Job, source: &'a Source, missing_pages: &'a MissingPages, unread: HostPageSet,
    ) -> Self {
        let (cursor, ended) = (Cursor::new(job.memory.blocks()), AtomicBool::new(false));
        Self { job, source, missing_pages, unread, cursor, ended }
    }

    /// Tells all threads to end.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// True if the threads must end: the restore is complete, or a thread has failed.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Reads the pages `range` into the start of `buffer`, and checks them. The pages lie in one
    /// extent and are whole host pages.
    ///
    /// Pages without content are filled with zero if a host page is larger than a page. Otherwise
    /// they are not missing, so they are never placed, and the buffer holds no defined bytes for
    /// them.
    ///
    /// # Errors
    /// If a page cannot be read or is damaged. The error names the page and its place in the file.
    pub fn read<'b>(
        &self, at: usize, range: PageRange, buffer: &'b mut [u8],
    ) -> Result<&'b [u8], JobError> {
        let content = &mut buffer[..range.bytes() as usize];
        let pages = self.source.present(at).count(range);
        if pages < range.count && self.missing_pages.missing().block(at).unit() > 1 {
            content.fill(0);
        }
        self.read_from_source(at, range, content)?;
        add(&self.job.live.image_bytes, pages * PAGE_SIZE);
        Ok(content)
    }

    /// Reads the pages. While the store of the image does not answer, the guest waits, and so does
    /// this thread: the memory is not lost.
    fn read_from_source(
        &self, at: usize, range: PageRange, content: &mut [u8],
    ) -> Result<(), JobError> {
        let mut waits = false;
        loop {
            match self.source.read(at, range, content) {
                Err(error) if error.fault.may_pass() && !self.has_ended() => {
                    let why = crate::error::chain(&error);
                    if !waits {
                        log::warn!("job {}: the guest waits for the store: {why}", self.job.id);
                    }
                    self.job.note(&format!("waits for the store: {why}"));
                    waits = true;
                    self.job.cancel.wait(&[], Instant::now() + STORE_RETRY)?;
                }
                read => {
                    if waits && read.is_ok() {
                        log::info!("job {}: the store answers again", self.job.id);
                        self.job.note("");
                    }
                    return Ok(read?);
                }
            }
        }
    }

    /// Those of the pages `range` that the base of a clone does not have. The others are there.
    /// Adds the number of pages that were missing to `placed`.
    pub fn leave_to_base(
        &self, worker: usize, at: usize, range: PageRange, placed: &mut u64,
    ) -> Vec<PageRange> {
        let Some(base) = self.missing_pages.base(at) else { return vec![range] };
        let (mut rest, mut next) = (Vec::new(), range.first);
        for run in base.filled().runs(range) {
            rest.push(PageRange::new(next, run.first - next));
            let readers = &self.job.memory.readers;
            *placed += self.missing_pages.found_in_base(readers, worker, at, run);
            next = run.end();
        }
        rest.push(PageRange::new(next, range.end() - next));
        rest.retain(|run| !run.is_empty());
        rest
    }

    /// Places those of the pages `range` that are missing. The range consists of whole host pages,
    /// and `worker` is the number of the calling thread. Returns the number of pages placed.
    ///
    /// # Errors
    /// If the kernel refuses for another reason than want of memory, or if there is no memory for
    /// `NO_MEMORY_TIMEOUT`, or when the restore ends.
    pub fn place(
        &self, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, JobError> {
        let begun = Instant::now();
        let mut shortage = ShortageReport::new(self.job);
        loop {
            match self.place_once(worker, at, range, content) {
                Ok(pages) => {
                    add(&self.job.live.pages_restored, pages);
                    return Ok(pages);
                }
                Err(error)
                    if error.lacks_memory()
                        && begun.elapsed() < NO_MEMORY_TIMEOUT
                        && !self.has_ended() =>
                {
                    shortage.report(at);
                    // The guest waits for the memory in the meantime. It is not lost.
                    std::thread::sleep(RETRY);
                }
                Err(error) => {
                    return Err(
                        MemoryError::not_placed(&self.job.memory.blocks()[at], error).into()
                    );
                }
            }
        }
    }

    fn place_once(
        &self, worker: usize, at: usize, range: PageRange, content: &[u8],
    ) -> Result<u64, PlaceError> {
        let (readers, missing) = (&self.job.memory.readers, self.missing_pages.missing().block(at));
        if missing.unit() == 1 {
            return self.missing_pages.place_pages(readers, worker, at, range, content);
        }
        let host_pages = missing.covering(range);
        let bytes = (missing.unit() * PAGE_SIZE) as usize;
        let each = (host_pages.first..host_pages.end()).zip(content.chunks_exact(bytes));
        each.map(|(host_page, content)| {
            self.missing_pages.place_host_page(readers, worker, at, host_page, content)
        })
        .sum()
    }
}
