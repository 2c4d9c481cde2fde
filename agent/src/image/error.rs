// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is wrong with an image.

use super::blocks::BlocksDifference;
use crate::store::{StoreError, StoreErrorKind};
use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::image::contents::ContentsError;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::layout::TooLarge;
use pageferry_protocol::image::{HeaderError, SectionKind, id_text};
use pageferry_protocol::shm::MappingError;
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// An error of an image, with the path of the image.
#[derive(Debug, thiserror::Error)]
#[error("image {}", path.display())]
pub struct ImageError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub fault: ImageFault,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageFault {
    /// A system call failed.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The store of an object.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A system call failed at an offset of the file.
    #[error("cannot {what} at byte {at:#x}")]
    KernelAt {
        /// What was tried.
        what: &'static str,
        /// The offset, in bytes from the start of the file.
        at: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The file ends before the last byte that was to be read.
    #[error(
        "the file ends at byte {end:#x}, but a read from byte {at:#x} on needs more: \
         it is truncated"
    )]
    UnexpectedEof {
        /// Length of the file in bytes.
        end: u64,
        /// Where the read had no more bytes, in bytes from the start of the file.
        at: u64,
    },
    /// A page cannot be read.
    #[error("block {id}: page {page:#x}, at byte {at:#x}")]
    ReadPage {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Offset of the page, in bytes from the start of the file.
        at: u64,
        /// The cause.
        #[source]
        source: Box<ImageFault>,
    },
    /// The checksums of an extent's pages cannot be read.
    #[error("block {id}: checksums of pages {first:#x} + 0x200, at byte {at:#x}")]
    ReadPageSums {
        /// The block.
        id: u32,
        /// First page of the extent.
        first: u64,
        /// Offset of the checksums, in bytes from the start of the file.
        at: u64,
        /// The cause.
        #[source]
        source: Box<ImageFault>,
    },
    /// A section cannot be read.
    #[error("section {section}")]
    ReadSection {
        /// Name of the section.
        section: &'static str,
        /// The cause.
        #[source]
        source: Box<ImageFault>,
    },
    /// The file exists, and the caller does not allow to replace it.
    #[error("the file exists: choose another name, or replace it (--replace)")]
    Exists,
    /// The file exists and is of another kind, so it is not replaced.
    #[error("the file is not {kind}, and so it is not replaced")]
    OtherKind {
        /// The kind of file that may be replaced, with an article.
        kind: &'static str,
    },
    /// The new file would replace the guest's memory.
    #[error("the file is the memory of block {id}: choose another name")]
    IsGuestMemory {
        /// The block.
        id: u32,
    },
    /// All temporary names in the folder of the file are in use.
    #[error(
        "{} and {others} more temporary files exist: an earlier process with the process id of \
         this one left them behind, or they are being written: remove those that are left over",
        first.display()
    )]
    NoTemporaryName {
        /// The first of the temporary names.
        first: PathBuf,
        /// Number of the other temporary names.
        others: u32,
    },
    /// The path is not that of a regular file.
    #[error("it is not a regular file")]
    NotARegularFile,
    /// The path is relative, has no file name, or ends as the path of a folder does.
    #[error("path is not an absolute path of a file")]
    NotAFilePath,
    /// The file is shorter than a header.
    #[error(
        "the file has {found} bytes, but the header of an image has {HEADER_SIZE}: it is \
         truncated, or it is not an image"
    )]
    ShorterThanHeader {
        /// Length of the file in bytes.
        found: u64,
    },
    /// The file is shorter or longer than its header says.
    #[error(
        "the file has {found} bytes, but its header says {expected}: it is {}",
        if found < expected { "truncated" } else { "damaged" }
    )]
    FileLength {
        /// Length of the file in bytes.
        found: u64,
        /// Length in the header, in bytes.
        expected: u64,
    },
    /// The header is damaged, or of a version or with features that this program does not know.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A section is not where the blocks and the state of the VMM put it.
    #[error(
        "section {section} is {offset:#x} + {length:#x}, \
         but must be {expected_offset:#x} + {expected_length:#x}"
    )]
    MisplacedSection {
        /// Name of the section.
        section: &'static str,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// The offset that follows from the blocks, in bytes.
        expected_offset: u64,
        /// The length that follows from the blocks, in bytes.
        expected_length: u64,
    },
    /// A section is damaged.
    #[error(
        "section {section}, bytes {offset:#x} + {length:#x}: checksum is {found:#010x}, \
         but that of its bytes is {computed:#010x}: the image is damaged"
    )]
    SectionChecksum {
        /// Name of the section.
        section: &'static str,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// The checksum in the file.
        found: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// The section with the blocks, the name of the base, and the pieces of the state is malformed.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// The section with the contents is too long.
    #[error("section contents is {length} bytes, at most {limit} are allowed")]
    ContentsSize {
        /// Its length in bytes.
        length: u64,
        /// The largest length in bytes.
        limit: u64,
    },
    /// The blocks have more memory than one image can hold.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The states of a block are intact, but one of them is not allowed.
    #[error("block {id}")]
    States {
        /// The block.
        id: u32,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// The checksums of an extent's pages are damaged.
    #[error(
        "block {id}: checksums of pages {first:#x} + 0x200, at byte {at:#x}: \
         their checksum is {found:#010x}, but that of their bytes is {computed:#010x}: \
         the image is damaged"
    )]
    PageSumsChecksum {
        /// The block.
        id: u32,
        /// First page of the extent.
        first: u64,
        /// Offset of the checksums, in bytes from the start of the file.
        at: u64,
        /// The checksum in the file.
        found: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// A page is damaged.
    #[error(
        "block {id}: page {page:#x}, at byte {at:#x}: checksum is {found:#010x}, \
         but that of its bytes is {computed:#010x}: the image is damaged"
    )]
    PageChecksum {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Offset of the page, in bytes from the start of the file.
        at: u64,
        /// The checksum in the file.
        found: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// The image is sealed, and there is no key.
    #[error(
        "it is sealed, and can be used only with its key: the agent takes it with --image-key, \
         pageferry image with --key"
    )]
    NeedsKey,
    /// There is a key, and the image is not sealed.
    #[error(
        "it is not sealed, so anybody may have made it: with a key only images are used that are \
         sealed with it"
    )]
    NotSealed,
    /// The MAC of the header is that of another key.
    #[error(
        "the key does not fit this image: it was sealed with another one, or its header was \
         changed by somebody who does not have the key"
    )]
    WrongKey,
    /// A page is not what was sealed for this place.
    #[error(
        "block {id}: page {page:#x}, at byte {at:#x}: its seal is broken: \
         the image is damaged, or somebody has changed it"
    )]
    PageSeal {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Offset of the page, in bytes from the start of the file.
        at: u64,
    },
    /// A piece of a section is not what was sealed for this place.
    #[error(
        "section {section}, from byte {at:#x} on: its seal is broken: \
         the image is damaged, or somebody has changed it"
    )]
    PieceSeal {
        /// Name of the section.
        section: &'static str,
        /// Offset of the piece, in bytes from the start of the file.
        at: u64,
    },
    /// The library has refused to derive a key or to seal.
    #[error("the library for cryptography refuses, which is a defect of this program")]
    Cipher,
    /// The file has data at a page that has no content, or after the end of a block.
    #[error(
        "block {id}: page {page:#x}, at byte {at:#x}, must be a hole, \
         but this file has data there: the image is damaged"
    )]
    DataInHole {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Offset of the page, in bytes from the start of the file.
        at: u64,
    },
    /// The file has data where all bytes must be zero, outside of the pages.
    #[error(
        "byte {at:#x}, {place}, must be zero, but this file has data there: the image is damaged"
    )]
    DataInPadding {
        /// The part of the file.
        place: &'static str,
        /// Offset of the byte, from the start of the file.
        at: u64,
    },
    /// The base is missing, unreadable or damaged.
    #[error("its base cannot be used")]
    UnusableBase(#[source] Box<ImageError>),
    /// The agent is in a sandbox, and may not open the base.
    #[error(
        "its base {} is in a folder that nobody has named to the agent, which is in a sandbox: \
         name it by --folder", .0.display()
    )]
    BaseNotNamed(PathBuf),
    /// The file at the path of the base is another image than the increment builds on.
    #[error(
        "its base {} is image {}, but it builds on image {}: the file was replaced by another",
        path.display(), id_text(found), id_text(expected)
    )]
    BaseReplaced {
        /// The base.
        path: PathBuf,
        /// Its id.
        found: [u8; 16],
        /// The id in the increment.
        expected: [u8; 16],
    },
    /// The base has other blocks than the increment.
    #[error("its base {} has other blocks", path.display())]
    BaseBlocks {
        /// The base.
        path: PathBuf,
        /// How they differ.
        #[source]
        source: BlocksDifference,
    },
    /// The new increment would replace an image that it builds on.
    #[error("the file is {}, which the increment builds on: choose another name", path.display())]
    ReplacesBase {
        /// The path of that image.
        path: PathBuf,
    },
    /// The chain contains the same image twice.
    #[error(
        "its base is image {}, which builds on this one: a chain has no image twice",
        id_text(id)
    )]
    ChainLoop {
        /// The id of the base.
        id: [u8; 16],
    },
    /// The image has the name of a base and no id of a base, or the other way round.
    #[error(
        "base name is {name:?} and base id is {}: \
         a full image has neither, and an increment has both",
        id_text(id)
    )]
    BaseName {
        /// The name of the base, in the contents.
        name: String,
        /// The id of the base, in the header.
        id: [u8; 16],
    },
    /// The chain is too long.
    #[error("its chain of images is longer than {0}")]
    ChainTooLong(usize),
    /// The kernel has no memory for a bitmap.
    #[error("bitmap")]
    Bitmap(#[from] MappingError),
}

