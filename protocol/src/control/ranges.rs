// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges of guest memory in a request: many in one frame.

use super::codec::{DecodeError, Decoder, Encoder};
use super::frame::MAX_BODY;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a range on the wire.
const RANGE_SIZE: usize = size_of::<WireRange>();
/// Most ranges in one discard, free or populate.
pub const MAX_RANGES: usize = (MAX_BODY - 8) / RANGE_SIZE;

/// A range of bytes in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// The block.
    pub block: u32,
    /// Offset of the first byte within the block.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRange {
    block: U32,
    reserved: U32,
    offset: U64,
    length: U64,
}

pub(super) fn encode_ranges(flags: u32, ranges: &[BlockRange]) -> Encoder {
    ranges.iter().fold(Encoder::new().u32(flags).u32(ranges.len() as u32), |encoder, range| {
        encoder.u32(range.block).u32(0).u64(range.offset).u64(range.length)
    })
}

pub(super) fn decode_ranges(
    decoder: &mut Decoder<'_>, known: u32, allowed: &'static str,
) -> Result<(u32, Vec<BlockRange>), DecodeError> {
    let flags = decoder.flags("flags", known, allowed)?;
    let count = decoder.u32("count")? as usize;
    if count > MAX_RANGES {
        return Err(DecodeError::InvalidValue {
            field: "count",
            value: count as u64,
            allowed: "at most 43690 ranges",
        });
    }
    let bytes = decoder.bytes("ranges", count * RANGE_SIZE)?;
    let ranges = <[WireRange]>::ref_from_bytes(bytes).map_err(|_| DecodeError::TooShort {
        field: "ranges",
        needed: count * RANGE_SIZE,
        left: bytes.len(),
    })?;
    let range = |wire: &WireRange| BlockRange {
        block: wire.block.get(),
        offset: wire.offset.get(),
        length: wire.length.get(),
    };
    Ok((flags, ranges.iter().map(range).collect()))
}
