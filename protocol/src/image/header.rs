// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first 4 KiB of an image.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic, `PFimage` and a zero byte |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | run state of the guest: 0 running, 1 paused by its operator |
//! | 16 | 8 | features that a reader must know; bit 0: the image is sealed |
//! | 24 | 16 | id |
//! | 40 | 16 | id of the base; zeroes for a full image |
//! | 56 | 8 | the point in time of the snapshot, in seconds since 1970 |
//! | 64 | 8 | length of the file in bytes |
//! | 72 | 24 | section: contents |
//! | 96 | 24 | section: states |
//! | 120 | 24 | section: checksums of extents |
//! | 144 | 24 | section: checksums of pages |
//! | 168 | 24 | section: state of the VMM |
//! | 192 | 32 | salt of a sealed image; otherwise zero |
//! | 224 | 3836 | zero |
//! | 4060 | 32 | MAC of bytes 0 to 4059 of a sealed image; otherwise zero |
//! | 4092 | 4 | CRC-32C of bytes 0 to 4091 |
//!
//! A section is its offset (8), its length in bytes (8), the CRC-32C of its bytes (4) and zero (4).
//! The section of the checksums of pages has none: each part of it is checked by the checksum of
//! its extent. In a sealed image no section has a checksum: the seals are there instead.

use super::sealing::{FEATURE_SEALED, MAC_SIZE, SALT_SIZE, Sealing};
use super::{ImageId, checksum};
use crate::control::job::RunState;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub const HEADER_SIZE: usize = 4096;
/// First bytes of an image.
pub const MAGIC: [u8; 8] = *b"PFimage\0";
/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;
/// The features that this crate knows.
pub const FEATURES: u64 = FEATURE_SEALED;
/// Bytes before the checksum.
const CHECKED: usize = HEADER_SIZE - 4;
/// Bytes before the MAC, which it covers.
pub const MAC_COVERS: usize = CHECKED - MAC_SIZE;

/// The sections, in the order of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectionKind {
    /// See [`super::contents`].
    Contents = 0,
    /// See [`super::states`].
    States = 1,
    /// One checksum for each extent of each block.
    ExtentSums = 2,
    /// One checksum for each page of each extent.
    PageSums = 3,
    /// The pieces of the VMM's state, one after another.
    VmmState = 4,
}

impl SectionKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Contents, Self::States, Self::ExtentSums, Self::PageSums, Self::VmmState];

    /// The name in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Contents => "contents",
            Self::States => "states of pages",
            Self::ExtentSums => "checksums of extents",
            Self::PageSums => "checksums of pages",
            Self::VmmState => "state of the VMM",
        }
    }
}

/// Position of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Section {
    /// In bytes from the start of the file.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    /// Of its bytes.
    pub checksum: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct WireSection {
    offset: U64,
    length: U64,
    checksum: U32,
    zero: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHeader {
    magic: [u8; 8],
    version: U32,
    guest: U32,
    features: U64,
    id: ImageId,
    base: ImageId,
    taken: U64,
    file_length: U64,
    sections: [WireSection; 5],
    salt: [u8; SALT_SIZE],
    padding: [u8; 3836],
    mac: [u8; MAC_SIZE],
    checksum: U32,
}

const _: () = assert!(size_of::<WireHeader>() == HEADER_SIZE);

/// Why the first bytes of a file are not the header of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is another kind of file.
    #[error("the file is not an image of pageferry")]
    Magic,
    /// The header is damaged.
    #[error(
        "header: checksum is {found:#010x}, that of its bytes is {computed:#010x}: the image is damaged"
    )]
    Checksum {
        /// As written.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// The image has another version.
    #[error("header: version is {found}, this program reads {VERSION}")]
    Version {
        /// As written.
        found: u32,
    },
    /// The run state is unknown.
    #[error("header: run state is {found}, allowed: 0 running, 1 paused")]
    Guest {
        /// As written.
        found: u32,
    },
    /// The image needs features that this program does not know.
    #[error("header: features are {found:#x}, this program knows {FEATURES:#x}")]
    Features {
        /// As written.
        found: u64,
    },
    /// A section lies outside the file.
    #[error(
        "header: section {section} is {offset:#x} + {length:#x}, in a file of {file_length:#x} bytes"
    )]
    Section {
        /// Name of the section.
        section: &'static str,
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Bytes of the file.
        file_length: u64,
    },
}

/// The header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// Identifies the image.
    pub id: ImageId,
    /// The image that an increment builds on; zeroes if there is none.
    pub base: ImageId,
    /// The point in time of the snapshot, in seconds since 1970.
    pub taken: u64,
    /// The run state of the guest, apart from the pause of the snapshot.
    pub guest: RunState,
    /// In bytes.
    pub file_length: u64,
    /// In the order of [`SectionKind::ALL`].
    pub sections: [Section; 5],
    /// What a sealed image has in addition; `None` for one in plain text.
    pub sealing: Option<Sealing>,
}

impl Header {
    /// True if it builds on another image.
    pub fn is_increment(&self) -> bool {
        self.base != ImageId::default()
    }

    /// The features that a reader must know.
    pub fn features(&self) -> u64 {
        if self.sealing.is_some() { FEATURE_SEALED } else { 0 }
    }

    /// Position of a section.
    pub fn section(&self, kind: SectionKind) -> Section {
        self.sections[kind as usize]
    }

