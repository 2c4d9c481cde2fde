// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Verifying all bytes of an image and of the images that it builds on.
//!
//! Opening an image checks its header, contents, states and the checksums of extents. [`verify()`]
//! checks the rest: the pages with their checksums or seals, the state of the VMM, and the bytes
//! that belong to no part of the file. Those must be holes or zero. Data there is a mistake of the
//! writer, and a program that maps the image would give it to a guest.
//!
//! The file system is asked where the file has data, so the time depends on the amount of data and
//! not on the size of the guest. The extents are shared among threads. Verifying ends after a given
//! number of errors.

use super::chain::images;
use super::error::{ImageError, ImageFault};
use super::reader::{Image, PageChecks};
use super::seal::ImageKey;
use super::workers::{Extents, Progress, items_per_claim, share_among_threads};
use crate::lock::lock;
use crate::memory::PageBuffer;
use crate::memory::zero::is_zero;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::{EXTENT_PAGES, EXTENT_SIZE, SectionKind, extent_checksum};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use pageferry_protocol::shm::bitmap::word_mask;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Most extents that a thread checks as one group. The file system is asked once for a group where
/// the file has data; the answer is a word with a bit for each extent.
const GROUP: usize = 64;

/// The outcome of [`verify()`].
#[derive(Debug)]
pub struct Report {
    /// The images that could be opened, the newest first.
    pub images: Vec<Image>,
    /// Number of pages that were compared with their checksums.
    pub pages: u64,
    /// The errors, in the order of the images and of their bytes. The chain is good if there are
    /// none.
    pub errors: Vec<ImageError>,
    /// True if verifying ended early because of the number of errors. There may be more.
    pub error_limit_reached: bool,
}

/// Verifies the image at `path` and all images that it builds on, on `threads` threads, until
/// `most` errors are found. Calls `show` with the pages that are done and with all pages.
pub fn verify(
    path: &Path, threads: usize, most: usize, show: &(dyn Fn(u64, u64) + Sync),
) -> Report {
    verify_with(path, None, threads, most, show)
}

/// As [`verify()`], with the key of sealed images.
pub fn verify_with(
    path: &Path, key: Option<&ImageKey>, threads: usize, most: usize,
    show: &(dyn Fn(u64, u64) + Sync),
) -> Report {
    let (images, opened) = images(path, key);
    let findings = Findings { found: Mutex::default(), most: most.max(1) };
    let total = images.iter().map(pages_with_content).sum();
    let progress = Progress::new(total, show);
    let check = || {
        if let Err(error) = opened {
            // This error is about the image after the last one that could be opened.
            findings.add(Place { image: images.len(), byte: 0 }, error)?;
        }
        for (number, image) in images.iter().enumerate() {
            let (findings, progress) = (&findings, &progress);
            Check { image, number, extents: Extents::of(image), findings, progress }
                .all(threads)?;
        }
        Ok(())
    };
    let outcome: Result<(), Enough> = check();
    let mut found = findings.found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(place, _)| *place);
    let errors = found.into_iter().map(|(_, error)| error).collect();
    Report { pages: progress.done(), images, errors, error_limit_reached: outcome.is_err() }
}

/// Number of pages whose content the image has.
fn pages_with_content(image: &Image) -> u64 {
    image.states().iter().map(|states| states.present.count(states.present.all())).sum()
}

/// The place of an error; errors are sorted by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// Number of the image in the chain.
    image: usize,
    /// Offset in the image.
    byte: u64,
}

/// Ends the work: the number of errors has reached its limit.
struct Enough;

/// The errors that were found so far.
struct Findings {
    found: Mutex<Vec<(Place, ImageError)>>,
    most: usize,
}

impl Findings {
    /// Adds an error, and returns [`Enough`] if it was the last one that is wanted.
    fn add(&self, place: Place, error: ImageError) -> Result<(), Enough> {
        let mut found = lock(&self.found);
        if found.len() < self.most {
            found.push((place, error));
        }
        if found.len() < self.most { Ok(()) } else { Err(Enough) }
    }
}

/// The check of one image.
struct Check<'a> {
    image: &'a Image,
    /// Number of the image in the chain.
    number: usize,
    extents: Extents,
    findings: &'a Findings,
    progress: &'a Progress<'a>,
}

