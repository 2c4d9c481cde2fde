// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading an image.
//!
//! [`Image::open`] reads the header, the contents, the states of the pages, and the checksums of
//! extents. [`Image::read_extent`] reads pages. Each part is checked before it is used: the header
//! by its own checksum, the sections by the header, a page by its checksum, and the checksums of
//! pages by the checksum of their extent. A fault names the part of the file and its offset.
//!
//! The file is opened read-only and read through the page cache, so guests that are restored from
//! one image share the cached pages.

use super::bytes::read_at;
use super::error::{ImageError, ImageFault, kernel};
use pageferry_protocol::image::contents::MAX_CONTENTS;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::states::states_size;
use pageferry_protocol::image::{
    Contents, EXTENT_PAGES, Header, Layout, Section, SectionKind, StateWord, checksum,
    decode_states, extent_checksum,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use rustix::fs::{Advice, Mode, OFlags};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Most bytes of one read, except of pages. A multiple of 16, which is the size of the states of 64
/// pages.
const PART: usize = 1 << 20;

/// An open image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: OwnedFd,
    header: Header,
    contents: Contents,
    layout: Layout,
    states: Vec<States>,
    extent_sums: Vec<u32>,
}

/// The states of a block's pages in one image. A page in none of the sets is zero.
#[derive(Debug)]
pub struct States {
    /// The pages whose content the image has.
    pub present: MappedBitmap,
    /// The pages that are discarded.
    pub discarded: MappedBitmap,
    /// The pages that are as in the base. Empty for a full image.
    pub unchanged: MappedBitmap,
}

impl States {
    /// The states of the 64 pages of word `word`.
    pub fn word(&self, word: u64) -> StateWord {
        StateWord {
            present: self.present.word(word),
            discarded: self.discarded.word(word),
            unchanged: self.unchanged.word(word),
        }
    }
}