    /// The bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let section = |section: Section| WireSection {
            offset: section.offset.into(),
            length: section.length.into(),
            checksum: section.checksum.into(),
            zero: 0.into(),
        };
        let sealing = self.sealing.unwrap_or(Sealing { salt: [0; SALT_SIZE], mac: [0; MAC_SIZE] });
        let mut wire = WireHeader {
            magic: MAGIC,
            version: VERSION.into(),
            guest: (self.guest as u32).into(),
            features: self.features().into(),
            id: self.id,
            base: self.base,
            taken: self.taken.into(),
            file_length: self.file_length.into(),
            sections: self.sections.map(section),
            salt: sealing.salt,
            padding: [0; 3836],
            mac: sealing.mac,
            checksum: 0.into(),
        };
        wire.checksum = checksum(&wire.as_bytes()[..CHECKED]).into();
        wire.as_bytes().to_vec()
    }

    /// The header in these bytes. Its sections lie in a file of the length that it gives.
    ///
    /// # Errors
    /// What is wrong, with the values.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Result<Self, HeaderError> {
        let wire: &WireHeader = zerocopy::transmute_ref!(bytes);
        if wire.magic != MAGIC {
            return Err(HeaderError::Magic);
        }
        let (found, computed) = (wire.checksum.get(), checksum(&bytes[..CHECKED]));
        if found != computed {
            return Err(HeaderError::Checksum { found, computed });
        }
        if wire.version.get() != VERSION {
            return Err(HeaderError::Version { found: wire.version.get() });
        }
        if wire.features.get() & !FEATURES != 0 {
            return Err(HeaderError::Features { found: wire.features.get() });
        }
        let found = wire.guest.get();
        let guest = RunState::from_wire(found).ok_or(HeaderError::Guest { found })?;
        let section = |section: WireSection| Section {
            offset: section.offset.get(),
            length: section.length.get(),
            checksum: section.checksum.get(),
        };
        let (sections, file_length) = (wire.sections.map(section), wire.file_length.get());
        for (kind, Section { offset, length, .. }) in SectionKind::ALL.into_iter().zip(sections) {
            if offset < HEADER_SIZE as u64
                || offset.checked_add(length).is_none_or(|end| end > file_length)
            {
                return Err(HeaderError::Section {
                    section: kind.name(),
                    offset,
                    length,
                    file_length,
                });
            }
        }
        let is_sealed = wire.features.get() & FEATURE_SEALED != 0;
        Ok(Self {
            id: wire.id,
            base: wire.base,
            taken: wire.taken.get(),
            guest,
            file_length,
            sections,
            sealing: is_sealed.then_some(Sealing { salt: wire.salt, mac: wire.mac }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        let section = Section { offset: 4096, length: 10, checksum: 7 };
        let guest = RunState::Paused;
        Header {
            id: [1; 16],
            base: [2; 16],
            taken: 5,
            guest,
            file_length: 9000,
            sections: [section; 5],
            sealing: None,
        }
    }

    fn sealed() -> Header {
        let sealing = Sealing { salt: [3; SALT_SIZE], mac: [4; MAC_SIZE] };
        Header { sealing: Some(sealing), ..header() }
    }

    proptest! {
        #[test]
        fn any_byte_that_is_changed_is_found(
            at in 0usize..HEADER_SIZE, change in 1u8.., is_sealed in any::<bool>(),
        ) {
            let header = if is_sealed { sealed() } else { header() };
            let mut bytes: [u8; HEADER_SIZE] = header.to_bytes().try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).unwrap(), header);
            bytes[at] ^= change;
            prop_assert!(Header::from_bytes(&bytes).is_err());
        }
    }

    #[test]
    fn the_mac_is_the_last_but_the_checksum() {
        let bytes = sealed().to_bytes();
        assert_eq!((bytes[16], &bytes[192..224]), (1, &[3; 32][..]));
        assert_eq!((MAC_COVERS, &bytes[MAC_COVERS..CHECKED]), (4060, &[4; 32][..]));
    }

    #[test]
    fn a_feature_that_nobody_knows_is_refused() {
        let mut bytes: [u8; HEADER_SIZE] = sealed().to_bytes().try_into().unwrap();
        bytes[16] = 3;
        let sum = checksum(&bytes[..CHECKED]);
        bytes[CHECKED..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::from_bytes(&bytes), Err(HeaderError::Features { found: 3 }));
    }

    #[test]
    fn a_run_state_that_no_guest_has_is_refused() {
        let mut bytes: [u8; HEADER_SIZE] = header().to_bytes().try_into().unwrap();
        bytes[12] = 2;
        let sum = checksum(&bytes[..CHECKED]);
        bytes[CHECKED..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::from_bytes(&bytes), Err(HeaderError::Guest { found: 2 }));
    }

    #[test]
    fn a_section_outside_of_the_file_is_refused_with_its_numbers() {
        for (offset, length) in [(0, 10), (8999, 2), (u64::MAX, 1), (9001, 0)] {
            let mut header = header();
            header.sections[4] = Section { offset, length, checksum: 0 };
            let bytes: [u8; HEADER_SIZE] = header.to_bytes().try_into().unwrap();
            let error = Header::from_bytes(&bytes).unwrap_err();
            let expected = HeaderError::Section {
                section: "state of the VMM",
                offset,
                length,
                file_length: 9000,
            };
            assert_eq!(error, expected);
        }
    }
}
