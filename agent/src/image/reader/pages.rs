// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading the pages of an image. Each page is checked, and one of a sealed image is opened, before
//! [`Image::read_extent`] returns. What it has read into the buffer until then is no memory of a
//! guest, and nobody may use it if it fails.

use super::Image;
use crate::image::error::{ImageError, ImageFault};
use pageferry_protocol::image::{EXTENT_PAGES, Place, Seal, checksum, extent_checksum};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use zerocopy::IntoBytes;

/// What the pages of an extent are checked with.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "on the stack: a fault allocates nothing")]
pub(in crate::image) enum PageChecks {
    /// The checksums of all pages of the extent.
    Sums([u32; EXTENT_PAGES as usize]),
    /// The seals of some consecutive pages, each at its place in the extent.
    Seals([Seal; EXTENT_PAGES as usize]),
}

impl PageChecks {
    /// The first of the pages `range`, which must have no content, that has a checksum or a seal.
    pub(in crate::image) fn stray(&self, range: PageRange) -> Option<u64> {
        let is_set = |page: &u64| match self {
            Self::Sums(sums) => sums[in_extent(*page)] != 0,
            Self::Seals(seals) => seals[in_extent(*page)] != Seal::NONE,
        };
        (range.first..range.end()).find(is_set)
    }
}

/// The place of a page in its extent.
fn in_extent(page: u64) -> usize {
    (page % EXTENT_PAGES) as usize
}

impl Image {
    /// Reads what the pages `range`, which lie in one extent of the block at index `at`, are
    /// checked with.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(in crate::image) fn read_checks(
        &self, at: usize, range: PageRange,
    ) -> Result<PageChecks, ImageFault> {
        let extent = range.first / EXTENT_PAGES;
        let mut checks = match &self.unsealer {
            None => PageChecks::Sums([0; EXTENT_PAGES as usize]),
            Some(_) => PageChecks::Seals([Seal::NONE; EXTENT_PAGES as usize]),
        };
        let (bytes, first) = match &mut checks {
            // The checksum of the extent is that of all of them.
            PageChecks::Sums(sums) => (sums.as_mut_bytes(), extent * EXTENT_PAGES),
            PageChecks::Seals(seals) => {
                let first = in_extent(range.first);
                (seals[first..first + range.count as usize].as_mut_bytes(), range.first)
            }
        };
        let read = self.file.read_at(bytes, self.layout.page_sum(at, first));
        read.map_err(|fault| self.in_page_sums(at, extent, fault))?;
        Ok(checks)
    }

    /// Compares the checksums of an extent's pages with the checksum of the extent. A seal needs no
    /// such check: each page has been sealed once, so no other seal fits it.
    ///
    /// # Errors
    /// If they are damaged.
    pub(in crate::image) fn check_extent(
        &self, (at, extent): (usize, u64), checks: &PageChecks,
    ) -> Result<(), ImageFault> {
        let PageChecks::Sums(sums) = checks else { return Ok(()) };
        let (found, computed) = (self.extent_sum(at, extent), extent_checksum(sums));
        if found == computed {
            return Ok(());
        }
        let (id, first) = (self.contents.table.blocks()[at].id, extent * EXTENT_PAGES);
        let at = self.layout.page_sum(at, first);
        Err(ImageFault::PageSumsChecksum { id, first, at, found, computed })
    }

    /// Checks a page, and opens it if the image is sealed.
    ///
    /// # Errors
    /// If it is damaged. Its bytes are of no use then.
    pub(in crate::image) fn check_page(
        &self, at: usize, page: u64, bytes: &mut [u8], checks: &PageChecks,
    ) -> Result<(), ImageFault> {
        let (id, place) = (self.contents.table.blocks()[at].id, self.layout.page(at, page));
        match (checks, &self.unsealer) {
            (PageChecks::Sums(sums), None) => {
                let (found, computed) = (sums[in_extent(page)], checksum(bytes));
                if found != computed {
                    return Err(ImageFault::PageChecksum { id, page, at: place, found, computed });
                }
            }
            (PageChecks::Seals(seals), Some(unsealer)) => {
                let seal = seals[in_extent(page)];
                let opened = unsealer.open(Place::Page { block: id, page }, seal, bytes);
                opened.map_err(|_| ImageFault::PageSeal { id, page, at: place })?;
            }
            // The checks are those of this image, so this cannot happen. If it did, the page must
            // not be used.
            _ => return Err(ImageFault::PageSeal { id, page, at: place }),
        }
        Ok(())
    }

    /// Reads pages of one extent and checks them.
    ///
    /// All pages of `runs` must be present in this image and lie in extent `extent` of the block at
    /// index `at`. `into` begins with page `first`, and each page is read to its place in it. What
    /// the pages are checked with is read once for all runs.
    ///
    /// # Errors
    /// If a page or a checksum cannot be read or is damaged. The error says which.
    pub fn read_extent(
        &self, (at, extent): (usize, u64), runs: impl IntoIterator<Item = PageRange>, first: u64,
        into: &mut [u8],
    ) -> Result<(), ImageError> {
        let wanted = PageRange::new(first, into.len() as u64 / PAGE_SIZE);
        let read = || {
            // The disk reads what they are checked with while this thread waits for the pages.
            self.will_need_checks(at, wanted);
            let mut known = None;
            for run in runs {
                let start = (run.first - first) as usize * PAGE_SIZE as usize;
                let pages = &mut into[start..start + run.bytes() as usize];
                let read = self.file.read_at(pages, self.layout.page(at, run.first));
                read.map_err(|fault| self.in_page(at, run, fault))?;
                let checks = match &known {
                    Some(checks) => checks,
                    None => {
                        let checks = self.read_checks(at, wanted)?;
                        self.check_extent((at, extent), &checks)?;
                        known.insert(checks)
                    }
                };
                for (page, bytes) in (run.first..).zip(pages.chunks_mut(PAGE_SIZE as usize)) {
                    self.check_page(at, page, bytes, checks)?;
                }
            }
            Ok(())
        };
        read().map_err(|fault: ImageFault| fault.of(&self.path))
    }

    fn will_need_checks(&self, at: usize, wanted: PageRange) {
        let range = match &self.unsealer {
            None => PageRange::new(wanted.first / EXTENT_PAGES * EXTENT_PAGES, EXTENT_PAGES),
            Some(_) => wanted,
        };
        let length = range.count * self.layout.page_sum_size();
        self.will_need_bytes(self.layout.page_sum(at, range.first), length);
    }

    /// Adds the page to a fault from reading the pages `run` of the block at index `at`. The page
    /// follows from the offset in the fault.
    pub(in crate::image) fn in_page(
        &self, at: usize, run: PageRange, source: ImageFault,
    ) -> ImageFault {
        let start = self.layout.page(at, run.first);
        let page = run.first + source.byte().unwrap_or(start).saturating_sub(start) / PAGE_SIZE;
        let (id, at) = (self.contents.table.blocks()[at].id, self.layout.page(at, page));
        ImageFault::ReadPage { id, page, at, source: Box::new(source) }
    }

    /// Adds the extent to a fault from reading what its pages are checked with. The extent is
    /// number `extent` of the block at index `at`.
    fn in_page_sums(&self, at: usize, extent: u64, source: ImageFault) -> ImageFault {
        let (id, first) = (self.contents.table.blocks()[at].id, extent * EXTENT_PAGES);
        ImageFault::ReadPageSums {
            id,
            first,
            at: self.layout.page_sum(at, first),
            source: Box::new(source),
        }
    }
}
