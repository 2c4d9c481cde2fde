// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which images have the same base, and where its blocks lie.

use crate::image::Chain;
use pageferry_protocol::control::clones::BaseBlock;
use pageferry_protocol::memory::{HUGE_PAGE, PAGE_SIZE};
use pageferry_protocol::shm::bitmap_bytes;
use ring::digest::{Context, SHA256};
use rustix::io::Errno;
use std::fmt::Write;
use std::os::fd::{BorrowedFd, OwnedFd};

/// What a base begins with.
const MAGIC: [u8; 8] = *b"PFbase\0\x01";
/// Bytes of the header: the magic, the name, and the ids.
const HEADER: usize = 8 + 2 * 32;

/// Of which image a base is. A base begins with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseName {
    /// The digest of the ids and the files of the image and its bases.
    ///
    /// The ids alone would not do: somebody may make an image with the id of another one, and what
    /// he has put into the base must not come to the guests of that one. A file that was changed or
    /// replaced has another base.
    files: [u8; 32],
    /// The digest of the ids alone: by it an agent that continues a restore knows the base that the
    /// guest has, whatever became of the files meanwhile.
    ids: [u8; 32],
}

impl BaseName {
    /// That of the base of this image.
    pub fn of(chain: &Chain) -> Self {
        let (mut files, mut ids) = (Context::new(&SHA256), Context::new(&SHA256));
        for layer in chain.layers() {
            let id = &layer.image.header().id;
            files.update(id);
            ids.update(id);
            for number in layer.image.file().identity() {
                files.update(&number.to_le_bytes());
            }
        }
        let digest = |context: Context| {
            let mut digest = [0; 32];
            digest.copy_from_slice(context.finish().as_ref());
            digest
        };
        Self { files: digest(files), ids: digest(ids) }
    }

    /// The name of its file.
    pub fn file_name(&self) -> String {
        let mut name = String::new();
        for byte in self.files {
            // Writing to a string cannot fail.
            let _ = write!(name, "{byte:02x}");
        }
        name
    }

    /// Writes it into a base. All agents write the same.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn write_to(&self, base: &OwnedFd) -> Result<(), Errno> {
        let header = [&MAGIC[..], &self.files, &self.ids].concat();
        match rustix::io::pwrite(base, &header, 0)? {
            HEADER => Ok(()),
            _ => Err(Errno::IO),
        }
    }

    /// Reads it from what may be a base. `None` if it is none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn read_from(base: BorrowedFd<'_>) -> Result<Option<Self>, Errno> {
        let mut header = [0; HEADER];
        let count = rustix::io::pread(base, &mut header, 0)?;
        let mut name = Self { files: [0; 32], ids: [0; 32] };
        name.files.copy_from_slice(&header[8..40]);
        name.ids.copy_from_slice(&header[40..]);
        Ok((count == HEADER && header.starts_with(&MAGIC)).then_some(name))
    }

    /// True if the images of both have the same ids.
    pub fn has_ids_of(&self, other: &Self) -> bool {
        self.ids == other.ids
    }
}

/// Where a block of an image lies in its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The block.
    pub block: BaseBlock,
    /// The first byte of its bitmap of filled pages.
    pub filled: u64,
}

/// What lies where in a base: the header, the bitmaps, and the blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The blocks, in the order of the image.
    pub places: Vec<Place>,
    /// Bytes of the header and the bitmaps.
    pub reserved: u64,
    /// Bytes in all.
    pub length: u64,
}

impl Layout {
    /// That of the base of this image.
    pub fn of(chain: &Chain) -> Self {
        let blocks = chain.table().blocks();
        let bitmap = |pages: u64| bitmap_bytes(pages).next_multiple_of(PAGE_SIZE);
        let bitmaps: u64 = blocks.iter().map(|block| bitmap(block.pages())).sum();
        let reserved = PAGE_SIZE + bitmaps;
        // Entries of page tables for 2 MiB fit.
        let (mut filled, mut length) = (PAGE_SIZE, reserved.next_multiple_of(HUGE_PAGE));
        let mut places = Vec::new();
        for block in blocks {
            let block_here = BaseBlock { id: block.id, offset: length, length: block.length };
            places.push(Place { block: block_here, filled });
            filled += bitmap(block.pages());
            length += block.length.next_multiple_of(HUGE_PAGE);
        }
        Self { places, reserved, length }
    }
}
