// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Payloads that are not pages: runs, bitmaps, parts of the state, totals.

use super::record::MAX_PAYLOAD;
use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::control::state_pieces::{MAX_PIECE_NAME, MAX_STATE};
use crate::memory::PageRange;
use crate::shm::bitmap::{WORD_BITS, word_mask};

/// Bytes of one run in the payload of a discard record.
const RUN_SIZE: usize = 16;
/// Most runs in one discard record.
pub const MAX_RUNS: usize = 65_536;
const _: () = assert!(MAX_RUNS * RUN_SIZE <= MAX_PAYLOAD);

/// Most pages in the bitmap of one remaining or received record: 4 GiB of memory, 128 KiB of
/// payload.
pub const MAX_BITMAP_PAGES: u64 = 1 << 20;

/// The payload of a remaining or received record about whole words of pages.
pub fn encode_bitmap(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().fold(Encoder::new(), Encoder::u64).finish()
}

/// The words of the bitmap in a remaining or received record about the pages `range` of a block of
/// `block_pages` pages: the index of each word in the block's bitmap, and its bits.
///
/// # Errors
/// If the range does not begin with a word, is empty, too long or outside the block, or the payload
/// has the wrong length or a bit after the end of the range.
pub fn decode_bitmap(
    payload: &[u8], range: PageRange, block_pages: u64,
) -> Result<impl Iterator<Item = (u64, u64)> + '_, DecodeError> {
    let refused = |field, value, allowed| Err(DecodeError::InvalidValue { field, value, allowed });
    if !range.first.is_multiple_of(WORD_BITS) || !range.fits(block_pages) {
        return refused("first page", range.first, "multiples of 64 with a range within the block");
    }
    if range.is_empty() || range.count > MAX_BITMAP_PAGES {
        return refused("page count", range.count, "1 to 2^20 in a bitmap");
    }
    if payload.len() as u64 != range.count.div_ceil(WORD_BITS) * 8 {
        return refused(
            "payload length",
            payload.len() as u64,
            "one bit for each page, in whole words",
        );
    }
    let (words, _) = payload.as_chunks::<8>();
    let last = words.last().map_or(0, |word| u64::from_le_bytes(*word));
    let used = match range.count % WORD_BITS {
        0 => u64::MAX,
        bits => word_mask(0, bits),
    };
    if last & !used != 0 {
        return refused("last word", last, "no bit after the last page");
    }
    Ok((range.first / WORD_BITS..).zip(words.iter().map(|word| u64::from_le_bytes(*word))))
}

/// The payload of a discard or placed record.
pub fn encode_runs(runs: &[PageRange]) -> Vec<u8> {
    runs.iter().fold(Encoder::new(), |encoder, run| encoder.u64(run.first).u64(run.count)).finish()
}

/// The runs of a discard or placed record about a block of `block_pages` pages.
///
/// # Errors
/// If the payload is not a whole number of runs, or a run is empty or lies outside the block.
pub fn decode_runs(
    payload: &[u8], block_pages: u64,
) -> Result<impl Iterator<Item = PageRange> + '_, DecodeError> {
    if !payload.len().is_multiple_of(RUN_SIZE) {
        return Err(DecodeError::InvalidValue {
            field: "payload length",
            value: payload.len() as u64,
            allowed: "multiples of 16 in a list of runs",
        });
    }
    if payload.len() > MAX_RUNS * RUN_SIZE {
        let value = (payload.len() / RUN_SIZE) as u64;
        return Err(DecodeError::InvalidValue { field: "runs", value, allowed: "at most 65536" });
    }
    let runs = || {
        payload.chunks_exact(RUN_SIZE).map(|run| {
            let (first, count) = run.split_at(8);
            let number = |bytes: &[u8]| {
                bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
            };
            PageRange::new(number(first), number(count))
        })
    };
    match runs().find(|run| run.is_empty() || !run.fits(block_pages)) {
        Some(run) => Err(DecodeError::InvalidValue {
            field: "run",
            value: run.first,
            allowed: "runs of at least one page within the block",
        }),
        None => Ok(runs()),
    }
}

