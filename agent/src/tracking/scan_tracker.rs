// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write-protect scanning of the VMM's mappings as a tracker. [`crate::pagemap`] has the scan.

use super::dirty_pages::DirtyPages;
use super::error::TrackingError;
use super::tracker::Tracker;
use crate::hooks::Hooks;
use crate::memory::chunks::Chunks;
use crate::memory::{Block, GuestMemory};
use crate::pagemap::{Huge, Pagemap, PagemapError};
use pageferry_protocol::control::Trackers as Declared;
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::memory::{HUGE_PAGE, PAGE_SHIFT, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Pages of a chunk of a scan: 256 MiB. To scan it takes 0.1 ms if nothing was written, and about
/// 2 ms if all was, so it is worth a thread.
const CHUNK_PAGES: u64 = (256 << 20) / PAGE_SIZE;

/// Write-protect scanning. Each sync reports the pages of the VMM's mapping that were written, and
/// protects them again.
///
/// The VMM registers its mappings when this tracker starts. A mapping can be registered with only
/// one userfaultfd, so a background snapshot takes the mappings over while it runs. A scan sees no
/// write of that time, so all pages count as written.
///
/// # Huge pages
///
/// Where the VMM has mapped 2 MiB by one entry, the kernel protects all of the entry, and one write
/// reports all of its pages. So entries are split, and from then on each page is reported by
/// itself. The kernel splits only entries that are not protected. So the first scan splits all that
/// it finds, before it protects them. An entry that comes later, because the guest had touched
/// nothing there yet, is remembered when it is reported, and split when the guest has written to it
/// again.
///
/// If the range of a scan ends inside an entry, the kernel splits the entry and reports none of its
/// pages, although they were written (Linux 6.18: it removes the entry of shared memory, and then
/// finds that nothing is mapped). So no scan ends there: chunks are of whole entries, and an entry
/// in which a block begins or ends gets a page table before the first scan.
pub(super) struct ScanTracker {
    hooks: Arc<Hooks>,
    timeout: Duration,
    pagemap: Arc<Pagemap>,
    started: bool,
    /// A snapshot uses the mappings now.
    suspended: bool,
    /// A snapshot has used the mappings since the last complete sync.
    missed: bool,
    /// Pages of entries for 2 MiB: those that are known, and those that the last scan has split.
    /// `None` if the mappings were registered since the last scan.
    huge: Option<DirtyPages>,
}

impl ScanTracker {
    pub(super) fn new(hooks: Arc<Hooks>, timeout: Duration, pagemap: Arc<Pagemap>) -> Self {
        let (started, suspended, missed, huge) = (false, false, false, None);
        Self { hooks, timeout, pagemap, started, suspended, missed, huge }
    }

    /// Scans all mappings by up to `threads` threads.
    fn scan(
        &mut self, memory: &GuestMemory, threads: usize, found: impl Fn(usize, PageRange) + Sync,
    ) -> Result<(), TrackingError> {
        let failed = |block: &Block, source| TrackingError::Scan { id: block.geometry.id, source };
        let (is_first, all_huge) = match &mut self.huge {
            Some(huge) => (false, &*huge),
            none => (true, &*none.insert(DirtyPages::none(memory)?)),
        };
        for block in memory.blocks().iter().filter(|_| is_first) {
            let mapping = Mapping::of(block, &self.pagemap)?;
            mapping.protect_edges().map_err(|source| failed(block, source))?;
        }
        let chunks = Chunks::new(memory, CHUNK_PAGES).of_whole(undivided_pages);
        chunks.share(threads, |at, chunk| {
            let block = &memory.blocks()[at];
            let mapping = Mapping::of(block, &self.pagemap)?;
            // Once this agent has protected pages again, no other agent can find their writes.
            memory.current.check()?;
            let huge = all_huge.block(at);
            let known = if is_first { vec![chunk] } else { huge.runs(chunk).collect() };
            let scanned = mapping.scan(chunk, &known, huge, |pages| found(at, pages));
            scanned.map_err(|source| failed(block, source))
        })
    }
}

/// The pages that one scan must cover. The kernel cannot protect a part of a host page, and loses
/// writes if it is told to protect a part of an entry.
fn undivided_pages(block: &Block) -> u64 {
    match block.vmm_address % HUGE_PAGE {
        _ if !can_have_huge_entries(block) => block.backing.host_page_size() / PAGE_SIZE,
        0 => HUGE_PAGE / PAGE_SIZE,
        // Here entries do not begin where chunks do.
        _ => block.geometry.pages(),
    }
}

/// True if the VMM may have mapped pages of 4 KiB by entries for 2 MiB.
fn can_have_huge_entries(block: &Block) -> bool {
    // An entry maps a huge page of the file, which begins at a multiple of 2 MiB.
    let fits = block.vmm_address % HUGE_PAGE == block.backing.file_offset(0) % HUGE_PAGE;
    fits && block.backing.host_page_size() == PAGE_SIZE
}

/// Where a block is mapped in the VMM.
struct Mapping<'a> {
    pagemap: &'a Pagemap,
    addresses: Range<u64>,
    can_have_huge_entries: bool,
}