impl Image {
    /// Opens the image at `path`, and checks everything except the pages, their checksums and the
    /// state of the VMM.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or is not an image.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let mut image = Self::open_contents(path)?;
        image.read_states()?;
        Ok(image)
    }

    /// Opens the image at `path` without the states of its pages. Until [`Image::read_states`] is
    /// called, [`Image::states`] is empty.
    ///
    /// # Errors
    /// If the file cannot be read, its header or contents are damaged, or it is not an image.
    pub fn open_contents(path: &Path) -> Result<Self, ImageError> {
        Self::read_contents(path).map_err(|fault| fault.of(path))
    }

    fn read_contents(path: &Path) -> Result<Self, ImageFault> {
        let file = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        );
        let file = file.map_err(kernel("open it"))?;
        let stat = rustix::fs::fstat(&file).map_err(kernel("look at it"))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(ImageFault::NotARegularFile);
        }
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        if found < HEADER_SIZE as u64 {
            return Err(ImageFault::ShorterThanHeader { found });
        }
        let mut bytes = [0; HEADER_SIZE];
        read_at(file.as_fd(), &mut bytes, 0)?;
        let header = Header::from_bytes(&bytes)?;
        if header.file_length != found {
            return Err(ImageFault::FileLength { found, expected: header.file_length });
        }
        let section = header.section(SectionKind::Contents);
        if section.length > MAX_CONTENTS {
            return Err(ImageFault::ContentsSize { length: section.length, limit: MAX_CONTENTS });
        }
        let mut bytes = vec![0; section.length as usize];
        let read = read_at(file.as_fd(), &mut bytes, section.offset);
        read.map_err(|fault| fault.in_section(SectionKind::Contents))?;
        check_sum(SectionKind::Contents, section, checksum(&bytes))?;
        let contents = Contents::decode(&bytes)?;
        if header.is_increment() == contents.base_name.is_empty() {
            return Err(ImageFault::BaseName { name: contents.base_name, id: header.base });
        }
        let layout = Layout::new(&contents.table)?;
        check_places(&header, &contents, &layout)?;
        let path = path.to_owned();
        Ok(Self {
            path,
            file,
            header,
            contents,
            layout,
            states: Vec::new(),
            extent_sums: Vec::new(),
        })
    }

    /// Reads the states of the pages and the checksums of extents, unless they were read before.
    /// The states can be a gigabyte. So a caller with several images opens the contents of all
    /// first and compares those.
    ///
    /// # Errors
    /// If a section cannot be read, or is damaged.
    pub fn read_states(&mut self) -> Result<(), ImageError> {
        if self.states.is_empty() {
            self.try_read_states().map_err(|fault| fault.of(&self.path))?;
        }
        Ok(())
    }

    fn try_read_states(&mut self) -> Result<(), ImageFault> {
        let section = self.header.section(SectionKind::States);
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        let mut bytes = vec![0; PART.min(section.length as usize)];
        let mut all = Vec::with_capacity(self.contents.table.blocks().len());
        let mut refused = None;
        for (at, block) in self.contents.table.blocks().iter().enumerate() {
            let bitmap = || MappedBitmap::private(block.pages());
            let states = States { present: bitmap()?, discarded: bitmap()?, unchanged: bitmap()? };
            let (start, size) =
                (self.layout.states() + self.layout.states_of(at), states_size(block.pages()));
            for offset in (0..size).step_by(PART) {
                let bytes = &mut bytes[..PART.min((size - offset) as usize)];
                let read = read_at(self.file.as_fd(), bytes, start + offset);
                read.map_err(|fault| fault.in_section(SectionKind::States))?;
                digest.update(bytes);
                let first = offset / 16 * 64;
                let range = PageRange::new(
                    first,
                    (block.pages() - first).min(bytes.len() as u64 / 16 * 64),
                );
                let words = match decode_states(bytes, range, self.header.is_increment()) {
                    Ok(words) => words,
                    Err(source) => {
                        refused = refused.or(Some(ImageFault::States { id: block.id, source }));
                        continue;
                    }
                };
                for (word, state) in words {
                    states.present.or_word(word, state.present);
                    states.discarded.or_word(word, state.discarded);
                    states.unchanged.or_word(word, state.unchanged);
                }
            }
            all.push(states);
        }
        // The checksum comes first: if it is wrong, the image is damaged, and an error about one
        // state would mislead. If it is right, a state that is not allowed is the mistake of the
        // program that wrote the image.
        check_sum(SectionKind::States, section, digest.finalize() as u32)?;
        if let Some(fault) = refused {
            return Err(fault);
        }
        let section = self.header.section(SectionKind::ExtentSums);
        let mut sums = vec![0u32; self.layout.all_extents() as usize];
        let bytes = zerocopy::IntoBytes::as_mut_bytes(sums.as_mut_slice());
        let read = read_at(self.file.as_fd(), bytes, section.offset);
        read.map_err(|fault| fault.in_section(SectionKind::ExtentSums))?;
        check_sum(SectionKind::ExtentSums, section, checksum(bytes))?;
        (self.states, self.extent_sums) = (all, sums);
        Ok(())
    }

    /// The path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The blocks, the name of the base, and the pieces of the VMM's state.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// The offsets of all parts of the file.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The states of the pages of each block, in the order of the table.
    pub fn states(&self) -> &[States] {
        &self.states
    }

    /// Compares pages with their checksums.
    fn check_pages(
        &self, at: usize, first: u64, pages: &[u8], sums: &[u32],
    ) -> Result<(), ImageFault> {
        for ((page, bytes), found) in (first..).zip(pages.chunks(PAGE_SIZE as usize)).zip(sums) {
            let (computed, found) = (checksum(bytes), *found);
            if found != computed {
                let (id, at) = (self.contents.table.blocks()[at].id, self.layout.page(at, page));
                return Err(ImageFault::PageChecksum { id, page, at, found, computed });
            }
        }
        Ok(())
    }

    /// Adds the page to a fault from reading the pages `run` of the block at index `at`. The page
    /// follows from the offset in the fault.
    pub(super) fn in_page(&self, at: usize, run: PageRange, source: ImageFault) -> ImageFault {
        let start = self.layout.page(at, run.first);
        let page = run.first + source.byte().unwrap_or(start).saturating_sub(start) / PAGE_SIZE;
        let (id, at) = (self.contents.table.blocks()[at].id, self.layout.page(at, page));
        ImageFault::ReadPage { id, page, at, source: Box::new(source) }
    }

    /// Adds the extent to a fault from reading the checksums of its pages. The extent is number
    /// `extent` of the block at index `at`.
    pub(super) fn in_page_sums(&self, at: usize, extent: u64, source: ImageFault) -> ImageFault {
        let (id, first) = (self.contents.table.blocks()[at].id, extent * EXTENT_PAGES);
        ImageFault::ReadPageSums {
            id,
            first,
            at: self.layout.page_sum(at, first),
            source: Box::new(source),
        }
    }

    /// Reads the checksums of the pages of an extent, and checks them.
    fn sums_of(&self, at: usize, extent: u64) -> Result<[u32; EXTENT_PAGES as usize], ImageFault> {
        let mut sums = [0u32; EXTENT_PAGES as usize];
        let first = extent * EXTENT_PAGES;
        let place = self.layout.page_sum(at, first);
        let read = read_at(self.file.as_fd(), zerocopy::IntoBytes::as_mut_bytes(&mut sums), place);
        read.map_err(|fault| self.in_page_sums(at, extent, fault))?;
        let (found, computed) = (self.extent_sum(at, extent), extent_checksum(&sums));
        if found != computed {
            let id = self.contents.table.blocks()[at].id;
            return Err(ImageFault::PageSumsChecksum { id, first, at: place, found, computed });
        }
        Ok(sums)
    }

    /// Reads pages of one extent and checks them.
    ///
    /// All pages of `runs` must be present in this image and lie in extent `extent` of the block at
    /// index `at`. `into` begins with page `first`, and each page is read to its place in it. The
    /// checksums of the extent's pages are read and checked once for all runs.
    ///
    /// # Errors
    /// If a page or a checksum cannot be read or is damaged. The error says which.
    pub fn read_extent(
        &self, (at, extent): (usize, u64), runs: impl IntoIterator<Item = PageRange>, first: u64,
        into: &mut [u8],
    ) -> Result<(), ImageError> {
        let read = || {
            // The disk reads the checksums while this thread waits for the pages.
            self.will_need_bytes(self.layout.page_sum(at, extent * EXTENT_PAGES), EXTENT_PAGES * 4);
            let mut known = None;
            for run in runs {
                let start = (run.first - first) as usize * PAGE_SIZE as usize;
                let pages = &mut into[start..start + run.bytes() as usize];
                let read = read_at(self.file.as_fd(), pages, self.layout.page(at, run.first));
                read.map_err(|fault| self.in_page(at, run, fault))?;
                let sums = match &known {
                    Some(sums) => sums,
                    None => known.insert(self.sums_of(at, extent)?),
                };
                self.check_pages(
                    at,
                    run.first,
                    pages,
                    &sums[(run.first % EXTENT_PAGES) as usize..],
                )?;
            }
            Ok(())
        };
        read().map_err(|fault: ImageFault| fault.of(&self.path))
    }

    /// Asks the kernel to read the pages `range`, which lie in one extent, into the page cache.
    /// Does not wait.
    pub fn will_need(&self, at: usize, range: PageRange) {
        self.will_need_bytes(self.layout.page(at, range.first), range.bytes());
    }

    fn will_need_bytes(&self, offset: u64, length: u64) {
        // If this fails, the later read waits for the disk. No more is lost.
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed);
    }

    /// The checksum, as written in the file, of extent `extent` of the block at index `at`. It is
    /// the checksum of the checksums of the extent's pages.
    pub fn extent_sum(&self, at: usize, extent: u64) -> u32 {
        self.extent_sums[self.layout.extent(at, extent) as usize]
    }

    /// The pieces of the VMM's state, one after another.
    ///
    /// # Errors
    /// If the section cannot be read, or is damaged.
    pub fn state(&self) -> Result<Vec<u8>, ImageError> {
        // The length was compared with the contents, which allow a bounded state.
        let mut bytes =
            Vec::with_capacity(self.header.section(SectionKind::VmmState).length as usize);
        self.state_parts(|part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Calls `each` with the pieces of the VMM's state, part by part. The checksum is compared only
    /// after the last part: until this has returned, the caller must not use the parts.
    ///
    /// # Errors
    /// If the section cannot be read, or is damaged; and the errors of `each`.
    pub fn state_parts(
        &self, mut each: impl FnMut(&[u8]) -> Result<(), ImageFault>,
    ) -> Result<(), ImageError> {
        let section = self.header.section(SectionKind::VmmState);
        let mut read = || {
            let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
            let mut bytes = vec![0; PART.min(section.length as usize)];
            for offset in (0..section.length).step_by(PART) {
                let part = &mut bytes[..PART.min((section.length - offset) as usize)];
                let read = read_at(self.file.as_fd(), part, section.offset + offset);
                read.map_err(|fault| fault.in_section(SectionKind::VmmState))?;
                digest.update(part);
                each(part)?;
            }
            check_sum(SectionKind::VmmState, section, digest.finalize() as u32)
        };
        read().map_err(|fault: ImageFault| fault.of(&self.path))
    }
}

/// Checks that each section is where the blocks and the length of the state put it. Otherwise the
/// sections of a malformed file could overlap, and one would be read as another.
fn check_places(header: &Header, contents: &Contents, layout: &Layout) -> Result<(), ImageFault> {
    let found = header.section(SectionKind::Contents);
    let state = (found.offset + found.length).next_multiple_of(PAGE_SIZE);
    let expected = [
        (layout.contents(), found.length),
        (layout.states(), layout.states_size()),
        (layout.extent_sums(), layout.extent_sums_size()),
        (layout.page_sums(), layout.page_sums_size()),
        (state, contents.state_size()),
    ];
    for ((kind, section), (expected_offset, expected_length)) in
        SectionKind::ALL.into_iter().zip(header.sections).zip(expected)
    {
        let Section { offset, length, .. } = section;
        if (offset, length) != (expected_offset, expected_length) {
            let section = kind.name();
            return Err(ImageFault::MisplacedSection {
                section,
                offset,
                length,
                expected_offset,
                expected_length,
            });
        }
    }
    Ok(())
}

/// Compares the checksum of a section with the computed one.
fn check_sum(kind: SectionKind, section: Section, computed: u32) -> Result<(), ImageFault> {
    let Section { offset, length, checksum: found } = section;
    if found != computed {
        return Err(ImageFault::SectionChecksum {
            section: kind.name(),
            offset,
            length,
            found,
            computed,
        });
    }
    Ok(())
}
