// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The header of a record.
//!
//! ```text
//! offset  size  field
//!      0     2  kind
//!      2     2  flags
//!      4     4  block          id of the block; 0 where there is none
//!      8     8  first page     page index within the block
//!     16     8  page count
//!     24     4  payload length in bytes
//!     28     4  crc32c of bytes 0..28 of the header, then of the payload
//! ```
//!
//! All numbers are little-endian.

use crate::memory::{PAGE_SIZE, PageRange};
use crc_fast::{CrcAlgorithm, Digest};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of the header in bytes.
pub const RECORD_SIZE: usize = 32;
/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Most pages in one [`Kind::Data`] record.
pub const MAX_DATA_PAGES: u64 = MAX_PAYLOAD as u64 / PAGE_SIZE;

/// Flag of [`Kind::Data`], [`Kind::Zero`] and [`Kind::Remaining`]: the page is discarded and is
/// sent nevertheless, because the guest wrote into it afterwards, or because it shares a host page
/// with others. It stays discarded.
pub const FLAG_STRAY: u16 = 1 << 0;

/// Flag of [`Kind::Data`]: the payload is the pages' content compressed as one LZ4 block. Needs
/// [`super::hello::FEATURE_LZ4`].
pub const FLAG_LZ4: u16 = 1 << 1;
/// Flag of [`Kind::Data`]: the payload is the pages' content compressed with Zstandard. Needs
/// [`super::hello::FEATURE_ZSTD`].
pub const FLAG_ZSTD: u16 = 1 << 2;
/// The flags of a compressed payload. A record has at most one of them.
pub const FLAGS_COMPRESSED: u16 = FLAG_LZ4 | FLAG_ZSTD;

/// Flag of [`Kind::End`]: the guest stays paused at the destination. Its operator had paused it, or
/// requested that.
pub const FLAG_PAUSED: u16 = 1 << 3;

/// Flag of [`Kind::Data`]: the source has content for all pages of the 2 MiB of the block in which
/// the record lies, and they follow in this pass. So the destination may use a page of 2 MiB. Needs
/// [`super::hello::FEATURE_WHOLE`].
pub const FLAG_WHOLE: u16 = 1 << 4;

/// The kind of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// First record on each stream, from the source. See [`super::hello`].
    Hello = 0x5046,
    /// A run of pages with their content.
    Data = 1,
    /// A run of pages that are zero now.
    Zero = 2,
    /// Runs of pages that are discarded now. The payload lists them; see [`super::payload`].
    Discard = 3,
    /// End of a pass on this stream: the pass in `first page`.
    PassEnd = 4,
    /// A part of a named piece of the VMM's state.
    State = 5,
    /// Pages that are still to come after the commit. The payload is a bitmap of the pages that the
    /// header names; see [`super::payload`].
    Remaining = 6,
    /// The last record on this stream, except for the commit on the primary. The payload is the
    /// totals of the stream. The number is 1 if postcopy follows, with more pages and then another
    /// end. [`FLAG_PAUSED`] on the end before the commit says that the guest stays paused.
    End = 7,
    /// The source has given the guest up.
    Commit = 8,
    /// Postcopy: the destination has all pages. The destination sends it first, then the source;
    /// nothing follows.
    Complete = 9,

    /// Answer to [`Kind::Hello`]: the version and features that are used.
    Accept = 0x101,
    /// Answer to [`Kind::Hello`]: why the destination refuses.
    Reject = 0x102,
    /// All streams ended the pass in `first page`, and it is applied.
    PassDone = 0x103,
    /// The destination verified the totals and loaded the state.
    Loaded = 0x104,
    /// The guest runs at the destination, or is loaded there and stays paused.
    Resumed = 0x105,
    /// The sender failed: the payload says why. Either direction; nothing follows.
    Error = 0x106,
    /// Postcopy, on an urgent stream: the guest waits for these pages.
    Request = 0x107,
    /// Recovery of a postcopy: the pages that the destination no longer needs. The payload is a
    /// bitmap of the pages that the header names.
    Received = 0x108,
    /// Postcopy, if the source asked for it: runs of placed pages. The payload lists them like
    /// those of a discard.
    Placed = 0x109,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 19] = [
        Kind::Hello,
        Kind::Data,
        Kind::Zero,
        Kind::Discard,
        Kind::PassEnd,
        Kind::State,
        Kind::Remaining,
        Kind::End,
        Kind::Commit,
        Kind::Complete,
        Kind::Accept,
        Kind::Reject,
        Kind::PassDone,
        Kind::Loaded,
        Kind::Resumed,
        Kind::Error,
        Kind::Request,
        Kind::Received,
        Kind::Placed,
    ];

    fn from_wire(value: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == value)
    }
}

/// The header on the wire.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RecordHeader {
    kind: U16,
    flags: U16,
    block: U32,
    first_page: U64,
    page_count: U64,
    payload_length: U32,
    crc: U32,
}

