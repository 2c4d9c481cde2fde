// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The format of a sealed image: where nonces, tags and salts are, and what they cover. This crate
//! has no cryptography; `docs/image.md` names the algorithms.
//!
//! Each page is sealed on its own, and so is each *piece* of a section: [`PIECE`] bytes, the last
//! piece may be shorter. What was sealed has the length that it had before. Its [`Seal`], a nonce
//! and a tag, is elsewhere: that of a page in the section of the pages' seals, that of a piece
//! right after the piece. A seal also covers the [`Place`], so nothing can be moved.

use super::SectionKind;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The feature bit of a sealed image.
pub const FEATURE_SEALED: u64 = 1;
/// Bytes of a salt.
pub const SALT_SIZE: usize = 32;
/// Bytes of the MAC of the header.
pub const MAC_SIZE: usize = 32;
/// Bytes of a tag.
pub const TAG_SIZE: usize = 16;
/// Bytes of a seal.
pub const SEAL_SIZE: u64 = size_of::<Seal>() as u64;
/// Bytes of a section that are sealed as one piece. A multiple of 16, which is the size of the
/// states of 64 pages.
pub const PIECE: u64 = 1 << 20;
/// The number that stands for pages in the bytes of a [`Place`]. Sections have the numbers of
/// [`SectionKind`].
const PAGE: u32 = 0x100;
/// The number that stands for a working set.
const WORKING_SET: u32 = 0x200;

/// A nonce and a tag: 24 bytes. All are zero for a page without content.
#[derive(
    FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug, Clone, Copy, PartialEq, Eq,
)]
#[repr(C)]
pub struct Seal {
    /// The nonce, little-endian: a number that no other seal of the image has. Never 0.
    pub nonce: [u8; 8],
    /// The tag.
    pub tag: [u8; TAG_SIZE],
}

const _: () = assert!(size_of::<Seal>() == 24);

impl Seal {
    /// What a page without content has.
    pub const NONE: Self = Self { nonce: [0; 8], tag: [0; TAG_SIZE] };
}

/// What a seal is for. It is part of what the tag covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A page.
    Page {
        /// The id of its block.
        block: u32,
        /// The page.
        page: u64,
    },
    /// A piece of a section.
    Piece {
        /// The section.
        section: SectionKind,
        /// The number of the piece, counted from 0.
        number: u64,
    },
    /// All of a working set.
    WorkingSet,
}

impl Place {
    /// The bytes that the tag covers with the content: what it is (4), the block (4), the page or
    /// the piece (8).
    pub fn to_bytes(self) -> [u8; 16] {
        let (kind, block, number) = match self {
            Self::Page { block, page } => (PAGE, block, page),
            Self::Piece { section, number } => (section as u32, 0, number),
            Self::WorkingSet => (WORKING_SET, 0, 0),
        };
        let fields = (U32::new(kind), U32::new(block), U64::new(number));
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(fields.0.as_bytes());
        bytes[4..8].copy_from_slice(fields.1.as_bytes());
        bytes[8..].copy_from_slice(fields.2.as_bytes());
        bytes
    }
}

/// What the header of a sealed image has besides that of any image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealing {
    /// Random. The keys of the image are derived from it and from the operator's key.
    pub salt: [u8; SALT_SIZE],
    /// The MAC of the bytes before it.
    pub mac: [u8; MAC_SIZE],
}

/// Length of a section of `length` bytes with the seals of its pieces, in bytes.
pub const fn sealed_size(length: u64) -> u64 {
    length + length.div_ceil(PIECE) * SEAL_SIZE
}

/// Bytes of a section before its last piece's seal was added, if its length is `sealed`; `None` if
/// no section has that length.
pub const fn opened_size(sealed: u64) -> Option<u64> {
    let pieces = sealed.div_ceil(PIECE + SEAL_SIZE);
    match sealed.checked_sub(pieces * SEAL_SIZE) {
        Some(length) if length.div_ceil(PIECE) == pieces => Some(length),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn the_length_of_a_sealed_section_says_what_is_in_it(length in 0..4 * PIECE) {
            prop_assert_eq!(opened_size(sealed_size(length)), Some(length));
        }
    }

    #[test]
    fn lengths_that_no_sealed_section_has_are_refused() {
        assert_eq!((sealed_size(0), sealed_size(1), sealed_size(PIECE)), (0, 25, PIECE + 24));
        assert_eq!(sealed_size(PIECE + 1), PIECE + 1 + 48);
        for none in [1, 23, 24, PIECE + 25, PIECE + 48] {
            assert_eq!(opened_size(none), None, "{none}");
        }
        assert_eq!(opened_size(PIECE + 49), Some(PIECE + 1));
        opened_size(u64::MAX);
    }

    #[test]
    fn no_two_places_have_the_same_bytes() {
        let pages =
            [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(block, page)| Place::Page { block, page });
        let pieces = SectionKind::ALL
            .into_iter()
            .flat_map(|section| [0, 1].map(|number| Place::Piece { section, number }));
        let places: Vec<_> = pages.into_iter().chain(pieces).chain([Place::WorkingSet]).collect();
        let bytes: BTreeSet<_> = places.iter().map(|place| place.to_bytes()).collect();
        assert_eq!(bytes.len(), places.len());
        let last = Place::Page { block: 0x0102_0304, page: 5 }.to_bytes();
        assert_eq!(last, [0, 1, 0, 0, 4, 3, 2, 1, 5, 0, 0, 0, 0, 0, 0, 0]);
    }
}