impl ImageFault {
    /// True if the image, or one that it builds on, could not be read. Then it is not known whether
    /// its content is damaged.
    pub fn is_unreadable(&self) -> bool {
        match self {
            Self::Kernel { .. }
            | Self::KernelAt { .. }
            | Self::NotARegularFile
            | Self::NeedsKey
            | Self::NotSealed
            | Self::WrongKey
            | Self::Cipher
            | Self::Bitmap(_) => true,
            Self::Store(error) => error.kind != StoreErrorKind::Damaged,
            Self::UnusableBase(base) => base.fault.is_unreadable(),
            Self::ReadPage { source, .. }
            | Self::ReadPageSums { source, .. }
            | Self::ReadSection { source, .. } => source.is_unreadable(),
            _ => false,
        }
    }

    /// True if the store of the image, or of one that it builds on, does not have it now, and may
    /// later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Store(error) => error.may_pass(),
            Self::UnusableBase(base) => base.fault.may_pass(),
            Self::ReadPage { source, .. }
            | Self::ReadPageSums { source, .. }
            | Self::ReadSection { source, .. } => source.may_pass(),
            _ => false,
        }
    }

    /// The offset at which a read failed; `None` for a fault that has none.
    pub(super) fn byte(&self) -> Option<u64> {
        match self {
            Self::UnexpectedEof { at, .. } | Self::KernelAt { at, .. } => Some(*at),
            _ => None,
        }
    }

    /// The fault with the name of the section that could not be read.
    pub(super) fn in_section(self, section: SectionKind) -> Self {
        Self::ReadSection { section: section.name(), source: Box::new(self) }
    }

    /// The fault with the path of its image.
    pub fn of(self, path: &Path) -> ImageError {
        ImageError { path: path.to_owned(), fault: self }
    }
}

/// Makes a fault from the errno of a system call. `what` says what was tried.
pub(super) fn kernel(what: &'static str) -> impl Fn(Errno) -> ImageFault {
    move |source| ImageFault::Kernel { what, source }
}
