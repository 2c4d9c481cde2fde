// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Putting pages into a new image.
//!
//! Zero pages are left out. What remains is sealed in the caller's buffer, or its checksums are
//! computed. Then large runs are written at once with direct I/O, and small ones afterwards through
//! the page cache.

use super::ImageWriter;
use crate::image::bytes::write_at;
use crate::image::error::{ImageError, ImageFault};
use crate::memory::zero::data_mask;
use pageferry_protocol::image::{EXTENT_PAGES, Seal, checksum};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::sync::PoisonError;
use zerocopy::IntoBytes;

/// Shortest run in bytes that is written with direct I/O.
const DIRECT: usize = 64 << 10;

/// The index of a block, pages of it, and their bytes. The writer may seal them in place.
pub type RunOfPages<'a> = (usize, PageRange, &'a mut [u8]);
/// The same when they are sealed, or need no seal.
type RunOfBytes<'a> = (usize, PageRange, &'a [u8]);

impl ImageWriter {
    /// Puts the pages `range` of the block at index `at` of the table. None of them was put before.
    /// Their bytes are something else afterwards if the image is sealed. Returns how many of the
    /// pages are not zero.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn put(&self, at: usize, range: PageRange, bytes: &mut [u8]) -> Result<u64, ImageError> {
        self.put_runs([(at, range, bytes)])
    }

    /// As [`ImageWriter::put`], for several runs.
    ///
    /// # Errors
    /// As [`ImageWriter::put`].
    pub fn put_runs<'a>(
        &self, runs: impl IntoIterator<Item = RunOfPages<'a>>,
    ) -> Result<u64, ImageError> {
        let mut put = 0;
        let mut small = Vec::new();
        for (at, range, bytes) in runs {
            let mut rest = Rest { first: range.first, bytes };
            let mut data = PageRange::new(range.first, 0);
            for first in (range.first..range.end()).step_by(WORD_BITS as usize) {
                let pages = PageRange::new(first, WORD_BITS).intersection(&range);
                for run in runs_of_word(first, data_mask(rest.pages(pages))) {
                    put += run.count;
                    if run.first == data.end() {
                        data.count += run.count;
                    } else {
                        small.extend(self.put_large((at, data, rest.take(data)))?);
                        data = run;
                    }
                }
            }
            small.extend(self.put_large((at, data, rest.take(data)))?);
        }
        self.put_small(&small)?;
        Ok(put)
    }

    /// Writes a run of pages that are not zero with direct I/O. Returns it if that is not possible,
    /// or if it is too small for that.
    fn put_large<'a>(&self, run: RunOfPages<'a>) -> Result<Option<RunOfBytes<'a>>, ImageError> {
        let (at, pages, bytes) = run;
        if pages.is_empty() {
            return Ok(None);
        }
        // From here on the bytes are those of the file.
        self.add_sums((at, pages, &mut *bytes))?;
        let run: RunOfBytes<'a> = (at, pages, bytes);
        let bytes = run.2;
        let Some(direct) = self.direct.as_ref().filter(|_| bytes.len() >= DIRECT) else {
            return Ok(Some(run));
        };
        let among_others = self.direct_writes.read().unwrap_or_else(PoisonError::into_inner);
        let written = write_at(direct.as_fd(), bytes, self.layout.page(at, pages.first));
        drop(among_others);
        match written {
            // EINVAL: the buffer does not have the alignment that the device requires. A write
            // through the page cache accepts any alignment.
            Err(ImageFault::KernelAt { source: Errno::INVAL, .. }) => return Ok(Some(run)),
            written => written.map_err(|fault| fault.of(self.path()))?,
        }
        self.set_present(at, pages);
        Ok(None)
    }

    /// Writes runs through the page cache. Their checksums are collected already.
    fn put_small(&self, runs: &[RunOfBytes<'_>]) -> Result<(), ImageError> {
        if runs.is_empty() {
            return Ok(());
        }
        let _alone = self.without_direct_writes();
        for &(at, pages, bytes) in runs {
            write_at(self.file.as_fd(), bytes, self.layout.page(at, pages.first))
                .map_err(|fault| fault.of(self.path()))?;
            self.set_present(at, pages);
        }
        Ok(())
    }

    fn set_present(&self, at: usize, pages: PageRange) {
        let fresh = self.present[at].set(pages);
        debug_assert_eq!(fresh, pages.count, "a page is put once");
    }

    /// Seals pages, or computes their checksums. Writes what was collected of that if it is much.
    fn add_sums(&self, (at, run, bytes): RunOfPages<'_>) -> Result<(), ImageError> {
        let mut room = [Seal::NONE; EXTENT_PAGES as usize];
        let parts = (run.first..run.end())
            .step_by(room.len())
            .zip(bytes.chunks_mut(room.len() * PAGE_SIZE as usize));
        for (first, pages) in parts {
            let sums = self.sums_of(at, first, pages, &mut room);
            let sums = sums.map_err(|fault| fault.of(self.path()))?;
            if let Some(full) = self.sums.add(self.layout.page_sum(at, first), sums) {
                let _alone = self.without_direct_writes();
                full.write(self.file.as_fd()).map_err(|fault| fault.of(self.path()))?;
            }
        }
        Ok(())
    }

    /// The bytes of the seals or checksums of pages, in `room`. Seals the pages.
    fn sums_of<'r>(
        &self, at: usize, first: u64, pages: &mut [u8], room: &'r mut [Seal; EXTENT_PAGES as usize],
    ) -> Result<&'r [u8], ImageFault> {
        let count = pages.len() / PAGE_SIZE as usize;
        if let Some(sealer) = &self.sealer {
            let seals = &mut room[..count];
            sealer.seal_pages(self.table.blocks()[at].id, first, pages, seals)?;
            return Ok(seals.as_bytes());
        }
        let (sums, _) = room.as_mut_bytes().as_chunks_mut();
        let each = sums.iter_mut().zip(pages.chunks(PAGE_SIZE as usize));
        each.for_each(|(sum, page)| *sum = checksum(page).to_le_bytes());
        Ok(sums[..count].as_flattened())
    }
}

/// Pages that are not put yet.
struct Rest<'a> {
    /// The first of them.
    first: u64,
    bytes: &'a mut [u8],
}

impl<'a> Rest<'a> {
    /// The bytes of `pages`, which are among the rest.
    fn pages(&self, pages: PageRange) -> &[u8] {
        let start = (pages.first - self.first) as usize * PAGE_SIZE as usize;
        &self.bytes[start..start + pages.bytes() as usize]
    }

    /// Takes the bytes of `pages`. Pages before them are left out.
    fn take(&mut self, pages: PageRange) -> &'a mut [u8] {
        let skipped = (pages.first - self.first) as usize * PAGE_SIZE as usize;
        let (_, rest) = std::mem::take(&mut self.bytes).split_at_mut(skipped);
        let (bytes, rest) = rest.split_at_mut(pages.bytes() as usize);
        (self.first, self.bytes) = (pages.end(), rest);
        bytes
    }
}
