//! Images in files: see `docs/image.md` and [`pageferry_protocol::image`] for what is in them.
//!
//! - [`bytes`]: reading and writing at a place;
//! - [`page_buffer`]: memory that a disk reads from and writes to;
//! - [`new_file`]: a file that is there whole, or not at all;
//! - [`writer`]: pages and all else into a new image;
//! - [`sums`]: checksums of pages on their way into it;
//! - [`reader`]: an image that is there, each part of it checked before anyone sees it;
//! - [`blocks`]: two sets of blocks that are to be the same;
//! - [`chain`]: an increment with the images that it builds on;
//! - [`verify`]: all of an image, and of those that it builds on, compared with what it should be;
//! - [`merge`]: a chain folded into one image;
//! - [`map_picture`]: what is where in the memory of a guest, to be looked at;
//! - [`workers`]: work on extents, shared out among threads;
//! - this file: what can be wrong.

pub mod blocks;
pub mod bytes;
pub mod chain;
pub mod map_picture;
pub mod merge;
pub mod new_file;
pub mod page_buffer;
pub mod reader;
pub mod sums;
pub mod verify;
pub mod workers;
pub mod writer;

pub use chain::Chain;
pub use page_buffer::PageBuffer;
pub use reader::Image;
pub use writer::ImageWriter;

use blocks::Difference;
use pageferry_protocol::control::codec::DecodeError;
use pageferry_protocol::image::contents::ContentsError;
use pageferry_protocol::image::header::HEADER_SIZE;
use pageferry_protocol::image::layout::TooLarge;
use pageferry_protocol::image::{HeaderError, SectionKind, id_text};
use pageferry_protocol::shm::MappingError;
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// What is wrong with an image, and with which.
#[derive(Debug, thiserror::Error)]
#[error("image {}", path.display())]
pub struct ImageError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub fault: Fault,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The kernel or the file system refused.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The same at a place in the file.
    #[error("cannot {what} at byte {at:#x}")]
    At {
        /// What was tried.
        what: &'static str,
        /// In bytes from the start of the file.
        at: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The file ends where more was expected.
    #[error(
        "the file ends at byte {end:#x}, and more was to be read from byte {at:#x} on: it is truncated"
    )]
    Ends {
        /// Length of the file in bytes.
        end: u64,
        /// In bytes from the start of the file.
        at: u64,
    },
    /// A page cannot be read.
    #[error("block {id}: page {page:#x}, at byte {at:#x}")]
    Page {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Where it lies, in bytes from the start of the file.
        at: u64,
        /// Why.
        #[source]
        source: Box<Fault>,
    },
    /// The checksums of an extent's pages cannot be read.
    #[error("block {id}: checksums of pages {first:#x} + 0x200, at byte {at:#x}")]
    PageSums {
        /// The block.
        id: u32,
        /// First page of the extent.
        first: u64,
        /// Where the checksums lie, in bytes from the start of the file.
        at: u64,
        /// Why.
        #[source]
        source: Box<Fault>,
    },
    /// A section cannot be read.
    #[error("section {section}")]
    ReadSection {
        /// Name of the section.
        section: &'static str,
        /// Why.
        #[source]
        source: Box<Fault>,
    },
    /// There is an image of that name.
    #[error("the file exists: choose another name, or have it replaced")]
    Exists,
    /// What is there is something else, and not replaced.
    #[error(
        "the file is not {kind}, and so it is not replaced: it begins with \"{}\", not with \"{}\"",
        found.escape_ascii(), expected.escape_ascii()
    )]
    OtherKind {
        /// What may be replaced, with an article.
        kind: &'static str,
        /// What that begins with.
        expected: &'static [u8],
        /// What the file begins with.
        found: Vec<u8>,
    },
    /// It would take the place of the guest's memory.
    #[error("the file is the memory of block {id}: choose another name")]
    Memory {
        /// The block.
        id: u32,
    },
    /// No temporary name is free beside it.
    #[error(
        "{} and {others} more like it are left over from what had this process's number before, or are being written: remove those that are left over",
        first.display()
    )]
    Temporary {
        /// The first of the names.
        first: PathBuf,
        /// How many there are besides.
        others: u32,
    },
    /// It is no file.
    #[error("it is not a regular file")]
    Kind,
    /// The file's name says no folder, or no name, or is that of a folder.
    #[error("path is not that of a file, from the root")]
    Path,
    /// There is no room for a header.
    #[error(
        "the file has {found} bytes, and an image begins with a header of {HEADER_SIZE}: it is \
         truncated, or no image"
    )]
    NoHeader {
        /// Bytes of the file.
        found: u64,
    },
    /// The file ends too early, or too late.
    #[error("the file has {found:#x} bytes, its header says {expected:#x}: it is {}", if found < expected { "truncated" } else { "damaged" })]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes that the header says.
        expected: u64,
    },
    /// The header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A section lies elsewhere than the blocks say.
    #[error(
        "section {section} is {offset:#x} + {length:#x}, expected is {expected_offset:#x} + {expected_length:#x}"
    )]
    Section {
        /// Name of the section.
        section: &'static str,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Where it should be.
        expected_offset: u64,
        /// How long it should be.
        expected_length: u64,
    },
    /// A section is damaged.
    #[error(
        "section {section}, bytes {offset:#x} + {length:#x}: checksum is {found:#010x}, that of its bytes is {computed:#010x}: the image is damaged"
    )]
    SectionSum {
        /// Name of the section.
        section: &'static str,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// As written.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// The blocks, the base's name, or the names of the state.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// The contents take more than any may.
    #[error("section contents is {length:#x} bytes, allowed are {limit:#x}")]
    ContentsSize {
        /// In bytes.
        length: u64,
        /// In bytes.
        limit: u64,
    },
    /// Too much memory for one image.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The states of a block.
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
        "block {id}: checksums of pages {first:#x} + 0x200, at byte {at:#x}: their sum is {found:#010x}, that of the bytes is {computed:#010x}: the image is damaged"
    )]
    ExtentSum {
        /// The block.
        id: u32,
        /// First page of the extent.
        first: u64,
        /// Where the checksums lie, in bytes from the start of the file.
        at: u64,
        /// As written.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// A page is damaged.
    #[error(
        "block {id}: page {page:#x}, at byte {at:#x}: checksum is {found:#010x}, that of its bytes is {computed:#010x}: the image is damaged"
    )]
    PageSum {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Where it lies, in bytes from the start of the file.
        at: u64,
        /// As written.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// There is content where there should be none.
    #[error(
        "block {id}: page {page:#x}, at byte {at:#x}, is a hole in an image, and this file has data there: the image is damaged"
    )]
    Stuffed {
        /// The block.
        id: u32,
        /// The page.
        page: u64,
        /// Where it lies, in bytes from the start of the file.
        at: u64,
    },
    /// There is something where nothing belongs, outside of the pages.
    #[error(
        "byte {at:#x}, {place}, is zero in an image, and this file has data there: the image is damaged"
    )]
    Stray {
        /// What is to be there.
        place: &'static str,
        /// In bytes from the start of the file.
        at: u64,
    },
    /// The base is gone, or damaged.
    #[error("its base cannot be used")]
    NoBase(#[source] Box<ImageError>),
    /// The base is another image than the increment builds on.
    #[error(
        "its base {} is image {}, but it builds on image {}: the file was replaced by another",
        path.display(), id_text(found), id_text(expected)
    )]
    Base {
        /// The base.
        path: PathBuf,
        /// Its id.
        found: [u8; 16],
        /// The id in the increment.
        expected: [u8; 16],
    },
    /// The base has other blocks.
    #[error("its base {} is of other blocks than it is itself", path.display())]
    BaseBlocks {
        /// The base.
        path: PathBuf,
        /// How they differ.
        #[source]
        source: Difference,
    },
    /// An increment would take the place of what it builds on.
    #[error("the file is {}, which the increment builds on: choose another name", path.display())]
    OverBase {
        /// The base, or one of its own.
        path: PathBuf,
    },
    /// The chain bites its tail.
    #[error("its base is image {}, which builds on this one: no image comes twice", id_text(id))]
    Circle {
        /// The id of the base.
        id: [u8; 16],
    },
    /// The base has a name and no id, or the other way round.
    #[error(
        "base name is {name:?} and base id is {}: an image that stands alone has neither, and an increment has both",
        id_text(id)
    )]
    BaseName {
        /// In the contents.
        name: String,
        /// In the header.
        id: [u8; 16],
    },
    /// The chain is too long.
    #[error("it and the images that it builds on, one on the other, are more than {0}")]
    Chain(usize),
    /// Memory for a bitmap.
    #[error("bitmap")]
    Bitmap(#[from] MappingError),
}

