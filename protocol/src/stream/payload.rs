//! Payloads of the records that are not pages: discarded runs, parts of the state, totals.

use super::record::MAX_PAYLOAD;
use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::control::hook::{MAX_PIECE_NAME, MAX_STATE};
use crate::memory::PageRange;

/// Bytes of one run in the payload of a discard record.
const RUN_SIZE: usize = 16;
/// Most runs in one discard record.
pub const MAX_RUNS: usize = 65_536;
const _: () = assert!(MAX_RUNS * RUN_SIZE <= MAX_PAYLOAD);

/// The payload of a discard record.
pub fn encode_runs(runs: &[PageRange]) -> Vec<u8> {
    runs.iter().fold(Encoder::new(), |encoder, run| encoder.u64(run.first).u64(run.count)).finish()
}

/// The runs of a discard record about a block of `block_pages` pages.
///
/// # Errors
/// If the payload is no whole number of runs, or a run is empty or lies outside the block.
pub fn decode_runs(payload: &[u8], block_pages: u64) -> Result<impl Iterator<Item = PageRange> + '_, DecodeError> {
    if !payload.len().is_multiple_of(RUN_SIZE) {
        return Err(DecodeError::Value {
            field: "payload length",
            value: payload.len() as u64,
            allowed: "multiples of 16 in a discard record",
        });
    }
    let runs = || {
        payload.chunks_exact(RUN_SIZE).map(|run| {
            let (first, count) = run.split_at(8);
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
            PageRange::new(number(first), number(count))
        })
    };
    match runs().find(|run| run.is_empty() || !run.fits(block_pages)) {
        Some(run) => Err(DecodeError::Value {
            field: "discarded run",
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
    /// Where this part begins in it. Parts of a piece come in order and without gaps; an empty piece is one empty part.
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
            return Err(DecodeError::Value { field: "length", value: length, allowed: "at most 1 GiB" });
        }
        let offset = decoder.u64("offset")?;
        let name = decoder.text("name", MAX_PIECE_NAME)?;
        let bytes = decoder.remainder();
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > length) {
            return Err(DecodeError::Value { field: "offset", value: offset, allowed: "parts within the piece" });
        }
        Ok(Self { name, length, offset, bytes })
    }
}

/// What a stream, or all of them, carried. The receiver counts too and compares.
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
}

impl Totals {
    /// The figures with their names, for errors.
    pub fn named(&self) -> [(&'static str, u64); 5] {
        [
            ("data_pages", self.data_pages),
            ("zero_pages", self.zero_pages),
            ("discarded_pages", self.discarded_pages),
            ("stray_pages", self.stray_pages),
            ("passes", self.passes),
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
        let totals = Totals { data_pages: 1, zero_pages: 2, discarded_pages: 3, stray_pages: 4, passes: 5 };
        assert_eq!(Totals::decode(&totals.encode()), Ok(totals));
    }

    #[test]
    fn what_lies_outside_is_refused() {
        for run in [PageRange::new(15, 1), PageRange::new(0, 16), PageRange::new(3, 0), PageRange::new(u64::MAX, 2)] {
            assert!(decode_runs(&encode_runs(&[run]), 15).is_err(), "{run:?}");
        }
        assert!(decode_runs(&[0; 15], 15).is_err());
        let part = StatePart { name: "x", length: 3, offset: 1, bytes: b"123" };
        assert!(matches!(StatePart::decode(&part.encode()), Err(DecodeError::Value { field: "offset", .. })));
    }
}
