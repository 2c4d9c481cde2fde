// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The source of a restore: an image with its base images, and which of its blocks goes into which
//! block of the VMM.
//!
//! A block is identified by its id. Its name, guest physical address and length must be the same as
//! in the image, because otherwise the guest would find itself in another machine. The discard
//! granularity and the host page size may differ: they belong to this VMM, and the guest does not
//! see them.

use super::error::RestoreError;
use crate::image::blocks;
use crate::image::file::ImageFile;
use crate::image::{Chain, Image, ImageError, ImageKey};
use crate::job::JobError;
use crate::memory::GuestMemory;
use crate::transport::Limiter;
use pageferry_protocol::memory::{BlockTable, PageRange};
use pageferry_protocol::shm::MappedBitmap;
use std::path::Path;
use std::sync::Arc;

/// Compares the blocks of a VMM with those of an image.
///
/// # Errors
/// The first difference.
pub fn compare(here: &BlockTable, image: &BlockTable) -> Result<(), RestoreError> {
    Ok(blocks::compare(here, image, false)?)
}

/// An image with its base images. Blocks are indexed in the order of the VMM's memory.
#[derive(Debug)]
pub struct Source {
    chain: Chain,
    /// For each block of the memory, its index in the image. The two orders may differ.
    order: Vec<usize>,
}

impl Source {
    /// Opens the image at `path`, and compares its blocks with those of `memory`. A sealed image
    /// needs its key. With a key, an image in plain text is refused: anybody may have made it.
    ///
    /// # Errors
    /// If the image cannot be opened or is damaged, if the key does not fit, or if the blocks
    /// differ.
    pub fn open(
        path: &Path, memory: &GuestMemory, key: Option<&ImageKey>,
    ) -> Result<Self, JobError> {
        // Compare the block table first: the page states of an image can take a gigabyte, and need
        // not be read if the blocks differ.
        compare(memory.table(), &Image::open_contents(path, key)?.contents().table)?;
        let chain = Chain::open_with(path, key)?;
        compare(memory.table(), chain.table())?;
        let of = |id: u32| chain.table().blocks().iter().position(|block| block.id == id);
        // Every id is found, because the tables were just compared.
        let order = memory.blocks().iter().filter_map(|block| of(block.geometry.id)).collect();
        Ok(Self { chain, order })
    }

    /// The image with its base images.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The image itself, without its base images.
    pub fn newest(&self) -> &Image {
        self.chain.newest()
    }

    /// The pages of a block that have content.
    pub fn present(&self, at: usize) -> &MappedBitmap {
        self.chain.present(self.order[at])
    }

    /// The pages of a block that are discarded.
    pub fn discarded(&self, at: usize) -> &MappedBitmap {
        self.chain.discarded(self.order[at])
    }

    /// Reads those of the pages `range` that have content, each to its place in `into`, and checks
    /// them. The range lies in one extent of the block.
    ///
    /// # Errors
    /// If a page cannot be read or is damaged. The error names the page and its place in the file.
    pub fn read(&self, at: usize, range: PageRange, into: &mut [u8]) -> Result<(), ImageError> {
        self.chain.read_extent(self.order[at], range, into)
    }

    /// Notes that whoever reads in long ranges waits for `limiter` before each, so that a store is
    /// asked for nothing that is not counted.
    pub fn limit(&self, limiter: &Arc<Limiter>) {
        for layer in self.chain.layers() {
            if let ImageFile::Stored(file) = layer.image.file() {
                file.limit(limiter);
            }
        }
    }

    /// Asks the kernel to read the content of the pages `range` from the disk, and does not wait.
    /// The range lies in one extent.
    pub fn will_need(&self, at: usize, range: PageRange) {
        self.chain.will_need(self.order[at], range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};

    fn table(blocks: &[(u32, &str, u64, u64)]) -> BlockTable {
        let mut table = BlockTable::new();
        for (id, name, gpa, pages) in blocks {
            let (gpa, length) = (gpa * PAGE_SIZE, pages * PAGE_SIZE);
            let block = BlockGeometry {
                id: *id,
                name: (*name).into(),
                gpa,
                length,
                granularity: PAGE_SIZE,
            };
            table.insert(block, 512).unwrap();
        }
        table
    }

    #[test]
    fn a_difference_names_the_block_and_the_field() {
        let image = table(&[(1, "low", 0, 16), (2, "high", 64, 32)]);
        let refused = |blocks: &[(u32, &str, u64, u64)]| {
            compare(&table(blocks), &image).unwrap_err().to_string()
        };
        let expected = [
            (
                "block 2: length is 64 KiB in this VMM, and 128 KiB in the image",
                &[(1, "low", 0, 16), (2, "high", 64, 16)][..],
            ),
            (
                "block 2: gpa is 0x80000 in this VMM, and 0x40000 in the image",
                &[(1, "low", 0, 16), (2, "high", 128, 32)],
            ),
            (
                "block 1: name is \"ram\" in this VMM, and \"low\" in the image",
                &[(1, "ram", 0, 16), (2, "high", 64, 32)],
            ),
        ];
        for (sentence, blocks) in expected {
            assert_eq!(refused(blocks), sentence);
        }
        assert!(
            refused(&[(1, "low", 0, 16), (3, "high", 64, 32)])
                .contains("block 2 \"high\" of the image does not exist")
        );
        let more = [(1, "low", 0, 16), (2, "high", 64, 32), (7, "hot", 128, 1)];
        assert!(refused(&more).contains("block 7 \"hot\" of this VMM is not in the image"));
    }

    #[test]
    fn the_granularity_may_differ() {
        let image = table(&[(1, "low", 0, 512)]);
        let mut here = BlockTable::new();
        let block = image.blocks()[0].clone();
        here.insert(BlockGeometry { granularity: 2 << 20, ..block }, 512).unwrap();
        compare(&here, &image).unwrap();
    }
}