/// Why a record is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The kind is unknown.
    #[error("record kind {0:#x} is unknown")]
    Kind(u16),
    /// Unknown flags for this kind, or flags that exclude each other.
    #[error("{kind:?} record: flags {flags:#x} are unknown, or exclude each other")]
    Flags {
        /// The record's kind.
        kind: Kind,
        /// Its flags.
        flags: u16,
    },
    /// The payload is larger than [`MAX_PAYLOAD`].
    #[error("{kind:?} record: payload length {length:#x} is over the limit of {MAX_PAYLOAD:#x}")]
    Payload {
        /// The record's kind.
        kind: Kind,
        /// Length of the payload in bytes.
        length: u32,
    },
    /// The payload length does not fit the page count.
    #[error(
        "{kind:?} record: payload length {length:#x} for {count} pages, expected {expected:#x}"
    )]
    Length {
        /// The record's kind.
        kind: Kind,
        /// Length of the payload in bytes.
        length: u32,
        /// Page count.
        count: u64,
        /// Length that fits the count.
        expected: u64,
    },
    /// The page count or the payload length of compressed pages is out of bounds.
    #[error(
        "{kind:?} record: payload length {length:#x} for {count} compressed pages, \
         allowed: 1 to {MAX_DATA_PAGES} pages, and at least one byte and fewer than they have"
    )]
    Compressed {
        /// The record's kind.
        kind: Kind,
        /// Length of the payload in bytes.
        length: u32,
        /// Page count.
        count: u64,
    },
    /// The checksum is wrong.
    #[error("{kind:?} record: checksum is {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// The record's kind.
        kind: Kind,
        /// Checksum in the header.
        found: u32,
        /// Checksum of the bytes.
        computed: u32,
    },
}

impl RecordHeader {
    /// The header of a record about the pages `range` of `block`, without its checksum.
    pub fn new(
        kind: Kind, flags: u16, block: u32, range: PageRange, payload_length: usize,
    ) -> Self {
        Self {
            kind: (kind as u16).into(),
            flags: flags.into(),
            block: block.into(),
            first_page: range.first.into(),
            page_count: range.count.into(),
            payload_length: (payload_length as u32).into(),
            crc: 0.into(),
        }
    }

    /// The header of a record that is not about pages, with `number` where others have their first
    /// page.
    pub fn plain(kind: Kind, number: u64, payload_length: usize) -> Self {
        Self::new(kind, 0, 0, PageRange::new(number, 0), payload_length)
    }

    /// The header in these bytes, not checked yet.
    pub fn from_wire(bytes: [u8; RECORD_SIZE]) -> Self {
        zerocopy::transmute!(bytes)
    }

    /// The bytes of the header.
    pub fn to_wire(self) -> [u8; RECORD_SIZE] {
        zerocopy::transmute!(self)
    }

    /// The header with the checksum of itself and `payload`.
    #[must_use]
    pub fn with_checksum(mut self, payload: &[u8]) -> Self {
        self.crc = self.checksum(payload).into();
        self
    }

    fn checksum(&self, payload: &[u8]) -> u32 {
        let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
        digest.update(&self.as_bytes()[..RECORD_SIZE - 4]);
        digest.update(payload);
        // 32 bits wide, whatever type it comes in.
        digest.finalize() as u32
    }

    /// Checks everything that needs no payload: kind, flags, lengths.
    ///
    /// # Errors
    /// The field that is wrong, and its value.
    pub fn check(&self) -> Result<Kind, RecordError> {
        let kind = Kind::from_wire(self.kind.get()).ok_or(RecordError::Kind(self.kind.get()))?;
        let flags = self.flags.get();
        let known = match kind {
            Kind::Data => FLAG_STRAY | FLAGS_COMPRESSED | FLAG_WHOLE,
            Kind::Zero | Kind::Remaining => FLAG_STRAY,
            Kind::End => FLAG_PAUSED,
            _ => 0,
        };
        let compressed = flags & FLAGS_COMPRESSED;
        if flags & !known != 0 || compressed == FLAGS_COMPRESSED {
            return Err(RecordError::Flags { kind, flags });
        }
        let length = self.payload_length.get();
        if length as usize > MAX_PAYLOAD {
            return Err(RecordError::Payload { kind, length });
        }
        let count = self.page_count.get();
        if compressed != 0 {
            // Pages that do not shrink are sent uncompressed. So this bounds the compressed and the
            // decompressed size.
            let fits = (1..=MAX_DATA_PAGES).contains(&count)
                && (1..count * PAGE_SIZE).contains(&u64::from(length));
            return if fits {
                Ok(kind)
            } else {
                Err(RecordError::Compressed { kind, length, count })
            };
        }
        let expected = match kind {
            Kind::Data => Some(count.saturating_mul(PAGE_SIZE)),
            Kind::Zero
            | Kind::PassEnd
            | Kind::Commit
            | Kind::Complete
            | Kind::PassDone
            | Kind::Loaded
            | Kind::Resumed
            | Kind::Request => Some(0),
            // A bitmap of the pages, in whole words.
            Kind::Remaining | Kind::Received => Some(count.div_ceil(64).saturating_mul(8)),
            _ => None,
        };
        match expected {
            Some(expected) if expected != u64::from(length) => {
                Err(RecordError::Length { kind, length, count, expected })
            }
            _ => Ok(kind),
        }
    }