impl<'a> Mapping<'a> {
    fn of(block: &Block, pagemap: &'a Pagemap) -> Result<Self, TrackingError> {
        let start = block.vmm_address;
        if start == 0 {
            return Err(TrackingError::NotMapped { id: block.geometry.id });
        }
        let addresses = start..start.saturating_add(block.geometry.length);
        let can_have_huge_entries = can_have_huge_entries(block);
        Ok(Self { pagemap, addresses, can_have_huge_entries })
    }

    fn addresses_of(&self, pages: PageRange) -> Range<u64> {
        let start = self.addresses.start.saturating_add(pages.offset());
        start..start.saturating_add(pages.bytes())
    }

    fn pages_at(&self, addresses: Range<u64>) -> PageRange {
        let page = |address: u64| address.saturating_sub(self.addresses.start) >> PAGE_SHIFT;
        let first = page(addresses.start);
        PageRange::new(first, page(addresses.end).saturating_sub(first))
    }

    /// Makes single pages of the entries of which the block has only a part.
    fn protect_edges(&self) -> Result<(), PagemapError> {
        let Range { start, end } = self.addresses;
        let first = start..start.checked_next_multiple_of(HUGE_PAGE).unwrap_or(end).min(end);
        let last = (end / HUGE_PAGE * HUGE_PAGE).max(first.end)..end;
        [first, last]
            .into_iter()
            .filter(|edge| self.can_have_huge_entries && !edge.is_empty())
            .try_for_each(|edge| self.pagemap.protect_all(edge.start, edge.end - edge.start))
    }

    /// Reports and protects the pages of `chunk` that were written, and splits the entries for
    /// 2 MiB of `known` that were written. `huge` has those that are known afterwards.
    fn scan(
        &self, chunk: PageRange, known: &[PageRange], huge: &MappedBitmap,
        found: impl Fn(PageRange),
    ) -> Result<(), PagemapError> {
        for run in known.iter().filter(|_| self.can_have_huge_entries) {
            huge.clear(*run);
            self.entries(Huge::All, *run)?.into_iter().for_each(|entries| {
                huge.set(self.pages_at(entries));
            });
            for entries in self.entries(Huge::Written, *run)? {
                // The report has what is written until the split, too.
                let pages = self.pages_at(entries.clone());
                found(pages);
                huge.set(pages);
                for entry in entries.step_by(HUGE_PAGE as usize) {
                    self.pagemap.split(entry)?;
                }
            }
        }
        let mut reported = Vec::new();
        let Range { start, end } = self.addresses_of(chunk);
        self.pagemap.scan(start, end - start, |from, to| {
            let pages = self.pages_at(from..to);
            found(pages);
            if self.can_have_huge_entries && whole_entries(from..to).is_some() {
                reported.push(pages);
            }
        })?;
        for run in reported {
            self.entries(Huge::All, run)?.into_iter().for_each(|entries| {
                huge.set(self.pages_at(entries));
            });
        }
        Ok(())
    }

    /// The addresses of the whole entries for 2 MiB among `pages`.
    fn entries(&self, which: Huge, pages: PageRange) -> Result<Vec<Range<u64>>, PagemapError> {
        let mut found = Vec::new();
        if let Some(Range { start, end }) = whole_entries(self.addresses_of(pages)) {
            self.pagemap.huge(which, start, end - start, |from, to| found.push(from..to))?;
        }
        Ok(found)
    }
}

/// The whole entries for 2 MiB among these addresses.
fn whole_entries(addresses: Range<u64>) -> Option<Range<u64>> {
    let start = addresses.start.checked_next_multiple_of(HUGE_PAGE)?;
    let whole = start..addresses.end / HUGE_PAGE * HUGE_PAGE;
    (!whole.is_empty()).then_some(whole)
}

impl Tracker for ScanTracker {
    fn start(&mut self, memory: &GuestMemory) -> Result<(), TrackingError> {
        // Set before the answer is known: a start that timed out may still happen.
        self.started = true;
        self.hooks.ask(&Hook::StartTracking { sources: Declared::WRITE_PROTECT }, self.timeout)?;
        // Protects what is mapped. The reported pages are older than the start.
        self.huge = None;
        self.scan(memory, 1, |_, _| {})
    }

    fn sync(
        &mut self, memory: &GuestMemory, dirty: &DirtyPages, threads: usize,
    ) -> Result<(), TrackingError> {
        if self.missed {
            for (index, block) in memory.blocks().iter().enumerate() {
                dirty.block(index).set(block.all());
            }
        }
        if self.suspended {
            return Ok(());
        }
        self.scan(memory, threads, |index, range| {
            dirty.block(index).set(range);
        })?;
        self.missed = false;
        Ok(())
    }

    fn stop(&mut self) {
        let hook = Hook::StopTracking { sources: Declared::WRITE_PROTECT };
        if std::mem::take(&mut self.started)
            && let Err(error) = self.hooks.undo(&hook, self.timeout)
        {
            log::warn!("cannot unregister the VMM's mappings: {}", crate::error::chain(&error));
        }
    }

    fn suspend(&mut self) {
        self.suspended = true;
        self.missed = true;
        self.huge = None;
    }

    fn imprecise(&self, at: usize, word: u64, pages: u64) -> u64 {
        self.huge.as_ref().map_or(0, |huge| huge.block(at).word(word) & pages)
    }

    fn has_missed_writes(&self) -> bool {
        self.missed
    }

    fn resume(&mut self) {
        self.suspended = false;
    }
}
