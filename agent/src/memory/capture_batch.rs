// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A buffer for the pages that are put into the sink at once.

use super::block::Block;
use super::captured_pages::CapturedPage;
use super::copy_before_write::{CaptureError, Run};
use super::error::MemoryError;
use super::page_buffer::PageBuffer;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappingError;

/// Pages that were read and not yet put into the sink.
#[derive(Debug)]
pub struct Batch {
    buffer: PageBuffer,
    /// Index of the block, the pages, and where they begin in the buffer.
    runs: Vec<(usize, PageRange, usize)>,
}

impl Batch {
    /// Room for `pages` pages.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(super) fn new(pages: u64) -> Result<Self, MappingError> {
        let buffer = PageBuffer::try_new((pages * PAGE_SIZE) as usize)?;
        Ok(Self { buffer, runs: Vec::new() })
    }

    /// Forgets the pages.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
    }

    /// Reads the pages `pages` of `block`, which has index `at`, to page `place` of the buffer.
    /// Returns their bytes.
    pub(super) fn read(
        &mut self, block: &Block, at: usize, pages: PageRange, place: u64,
    ) -> Result<&[u8], CaptureError> {
        let start = (place * PAGE_SIZE) as usize;
        let bytes = &mut self.buffer[start..start + pages.bytes() as usize];
        let failed = |source| MemoryError::Backing { id: block.geometry.id, source };
        block.backing.read(pages.offset(), bytes).map_err(failed)?;
        self.runs.push((at, pages, start));
        Ok(bytes)
    }

    /// Copies a captured page to page `place` of the buffer.
    pub(super) fn copy(&mut self, page: &CapturedPage, place: u64) {
        let (start, length) = ((place * PAGE_SIZE) as usize, page.pages.bytes() as usize);
        self.buffer[start..start + length].copy_from_slice(&page.bytes[..length]);
        self.runs.push((page.at, page.pages, start));
    }

    /// The pages in order, joined to runs, with their bytes.
    pub(super) fn runs(&mut self) -> Vec<Run<'_>> {
        self.runs.sort_unstable_by_key(|(at, pages, _)| (*at, pages.first));
        let mut joined: Vec<(usize, PageRange, usize)> = Vec::new();
        for &(at, pages, start) in &self.runs {
            match joined.last_mut() {
                Some((last_at, last, from))
                    if *last_at == at
                        && last.end() == pages.first
                        && *from + last.bytes() as usize == start =>
                {
                    last.count += pages.count
                }
                _ => joined.push((at, pages, start)),
            }
        }
        // Each run gets its part of the buffer, so they are cut from its start to its end.
        joined.sort_unstable_by_key(|(_, _, start)| *start);
        let (mut rest, mut cut) = (&mut self.buffer[..], 0);
        let mut runs = Vec::with_capacity(joined.len());
        for (at, pages, start) in joined {
            let (_, from) = rest.split_at_mut(start - cut);
            let (bytes, after) = from.split_at_mut(pages.bytes() as usize);
            (rest, cut) = (after, start + pages.bytes() as usize);
            runs.push(Run { at, pages, bytes });
        }
        runs.sort_unstable_by_key(|run| (run.at, run.pages.first));
        runs
    }
}