    /// Checks the payload against the checksum.
    ///
    /// # Errors
    /// Both checksums.
    pub fn verify(&self, kind: Kind, payload: &[u8]) -> Result<(), RecordError> {
        let (found, computed) = (self.crc.get(), self.checksum(payload));
        if found != computed {
            return Err(RecordError::Checksum { kind, found, computed });
        }
        Ok(())
    }

    /// Flags of the record.
    pub fn flags(&self) -> u16 {
        self.flags.get()
    }

    /// Id of the block.
    pub fn block(&self) -> u32 {
        self.block.get()
    }

    /// The pages that the record is about.
    pub fn range(&self) -> PageRange {
        PageRange::new(self.first_page.get(), self.page_count.get())
    }

    /// The number of a record that is not about pages.
    pub fn number(&self) -> u64 {
        self.first_page.get()
    }

    /// Length of the payload in bytes.
    pub fn payload_length(&self) -> usize {
        self.payload_length.get() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_record_verifies_and_any_flipped_bit_does_not() {
        let payload = vec![7u8; PAGE_SIZE as usize];
        let header =
            RecordHeader::new(Kind::Data, FLAG_STRAY, 3, PageRange::new(9, 1), payload.len())
                .with_checksum(&payload);
        assert_eq!(header.check(), Ok(Kind::Data));
        assert_eq!(RecordHeader::from_wire(header.to_wire()), header);
        header.verify(Kind::Data, &payload).unwrap();
        for bit in 0..RECORD_SIZE * 8 {
            let mut bytes = [0u8; RECORD_SIZE];
            bytes.copy_from_slice(header.as_bytes());
            bytes[bit / 8] ^= 1 << (bit % 8);
            let broken = RecordHeader::read_from_bytes(&bytes).unwrap();
            let refused = broken.check().and_then(|kind| broken.verify(kind, &payload));
            assert!(refused.is_err(), "bit {bit}");
        }
        let mut other = payload.clone();
        other[100] ^= 1;
        assert!(matches!(header.verify(Kind::Data, &other), Err(RecordError::Checksum { .. })));
    }

    #[test]
    fn lengths_are_checked_before_the_payload_is_here() {
        let huge = RecordHeader::new(Kind::Data, 0, 0, PageRange::new(0, 1 << 20), 0xffff_f000);
        assert!(matches!(huge.check(), Err(RecordError::Payload { .. })));
        let short = RecordHeader::new(Kind::Data, 0, 0, PageRange::new(0, 2), 4096);
        assert!(matches!(short.check(), Err(RecordError::Length { expected: 8192, .. })));
        let wrapped = RecordHeader::new(Kind::Data, 0, 0, PageRange::new(0, 1 << 52), 0);
        assert!(matches!(wrapped.check(), Err(RecordError::Length { .. })));
        let zero = RecordHeader::new(Kind::Zero, 0, 0, PageRange::new(0, u64::MAX), 0);
        assert_eq!(zero.check(), Ok(Kind::Zero));
        assert!(!zero.range().fits(100), "the block decides");
    }

    #[test]
    fn compressed_pages_are_fewer_bytes_than_they_have_and_within_the_limit() {
        let header = |kind, flags, count, length| {
            RecordHeader::new(kind, flags, 0, PageRange::new(7, count), length)
        };
        for flag in [FLAG_LZ4, FLAG_ZSTD, FLAG_LZ4 | FLAG_STRAY, FLAG_ZSTD | FLAG_STRAY] {
            for (count, length) in [(1, 1), (1, 4095), (2, 8191), (MAX_DATA_PAGES, MAX_PAYLOAD - 1)]
            {
                assert_eq!(
                    header(Kind::Data, flag, count, length).check(),
                    Ok(Kind::Data),
                    "{count} {length}"
                );
            }
            let beyond = MAX_DATA_PAGES + 1;
            for (count, length) in
                [(1, 0), (1, 4096), (2, 8192), (0, 0), (0, 1), (beyond, 100), (u64::MAX, 100)]
            {
                let refused = header(Kind::Data, flag, count, length).check();
                assert_eq!(
                    refused,
                    Err(RecordError::Compressed { kind: Kind::Data, length: length as u32, count }),
                    "{count} {length}"
                );
            }
            let zero = header(Kind::Zero, flag, 1, 0).check();
            assert_eq!(zero, Err(RecordError::Flags { kind: Kind::Zero, flags: flag }));
        }
        let both = header(Kind::Data, FLAGS_COMPRESSED, 1, 100).check();
        assert_eq!(both, Err(RecordError::Flags { kind: Kind::Data, flags: FLAGS_COMPRESSED }));
    }
}