impl Fault {
    /// True if the image, or one that it builds on, could not be looked at: whether something is
    /// wrong with what is in it is not known.
    pub fn is_unreadable(&self) -> bool {
        match self {
            Self::Kernel { .. } | Self::At { .. } | Self::Kind | Self::Bitmap(_) => true,
            Self::NoBase(base) => base.fault.is_unreadable(),
            Self::Page { source, .. }
            | Self::PageSums { source, .. }
            | Self::ReadSection { source, .. } => source.is_unreadable(),
            _ => false,
        }
    }

    /// The byte of the file at which something could not be read; `None` if it is about something
    /// else.
    fn byte(&self) -> Option<u64> {
        match self {
            Self::Ends { at, .. } | Self::At { at, .. } => Some(*at),
            _ => None,
        }
    }

    /// It is about this section.
    fn in_section(self, section: SectionKind) -> Self {
        Self::ReadSection { section: section.name(), source: Box::new(self) }
    }

    /// Of the image at `path`.
    pub fn of(self, path: &Path) -> ImageError {
        ImageError { path: path.to_owned(), fault: self }
    }
}

/// What the kernel said to `what`.
fn kernel(what: &'static str) -> impl Fn(Errno) -> Fault {
    move |source| Fault::Kernel { what, source }
}

#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod tests;