/// A part of a named piece of the VMM's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePart<'a> {
    /// Name of the piece.
    pub name: &'a str,
    /// Length of the whole piece in bytes.
    pub length: u64,
    /// Offset of this part in the piece. The parts of a piece come in order and without gaps; an
    /// empty piece is one empty part.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl<'a> StatePart<'a> {
    /// Most bytes of one part.
    pub const MAX_BYTES: usize = 1 << 20;

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        Encoder::new().u64(self.length).u64(self.offset).text(self.name).bytes(self.bytes).finish()
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(payload: &'a [u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(payload);
        let length = decoder.u64("length")?;
        if length > MAX_STATE {
            return Err(DecodeError::InvalidValue {
                field: "length",
                value: length,
                allowed: "at most 1 GiB",
            });
        }
        let offset = decoder.u64("offset")?;
        let name = decoder.text("name", MAX_PIECE_NAME)?;
        let bytes = decoder.remainder();
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > length) {
            return Err(DecodeError::InvalidValue {
                field: "offset",
                value: offset,
                allowed: "parts within the piece",
            });
        }
        Ok(Self { name, length, offset, bytes })
    }
}

/// What one stream, or all of them, carried. The receiver counts as well and compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Pages in data records.
    pub data_pages: u64,
    /// Pages in zero records.
    pub zero_pages: u64,
    /// Pages in discard records.
    pub discarded_pages: u64,
    /// Pages in data and zero records that were flagged as stray.
    pub stray_pages: u64,
    /// Passes that ended.
    pub passes: u64,
    /// Pages in remaining records.
    pub remaining_pages: u64,
}

impl Totals {
    /// The counters with their names, for errors.
    pub fn named(&self) -> [(&'static str, u64); 6] {
        [
            ("data_pages", self.data_pages),
            ("zero_pages", self.zero_pages),
            ("discarded_pages", self.discarded_pages),
            ("stray_pages", self.stray_pages),
            ("passes", self.passes),
            ("remaining_pages", self.remaining_pages),
        ]
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        self.named().iter().fold(Encoder::new(), |encoder, (_, value)| encoder.u64(*value)).finish()
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(payload);
        let totals = Self {
            data_pages: decoder.u64("data_pages")?,
            zero_pages: decoder.u64("zero_pages")?,
            discarded_pages: decoder.u64("discarded_pages")?,
            stray_pages: decoder.u64("stray_pages")?,
            passes: decoder.u64("passes")?,
            remaining_pages: decoder.u64("remaining_pages")?,
        };
        decoder.finish()?;
        Ok(totals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_survive_the_wire() {
        let runs = [PageRange::new(0, 1), PageRange::new(5, 10)];
        assert!(decode_runs(&encode_runs(&runs), 15).unwrap().eq(runs));
        let part = StatePart { name: "vcpu0", length: 9, offset: 4, bytes: b"12345" };
        assert_eq!(StatePart::decode(&part.encode()), Ok(part));
        let totals = Totals {
            data_pages: 1,
            zero_pages: 2,
            discarded_pages: 3,
            stray_pages: 4,
            passes: 5,
            remaining_pages: 6,
        };
        assert_eq!(Totals::decode(&totals.encode()), Ok(totals));
    }

    #[test]
    fn a_bitmap_of_another_size_or_with_a_bad_end_is_refused_by_field() {
        let words = [5, u64::MAX, 0b11];
        let range = PageRange::new(64, 130);
        let good = encode_bitmap(words);
        assert!(decode_bitmap(&good, range, 194).unwrap().eq([(1, 5), (2, u64::MAX), (3, 0b11)]));
        let refused = |payload: &[u8], range, pages| match decode_bitmap(payload, range, pages) {
            Err(DecodeError::InvalidValue { field, .. }) => field,
            other => panic!("{:?}", other.map(Iterator::collect::<Vec<_>>)),
        };
        assert_eq!(refused(&good[8..], range, 194), "payload length");
        assert_eq!(refused(&encode_bitmap([0, 0, 0b111]), range, 194), "last word");
        assert_eq!(refused(&good, range, 193), "first page");
        assert_eq!(refused(&good, PageRange::new(63, 130), 194), "first page");
        assert_eq!(refused(&[], PageRange::new(64, 0), 194), "page count");
        assert_eq!(refused(&good, PageRange::new(0, MAX_BITMAP_PAGES + 1), 1 << 40), "page count");
        assert_eq!(refused(&good, PageRange::new(64, u64::MAX), 194), "first page");
    }

    #[test]
    fn what_lies_outside_is_refused() {
        for run in [
            PageRange::new(15, 1),
            PageRange::new(0, 16),
            PageRange::new(3, 0),
            PageRange::new(u64::MAX, 2),
        ] {
            assert!(decode_runs(&encode_runs(&[run]), 15).is_err(), "{run:?}");
        }
        assert!(decode_runs(&[0; 15], 15).is_err());
        let part = StatePart { name: "x", length: 3, offset: 1, bytes: b"123" };
        assert!(matches!(
            StatePart::decode(&part.encode()),
            Err(DecodeError::InvalidValue { field: "offset", .. })
        ));
    }
}
