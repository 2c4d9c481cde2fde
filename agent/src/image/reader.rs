// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading an image.
//!
//! [`Image::open`] reads the header, the contents, the states of the pages, and the checksums of
//! extents. [`Image::read_extent`] reads pages (`reader/pages.rs`). Each part is checked before it
//! is used: the header by its own checksum, the sections by the header, a page by its checksum, and
//! the checksums of pages by the checksum of their extent. A fault names the part of the file and
//! its offset.
//!
//! A sealed image is opened with its key ([`Image::open_with`]). Its header has a MAC, and pages
//! and sections have seals. Without a key it is refused, and with a key so is an image in plain
//! text: anybody may have put it there.
//!
//! The file is opened read-only and read through the page cache, so guests that are restored from
//! one image share the cached pages.

mod pages;

pub(in crate::image) use pages::PageChecks;

use super::bytes::write_at;
use super::error::{ImageError, ImageFault, kernel};
use super::file::ImageFile;
use super::seal::{ImageKey, Unsealer};
use super::sections::read_section;
use pageferry_protocol::image::contents::MAX_CONTENTS;
use pageferry_protocol::image::header::{HEADER_SIZE, MAC_COVERS};
use pageferry_protocol::image::sealing::opened_size;
use pageferry_protocol::image::states::states_size;
use pageferry_protocol::image::{
    Contents, Header, Layout, Section, SectionKind, StateWord, decode_states,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Bytes of the states of 64 pages.
const STATES_OF_WORD: u64 = 16;

/// What fails if there is no memory for the state of the VMM.
const KEEP_STATE: &str = "keep the state of the VMM in memory";

/// An open image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: ImageFile,
    header: Header,
    contents: Contents,
    layout: Layout,
    states: Vec<States>,
    /// Empty for a sealed image.
    extent_sums: Vec<u32>,
    /// Opens what is sealed; `None` for an image in plain text.
    unsealer: Option<Unsealer>,
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

    /// Adds the states of the 64 pages of word `word`.
    fn add(&self, word: u64, state: StateWord) {
        self.present.or_word(word, state.present);
        self.discarded.or_word(word, state.discarded);
        self.unchanged.or_word(word, state.unchanged);
    }
}