impl Check<'_> {
    /// Checks the whole image.
    fn all(&self, threads: usize) -> Result<(), Enough> {
        self.between_sections()?;
        if let Err(error) = self.image.state_parts(|_| Ok(())) {
            let byte = self.image.header().section(SectionKind::VmmState).offset;
            self.findings.add(Place { image: self.number, byte }, error)?;
        }
        let size = items_per_claim(self.extents.count as usize, threads, GROUP) as u64;
        let groups = self.extents.count.div_ceil(size);
        share_among_threads(
            threads,
            groups,
            || PageBuffer::new(EXTENT_SIZE as usize),
            |buffer, group| {
                self.group(buffer, group * size..self.extents.count.min((group + 1) * size))
            },
        )
    }

    fn add(&self, byte: u64, fault: ImageFault) -> Result<(), Enough> {
        self.findings.add(Place { image: self.number, byte }, fault.of(self.image.path()))
    }

    /// Checks the bytes between the parts of the file, and after the last part.
    fn between_sections(&self) -> Result<(), Enough> {
        use SectionKind::{Contents, ExtentSums, PageSums, States, VmmState};
        let section = |kind| self.image.header().section(kind);
        let between = |one, other| {
            let (one, other) = (section(one), section(other));
            // Opening the image has checked that the sections have this order and lie within the
            // file.
            one.offset + one.length..other.offset
        };
        let last = section(VmmState);
        let places = [
            ("between the header and the pages", HEADER_SIZE as u64..EXTENT_SIZE),
            ("after the checksums of pages", between(PageSums, States)),
            ("after the states of pages", between(States, ExtentSums)),
            ("after the checksums of extents", between(ExtentSums, Contents)),
            ("after the contents", between(Contents, VmmState)),
            (
                "after the state of the VMM",
                last.offset + last.length..self.image.header().file_length,
            ),
        ];
        let mut buffer = PageBuffer::new(EXTENT_SIZE as usize);
        places.into_iter().try_for_each(|(place, bytes)| self.zeroes(&mut buffer, place, bytes))
    }

    /// Checks that `bytes` are zero. Reports only the first byte that is not.
    fn zeroes(
        &self, buffer: &mut [u8], place: &'static str, bytes: Range<u64>,
    ) -> Result<(), Enough> {
        for data in self.image.file().data_in(bytes) {
            for start in data.clone().step_by(buffer.len()) {
                let part = &mut buffer[..(EXTENT_SIZE.min(data.end - start)) as usize];
                if let Err(fault) = self.image.file().read_at(part, start) {
                    return self.add(start, fault);
                }
                if let Some(at) = part.iter().position(|byte| *byte != 0) {
                    let at = start + at as u64;
                    // One error for each place is enough.
                    return self.add(at, ImageFault::DataInPadding { place, at });
                }
            }
        }
        Ok(())
    }

    /// Checks consecutive extents, at most [`GROUP`]. Skips an extent if it has no present page, no
    /// data in the file, and the checksum of an extent without content. A sealed image has no
    /// checksums of extents.
    fn group(&self, buffer: &mut [u8], numbers: Range<u64>) -> Result<(), Enough> {
        let layout = self.image.layout();
        let sums_size = EXTENT_PAGES * layout.page_sum_size();
        let data = self.with_data(EXTENT_SIZE, EXTENT_SIZE, &numbers)
            | self.with_data(layout.page_sums(), sums_size, &numbers);
        let without_content = extent_checksum(&[0; EXTENT_PAGES as usize]);
        let is_expected = |at, extent| {
            self.image.is_sealed() || self.image.extent_sum(at, extent) == without_content
        };
        for number in numbers.clone() {
            let (at, extent) = self.extents.locate(number);
            let present = self.image.states()[at]
                .present
                .next_set(self.extents.pages((at, extent)))
                .is_some();
            let empty = data & (1 << (number - numbers.start)) == 0 && !present;
            if !empty || !is_expected(at, extent) {
                self.extent(buffer, at, extent)?;
            }
        }
        Ok(())
    }

    /// The extents of a group for which the file has data, as bits of a word. In this part of the
    /// file, which begins at byte `start`, each extent has `size` bytes.
    fn with_data(&self, start: u64, size: u64, numbers: &Range<u64>) -> u64 {
        let bytes = start + numbers.start * size..start + numbers.end * size;
        self.image.file().data_in(bytes.clone()).fold(0, |mask, data| {
            let (first, last) = (data.start - bytes.start, data.end - bytes.start);
            mask | word_mask(first / size, last.div_ceil(size))
        })
    }

    /// Checks one extent: the checksums of its pages, its pages, and its holes.
    fn extent(&self, buffer: &mut [u8], at: usize, extent: u64) -> Result<(), Enough> {
        let (layout, present) = (self.image.layout(), &self.image.states()[at].present);
        let id = self.image.contents().table.blocks()[at].id;
        let pages = PageRange::new(extent * EXTENT_PAGES, EXTENT_PAGES);
        let sums_at = layout.page_sum(at, pages.first);
        let checks = match self.image.read_checks(at, pages) {
            Ok(checks) => checks,
            Err(fault) => return self.add(sums_at, fault),
        };
        if let Err(fault) = self.image.check_extent((at, extent), &checks) {
            self.add(sums_at, fault)?;
        }
        for run in present.runs(pages) {
            self.content(buffer, at, run, &checks)?;
            self.progress.add(run.count);
        }
        for gap in gaps(present, pages) {
            if let Some(page) = checks.stray(gap) {
                let at = layout.page_sum(at, page);
                let place = "checksum or seal of a page without content";
                self.add(at, ImageFault::DataInPadding { place, at })?;
            }
        }
        self.holes(buffer, (at, id), pages)
    }

    /// Checks present pages.
    fn content(
        &self, buffer: &mut [u8], at: usize, run: PageRange, checks: &PageChecks,
    ) -> Result<(), Enough> {
        let bytes = &mut buffer[..run.bytes() as usize];
        let start = self.image.layout().page(at, run.first);
        if let Err(fault) = self.image.file().read_at(bytes, start) {
            return self.add(start, self.image.in_page(at, run, fault));
        }
        for (page, bytes) in (run.first..).zip(bytes.chunks_mut(PAGE_SIZE as usize)) {
            if let Err(fault) = self.image.check_page(at, page, bytes, checks) {
                self.add(self.image.layout().page(at, page), fault)?;
            }
        }
        Ok(())
    }

    /// Checks that the pages of an extent that are not present are holes or zero. This includes the
    /// pages after the end of the block.
    fn holes(
        &self, buffer: &mut [u8], (at, id): (usize, u32), pages: PageRange,
    ) -> Result<(), Enough> {
        let (layout, present) = (self.image.layout(), &self.image.states()[at].present);
        let start = layout.page(at, pages.first);
        let mut next = pages.first;
        for data in self.image.file().data_in(start..start + EXTENT_SIZE) {
            // The file system may report data and holes in units smaller than a page. `next` makes
            // sure that no page is checked twice.
            let first = next.max(pages.first + (data.start - start) / PAGE_SIZE);
            next = pages.first + (data.end - start).div_ceil(PAGE_SIZE);
            for gap in gaps(present, PageRange::new(first, next.saturating_sub(first))) {
                let (bytes, start) =
                    (&mut buffer[..gap.bytes() as usize], layout.page(at, gap.first));
                if let Err(fault) = self.image.file().read_at(bytes, start) {
                    self.add(start, self.image.in_page(at, gap, fault))?;
                    continue;
                }
                let stuffed = (gap.first..)
                    .zip(bytes.chunks(PAGE_SIZE as usize))
                    .filter(|(_, page)| !is_zero(page));
                for (page, _) in stuffed {
                    let at = layout.page(at, page);
                    self.add(at, ImageFault::DataInHole { id, page, at })?;
                }
            }
        }
        Ok(())
    }
}

/// The runs of pages of `range` that are not set, including pages after the end of the bitmap.
fn gaps(set: &MappedBitmap, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
    let mut next = range.first;
    let ends = set.runs(range).chain([PageRange::new(range.end(), 0)]);
    let gap = move |run: PageRange| {
        let gap = PageRange::new(next, run.first - next);
        next = run.end();
        gap
    };
    ends.map(gap).filter(|gap| !gap.is_empty())
}

#[cfg(test)]
mod tests;
