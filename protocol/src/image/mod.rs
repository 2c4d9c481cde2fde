// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Images: the memory of a guest and the state of its VMM in a file. `docs/image.md` in the
//! repository describes the file byte by byte.
//!
//! - [`header`]: the first 4 KiB, which locate all other parts and check them;
//! - [`layout`]: the offsets of pages and sections, which follow from the blocks alone;
//! - [`contents`]: the blocks, the base of an increment, and the names of the pieces of state;
//! - [`states`]: two bits for each page: content, zero, discarded, or as in the base;
//! - [`stored`]: the index of an image in an object store;
//! - [`sealing`]: what an image has that is encrypted and authenticated;
//! - [`working_set`]: the file beside an image that lists the pages that a restored guest accessed
//!   first.
//!
//! A page has a fixed offset in the file. So several writers need no index, a page can be written
//! again, and a block can be mapped. A page without content is a hole.
//!
//! Each page has a checksum, so that a page that is restored alone can be checked. The checksums of
//! an extent, which is 2 MiB of pages, have a checksum of their own. The header has the checksums
//! of all other parts and of itself.

pub mod contents;
pub mod header;
pub mod layout;
pub mod sealing;
pub mod states;
pub mod stored;
pub mod working_set;

pub use contents::Contents;
pub use header::{Header, HeaderError, Section, SectionKind};
pub use layout::Layout;
pub use sealing::{Place, Seal, Sealing};
pub use states::{StateWord, decode_states, encode_states};
pub use working_set::WorkingSet;

use crate::memory::PAGE_SIZE;

/// Length of an extent in bytes: the alignment of blocks, and the unit of checksums.
pub const EXTENT_SIZE: u64 = 2 << 20;
/// Pages in an extent.
pub const EXTENT_PAGES: u64 = EXTENT_SIZE / PAGE_SIZE;
/// Largest memory in one image: 16 TiB. Together with the other parts that is a little more than
/// ext4 with blocks of 4 KiB can hold.
pub const MAX_MEMORY: u64 = 16 << 40;

/// Identifies an image.
pub type ImageId = [u8; 16];

/// The id as people see it: 32 hexadecimal digits.
pub fn id_text(id: &ImageId) -> String {
    id.iter().fold(String::with_capacity(32), |text, byte| text + &format!("{byte:02x}"))
}

/// The CRC-32C (Castagnoli) of `bytes`, which is the checksum of all parts of an image.
pub fn checksum(bytes: &[u8]) -> u32 {
    // 32 bits wide, whatever type it comes in.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The checksum of an extent: the checksum of the checksums of its [`EXTENT_PAGES`] pages, in
/// order. It is zero for pages without content and for those after the end of the block.
pub fn extent_checksum(pages: &[u32]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(zerocopy::IntoBytes::as_bytes(pages));
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_that_the_document_names() {
        assert_eq!(checksum(b"123456789"), 0xe306_9283);
        assert_eq!(extent_checksum(&[0; EXTENT_PAGES as usize]), 0xa489_834f);
        let pages: Vec<u32> = (1..=EXTENT_PAGES as u32).collect();
        let bytes: Vec<u8> = pages.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        assert_eq!(extent_checksum(&pages), checksum(&bytes));
    }
}