impl Image {
    /// Opens the image at `path`, and checks everything except the pages, their checksums and the
    /// state of the VMM.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, is not an image, or is sealed.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::open_with(path, None)
    }

    /// The same with the key of a sealed image.
    ///
    /// # Errors
    /// As [`Image::open`], or if the key does not fit. With a key, an image in plain text is
    /// refused; without one, a sealed image is.
    pub fn open_with(path: &Path, key: Option<&ImageKey>) -> Result<Self, ImageError> {
        let mut image = Self::open_contents(path, key)?;
        image.read_states()?;
        Ok(image)
    }

    /// Opens the image at `path` without the states of its pages. Until [`Image::read_states`] is
    /// called, [`Image::states`] is empty.
    ///
    /// # Errors
    /// If the file cannot be read, its header or contents are damaged, it is not an image, or the
    /// key does not fit.
    pub fn open_contents(path: &Path, key: Option<&ImageKey>) -> Result<Self, ImageError> {
        Self::read_contents(path, key).map_err(|fault| fault.of(path))
    }

    /// The header of the image at `path`, and the open file. Whatever a sealed image has in its
    /// header is not checked without its key: anybody may have written it.
    ///
    /// # Errors
    /// If the file cannot be read, its header is damaged, or it is not an image.
    pub fn peek(path: &Path) -> Result<(Header, ImageFile), ImageError> {
        let opened = open_file(path).map_err(|fault| fault.of(path))?;
        Ok((opened.header, opened.file))
    }

    fn read_contents(path: &Path, key: Option<&ImageKey>) -> Result<Self, ImageFault> {
        let OpenedFile { file, header, bytes } = open_file(path)?;
        let unsealer = unsealer(&header, &bytes, key)?;
        let section = header.section(SectionKind::Contents);
        let length = match unsealer {
            None => Some(section.length),
            Some(_) => opened_size(section.length),
        };
        let length = length
            .filter(|length| *length <= MAX_CONTENTS)
            .ok_or(ImageFault::ContentsSize { length: section.length, limit: MAX_CONTENTS })?;
        let mut bytes = Vec::with_capacity(length as usize);
        read_section(&file, unsealer.as_ref(), SectionKind::Contents, section, |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        let contents = Contents::decode(&bytes)?;
        if header.is_increment() == contents.base_name.is_empty() {
            return Err(ImageFault::BaseName { name: contents.base_name, id: header.base });
        }
        let layout = Layout::new(&contents.table, unsealer.is_some())?;
        check_places(&header, &contents, &layout)?;
        let (states, extent_sums) = (Vec::new(), Vec::new());
        let path = path.to_owned();
        Ok(Self { path, file, header, contents, layout, states, extent_sums, unsealer })
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
        let blocks = self.contents.table.blocks();
        let mut all = Vec::with_capacity(blocks.len());
        for block in blocks {
            let bitmap = || MappedBitmap::private(block.pages());
            all.push(States { present: bitmap()?, discarded: bitmap()?, unchanged: bitmap()? });
        }
        // The section has the states of one block after another, and its parts end anywhere.
        let (mut at, mut first, mut refused) = (0, 0, None);
        self.read_section(SectionKind::States, |mut part| {
            while !part.is_empty() {
                // The length of the section is that of the blocks, so there is one for each part.
                let Some((block, states)) = blocks.get(at).zip(all.get(at)) else { break };
                let left = states_size(block.pages() - first).min(part.len() as u64);
                let (bytes, rest) = part.split_at(left as usize);
                let pages = (left / STATES_OF_WORD * 64).min(block.pages() - first);
                let range = PageRange::new(first, pages);
                match decode_states(bytes, range, self.header.is_increment()) {
                    Ok(words) => words.for_each(|(word, state)| states.add(word, state)),
                    Err(source) => {
                        refused = refused.take().or(Some((block.id, source)));
                    }
                }
                (part, first) = (rest, first + pages);
                if first == block.pages() {
                    (at, first) = (at + 1, 0);
                }
            }
            Ok(())
        })?;
        // The checksum comes first: if it is wrong, the image is damaged, and an error about one
        // state would mislead. If it is right, a state that is not allowed is the mistake of the
        // program that wrote the image.
        if let Some((id, source)) = refused {
            return Err(ImageFault::States { id, source });
        }
        let mut sums = Vec::new();
        if self.unsealer.is_none() {
            sums.reserve_exact(self.layout.all_extents() as usize);
            self.read_section(SectionKind::ExtentSums, |part| {
                let each = part.as_chunks().0.iter();
                sums.extend(each.map(|bytes| u32::from_le_bytes(*bytes)));
                Ok(())
            })?;
        }
        (self.states, self.extent_sums) = (all, sums);
        Ok(())
    }

    /// Reads a section; see [`read_section`].
    fn read_section(
        &self, kind: SectionKind, each: impl FnMut(&[u8]) -> Result<(), ImageFault>,
    ) -> Result<(), ImageFault> {
        let section = self.header.section(kind);
        read_section(&self.file, self.unsealer.as_ref(), kind, section, each)
    }

    /// The path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// True if the image is sealed.
    pub fn is_sealed(&self) -> bool {
        self.unsealer.is_some()
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

    /// Asks the kernel to read the pages `range`, which lie in one extent, into the page cache.
    /// Does not wait.
    pub fn will_need(&self, at: usize, range: PageRange) {
        self.will_need_bytes(self.layout.page(at, range.first), range.bytes());
    }

    fn will_need_bytes(&self, offset: u64, length: u64) {
        self.file.will_need(offset, length);
    }

    /// For an image that is not sealed: the checksum, as written in the file, of extent `extent` of
    /// the block at index `at`. It is the checksum of the checksums of the extent's pages.
    pub fn extent_sum(&self, at: usize, extent: u64) -> u32 {
        self.extent_sums[self.layout.extent(at, extent) as usize]
    }

    /// The pieces of the VMM's state, one after another.
    ///
    /// # Errors
    /// If the section cannot be read, or is damaged.
    pub fn state(&self) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::with_capacity(self.contents.state_size() as usize);
        self.state_parts(|part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        Ok(bytes)
    }

    /// A file in memory with the pieces of the VMM's state, one after another.
    ///
    /// # Errors
    /// If the section cannot be read or is damaged, or there is no memory.
    pub fn state_file(&self) -> Result<OwnedFd, ImageError> {
        let create = rustix::fs::memfd_create("pageferry-state", MemfdFlags::CLOEXEC);
        let state =
            create.map_err(kernel(KEEP_STATE)).map_err(|fault: ImageFault| fault.of(&self.path))?;
        let mut end = 0;
        self.state_parts(|part| {
            // The fault is not about the image.
            write_at(state.as_fd(), part, end).map_err(|fault| match fault {
                ImageFault::KernelAt { source, .. } => kernel(KEEP_STATE)(source),
                other => other,
            })?;
            end += part.len() as u64;
            Ok(())
        })?;
        Ok(state)
    }

    /// Calls `each` with the pieces of the VMM's state, part by part. The checksum is compared only
    /// after the last part: until this has returned, the caller must not use the parts.
    ///
    /// # Errors
    /// If the section cannot be read, or is damaged; and the errors of `each`.
    pub fn state_parts(
        &self, each: impl FnMut(&[u8]) -> Result<(), ImageFault>,
    ) -> Result<(), ImageError> {
        self.read_section(SectionKind::VmmState, each).map_err(|fault| fault.of(&self.path))
    }
}

/// A file that begins with the header of an image.
struct OpenedFile {
    file: ImageFile,
    header: Header,
    /// The bytes of the header.
    bytes: [u8; HEADER_SIZE],
}

fn open_file(path: &Path) -> Result<OpenedFile, ImageFault> {
    let (file, found) = ImageFile::open(path)?;
    if found < HEADER_SIZE as u64 {
        return Err(ImageFault::ShorterThanHeader { found });
    }
    let mut bytes = [0; HEADER_SIZE];
    file.read_at(&mut bytes, 0)?;
    let header = Header::from_bytes(&bytes)?;
    if header.file_length != found {
        return Err(ImageFault::FileLength { found, expected: header.file_length });
    }
    Ok(OpenedFile { file, header, bytes })
}

/// What opens the image with this header, if it is sealed. The header is checked with the key.
fn unsealer(
    header: &Header, bytes: &[u8; HEADER_SIZE], key: Option<&ImageKey>,
) -> Result<Option<Unsealer>, ImageFault> {
    match (header.sealing, key) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(ImageFault::NotSealed),
        (Some(_), None) => Err(ImageFault::NeedsKey),
        (Some(sealing), Some(key)) => {
            let unsealer = Unsealer::new(key, &sealing.salt)?;
            if unsealer.has_signed(&bytes[..MAC_COVERS], &sealing.mac) {
                Ok(Some(unsealer))
            } else {
                Err(ImageFault::WrongKey)
            }
        }
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
        (state, layout.section_size(contents.state_size())),
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
