// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Eager restore: all memory is placed before the guest runs.
//!
//! The workers share the list of extents in which the image has content. A worker claims a stretch
//! of neighbouring extents from a common counter. It reads one extent at a time into its own
//! buffer, checks every page and the checksum of the extent, and writes the pages into the file of
//! the block. The kernel reads the next extents of the stretch from the disk in the meantime.
//!
//! The VMM may discard or free pages while the workers write. Such pages must stay holes. A worker
//! publishes the word of pages that it is about to write, and only then looks which of them were
//! given back. A discard sets its marks, waits for that worker, and then punches (see
//! [`crate::memory::fence`]). No worker clears such a mark.
//!
//! When one worker fails, the others stop at their next extent, and the restore fails.

use super::reset::ResetGuard;
use super::source::Source;
use super::{VmmState, resume_guest};
use crate::event::Event;
use crate::image::workers::items_per_claim;
use crate::job::{Job, JobError, add};
use crate::memory::MemoryError;
use crate::memory::PageBuffer;
use crate::memory::backing::BackingKind;
use crate::memory::huge::{self, Fill, HugeWindow};
use crate::memory::placement::{HugePageUse, Pages, Placement};
use crate::memory::recorded_discards::RecordedDiscards;
use crate::memory::{BackingError, Block};
use crate::sandbox::{ThreadKind, enter_thread};
use pageferry_protocol::control::job::{Phase, RestoreOptions};
use pageferry_protocol::image::{EXTENT_PAGES, EXTENT_SIZE};
use pageferry_protocol::memory::{HUGE_PAGE, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use rustix::event::PollFlags;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest time between two updates of the job's progress.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Most extents that a worker claims at once: 64 MiB in a row, because disks read fastest in
/// sequence.
const STRETCH: usize = 32;
/// Number of extents that the kernel reads ahead for each worker.
const AHEAD: usize = 4;

/// Places all memory, loads the state, and resumes the guest.
///
/// # Errors
/// The reason for the failure. The guest does not run and its memory is empty, unless the VMM
/// failed to resume it: the guest may run then.
pub fn restore(
    job: &Arc<Job>, source: &Source, state: &VmmState, mut guard: ResetGuard<'_>,
    options: &RestoreOptions,
) -> Result<(), JobError> {
    job.enter(Phase::Restoring);
    let since = guard.discards.since();
    Filling::new(job, source, since, options)?.run(options.workers.into())?;
    state.load(job)?;
    resume_guest(job, state.guest, &mut guard.handed_over)
}

/// What all workers share.
struct Filling<'a> {
    job: &'a Job,
    source: &'a Source,
    /// The pages that the VMM gave back since the restore began.
    given_back: &'a RecordedDiscards,
    /// The extents that have content: index of the block, and pages.
    extents: Vec<(usize, PageRange)>,
    next: AtomicUsize,
    /// For each block.
    placements: Vec<Placement>,
    /// Number of extents that a worker claims at once.
    stretch: usize,
    /// Number of pages that have content.
    pages: u64,
    /// Of these, the pages of the extents that the workers have placed.
    done: AtomicU64,
    failed: AtomicBool,
    /// Number of workers that have ended.
    ended: AtomicUsize,
    /// Readable when a worker has ended.
    event: Event,
}

/// Reports on drop that a worker has ended, also if it panicked.
struct Ending<'a>(&'a Filling<'a>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
        self.0.event.signal();
    }
}

