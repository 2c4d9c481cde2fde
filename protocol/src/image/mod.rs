//! Images: the memory of a guest, and the state of its VMM, in a file. `docs/image.md` describes
//! the file byte by byte.
//!
//! - [`header`]: the first 4 KiB, which say where all else lies, and check it;
//! - [`layout`]: where the pages and the sections lie, which follows from the blocks alone;
//! - [`contents`]: the blocks, the base of an increment, and the names of the pieces of state;
//! - [`states`]: two bits for each page: content, zero, discarded, or as in the base;
//! - [`working_set`]: the file beside an image that remembers what a restored guest touched first.
//!
//! A page has a fixed place in the file, so several writers need no index, a page can be written
//! again, and a block can be mapped. What is not there is a hole. Each page has a checksum of its
//! own, so that one that is restored alone can be checked; the checksums of an extent, 2 MiB of
//! pages, are checked by a sum of theirs, and all else by the header, and that by itself.

pub mod contents;
pub mod header;
pub mod layout;
pub mod states;
pub mod working_set;

pub use contents::Contents;
pub use header::{Header, HeaderError, Section, SectionKind};
pub use layout::Layout;
pub use states::{StateWord, decode_states, encode_states};
pub use working_set::WorkingSet;

use crate::memory::PAGE_SIZE;

/// Bytes of an extent: what pages are aligned to, and what one sum stands for.
pub const EXTENT_SIZE: u64 = 2 << 20;
/// Pages of an extent.
pub const EXTENT_PAGES: u64 = EXTENT_SIZE / PAGE_SIZE;
/// Most bytes of memory in one image: 16 TiB. With what else is in the image, that is a little more
/// than a file of ext4 with blocks of 4 KiB holds.
pub const MAX_MEMORY: u64 = 16 << 40;

/// What tells an image from all others.
pub type ImageId = [u8; 16];

/// The id as people see it: 32 hexadecimal digits.
pub fn id_text(id: &ImageId) -> String {
    id.iter().fold(String::with_capacity(32), |text, byte| text + &format!("{byte:02x}"))
}

/// The CRC-32C (Castagnoli) of `bytes`, as all checksums of an image are.
pub fn checksum(bytes: &[u8]) -> u32 {
    // 32 bits wide, whatever type it comes in.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The checksum of an extent: that of the checksums of all its [`EXTENT_PAGES`] pages, in order,
/// zero for pages without content and after the end of the block.
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