impl<'a> Filling<'a> {
    fn new(
        job: &'a Job, source: &'a Source, given_back: &'a RecordedDiscards,
        options: &RestoreOptions,
    ) -> Result<Self, JobError> {
        let event = Event::new().map_err(JobError::from_io("create an event descriptor"))?;
        let mut extents = Vec::new();
        let mut pages = 0;
        for (at, block) in job.memory.blocks().iter().enumerate() {
            let present = source.present(at);
            let mut rest = block.all();
            while let Some(page) = present.next_set(rest) {
                let extent = PageRange::new(page / EXTENT_PAGES * EXTENT_PAGES, EXTENT_PAGES)
                    .intersection(&block.all());
                extents.push((at, extent));
                pages += present.count(extent);
                rest = PageRange::new(extent.end(), block.geometry.pages() - extent.end());
            }
        }
        job.count(|counters| counters.remaining_pages = pages);
        let (next, failed, ended) =
            (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        let stretch = items_per_claim(extents.len(), options.workers.into(), STRETCH);
        let huge_pages = HugePageUse::chosen(options.huge_pages);
        let placements = Placement::of(&job.memory, huge_pages, &job.placing);
        Ok(Self {
            job,
            source,
            given_back,
            extents,
            next,
            placements,
            stretch,
            pages,
            done: AtomicU64::new(0),
            failed,
            ended,
            event,
        })
    }

    /// Places all content of the image.
    fn run(&self, workers: usize) -> Result<(), JobError> {
        let workers = workers.min(self.extents.len());
        std::thread::scope(|scope| {
            let spawn = |index| {
                std::thread::Builder::new().spawn_scoped(scope, move || {
                    enter_thread(ThreadKind::Pages);
                    self.job.cancel.cover_this_thread();
                    self.work(index)
                })
            };
            let threads: Vec<_> = (0..workers).map_while(|index| spawn(index).ok()).collect();
            if threads.is_empty() && workers > 0 {
                // The system refused every thread, so this thread does all the
                // work.
                return self.work(0);
            }
            let followed = self.follow(threads.len());
            let joined =
                threads.into_iter().map(|thread| thread.join().unwrap_or(Err(JobError::Panicked)));
            joined.fold(Ok(()), Result::and).and(followed)
        })?;
        self.settle()?;
        self.job.count(|counters| counters.remaining_pages = 0);
        Ok(())
    }

    /// Frees pages that were allocated as part of a huge page and hold no content. The workers
    /// have ended.
    fn settle(&self) -> Result<(), JobError> {
        for (at, placement) in self.placements.iter().enumerate() {
            self.job.check()?;
            let block = &self.job.memory.blocks()[at];
            let gone = [&block.discarded, self.given_back.freed(at)];
            let (memory, present) = (&self.job.memory, self.source.present(at));
            let settled = placement.settle(memory, &block.backing, present, &gone);
            settled.map_err(|source| MemoryError::Backing { id: block.geometry.id, source })?;
        }
        Ok(())
    }

    /// Updates the job's progress until all workers have ended.
    fn follow(&self, workers: usize) -> Result<(), JobError> {
        while self.ended.load(Ordering::Acquire) < workers {
            if self.failed() {
                // Without a limit no worker keeps waiting for its share of the
                // bandwidth.
                self.job.limiter.set_rate(0);
            }
            let left = self.pages.saturating_sub(self.done.load(Ordering::Relaxed));
            self.job.count(|counters| counters.remaining_pages = left);
            self.job
                .cancel
                .wait(&[(self.event.as_fd(), PollFlags::IN)], Instant::now() + POLL_INTERVAL)?;
            self.event.reset();
        }
        Ok(())
    }

    fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn work(&self, index: usize) -> Result<(), JobError> {
        let _ending = Ending(self);
        let outcome = self.fill(index);
        if outcome.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        outcome
    }

    fn fill(&self, index: usize) -> Result<(), JobError> {
        let mut buffer = PageBuffer::new(EXTENT_SIZE as usize);
        let mut window = Window::default();
        let mut stretch = 0..0;
        while let Some((at, extent)) = self.claim(&mut stretch) {
            self.job.check()?;
            let pages = self.source.present(at).count(extent);
            let bytes = pages * PAGE_SIZE;
            self.job.limiter.wait(bytes as usize, &self.job.cancel)?;
            let buffer = &mut buffer[..extent.bytes() as usize];
            self.source.read(at, extent, buffer)?;
            add(&self.job.live.image_bytes, bytes);
            self.place(index, at, extent, buffer, &mut window)?;
            self.done.fetch_add(pages, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The next extent of the worker's stretch, or the first extent of a new stretch.
    fn claim(&self, stretch: &mut Range<usize>) -> Option<(usize, PageRange)> {
        if self.failed() {
            return None;
        }
        let mut ahead = 1;
        if stretch.start >= stretch.end {
            let first = self.next.fetch_add(self.stretch, Ordering::Relaxed);
            *stretch = first..(first + self.stretch).min(self.extents.len());
            ahead = AHEAD;
        }
        let next = stretch.next()?;
        // At the start of a stretch: request the first AHEAD extents. After that: one more
        // extent each time.
        let until = (next + 1 + AHEAD).min(stretch.end);
        for (at, extent) in
            self.extents.get(until.saturating_sub(ahead).max(next + 1)..until).unwrap_or_default()
        {
            self.source.will_need(*at, *extent);
        }
        Some(self.extents[next])
    }

    fn place(
        &self, index: usize, at: usize, extent: PageRange, content: &[u8], window: &mut Window,
    ) -> Result<(), JobError> {
        let block: &Block = &self.job.memory.blocks()[at];
        let placement = &self.placements[at];
        let is_whole = self.source.present(at).count(extent) * PAGE_SIZE == HUGE_PAGE;
        let kind = if is_whole { Pages::Whole } else { Pages::New };
        for (word, present) in self.source.present(at).nonzero_words(extent) {
            let _placing = self.job.memory.readers.reading(index, at, word);
            let pages =
                present & !(block.discarded.word(word) | self.given_back.freed(at).word(word));
            for run in runs_of_word(word * WORD_BITS, pages) {
                let start = (run.first - extent.first) as usize * PAGE_SIZE as usize;
                let content = &content[start..start + run.bytes() as usize];
                let written = window.write((at, block), run, content, (placement, kind));
                written.map_err(|source| MemoryError::Backing { id: block.geometry.id, source })?;
            }
            add(&self.job.live.pages_restored, u64::from(pages.count_ones()));
        }
        Ok(())
    }
}

/// Writes pages. On hugetlbfs it writes through a mapping, and keeps the last host page mapped.
#[derive(Debug, Default)]
struct Window(Option<(usize, Option<HugeWindow>)>);

impl Window {
    fn write(
        &mut self, (at, block): (usize, &Block), run: PageRange, content: &[u8],
        (placement, pages): (&Placement, Pages),
    ) -> Result<(), BackingError> {
        if block.backing.kind() != BackingKind::Hugetlb {
            return placement.write(&block.backing, run.offset(), content, pages);
        }
        let (_, window) = match &mut self.0 {
            Some(mapped) if mapped.0 == at => mapped,
            other => other.insert((at, None)),
        };
        huge::write(&block.backing, window, run.offset(), Fill::Bytes(content))
    }
}
