// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clones: guests of one image whose memory is private mappings of one file, the *base*.
//!
//! A page that no clone has written is in memory once. What a clone writes is anonymous memory of
//! its VMM, which no descriptor leads to. So the agent reads it by the `/proc/self/mem` of the VMM,
//! and has the client give pages back, over a socket of its own for each block:
//!
//! - [`GiveBack`] is what the agent asks; the client answers with 4 bytes, an errno or 0;
//! - [`OpenBaseReply`] says where each block lies in the base.

use super::codec::{DecodeError, Decoder, Encoder};
use crate::memory::{PAGE_SIZE, PageRange};

/// Most blocks of a base.
const MAX_BLOCKS: u32 = 512;

/// What becomes of pages that are given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveBackTo {
    /// They read as zero, whatever the base has.
    Zero,
    /// They are what the base has.
    Base,
}

/// The agent asks the client to give pages of a clone's block back. The caller waits for the
/// answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GiveBack {
    /// What becomes of them.
    pub to: GiveBackTo,
    /// The pages of the block.
    pub pages: PageRange,
}

impl GiveBack {
    /// Bytes of a request.
    pub const SIZE: usize = 24;

    /// The request as it travels.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let to: u64 = match self.to {
            GiveBackTo::Zero => 0,
            GiveBackTo::Base => 1,
        };
        let fields = [to, self.pages.offset(), self.pages.bytes()];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// Reads a request about a block of `length` bytes.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE], length: u64) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(bytes);
        let (to, offset, bytes) =
            (decoder.u64("to")?, decoder.u64("offset")?, decoder.u64("length")?);
        let to = match to {
            0 => GiveBackTo::Zero,
            1 => GiveBackTo::Base,
            value => {
                let allowed = "0 zero, 1 base";
                return Err(DecodeError::InvalidValue { field: "to", value, allowed });
            }
        };
        let end = offset.checked_add(bytes).filter(|end| *end <= length && bytes > 0);
        for (field, value) in [("offset", offset), ("length", bytes)] {
            if end.is_none() || value % PAGE_SIZE != 0 {
                let allowed = "whole pages of the block";
                return Err(DecodeError::InvalidValue { field, value, allowed });
            }
        }
        Ok(Self { to, pages: PageRange::new(offset / PAGE_SIZE, bytes / PAGE_SIZE) })
    }
}

/// Where a block of the image lies in the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseBlock {
    /// The block.
    pub id: u32,
    /// Its first byte in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Answer to [`Request::OpenBase`](super::request::Request::OpenBase). The descriptor is the base,
/// open to be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenBaseReply {
    /// Its blocks.
    pub blocks: Vec<BaseBlock>,
}

impl OpenBaseReply {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        self.blocks.iter().fold(encoder.u32(self.blocks.len() as u32), |encoder, block| {
            encoder.u32(block.id).u64(block.offset).u64(block.length)
        })
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let count = decoder.u32("blocks")?;
        if count > MAX_BLOCKS {
            let (field, value, allowed) = ("blocks", count.into(), "at most 512");
            return Err(DecodeError::InvalidValue { field, value, allowed });
        }
        let mut blocks = Vec::new();
        for _ in 0..count {
            blocks.push(BaseBlock {
                id: decoder.u32("id")?,
                offset: decoder.u64("offset")?,
                length: decoder.u64("length")?,
            });
        }
        Ok(Self { blocks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_request_survives_the_wire_and_never_leaves_its_block(
            bytes in prop::array::uniform24(any::<u8>()), first in 0u64..8, count in 1u64..8,
            zero in any::<bool>(),
        ) {
            let length = 8 * PAGE_SIZE;
            if let Ok(request) = GiveBack::decode(&bytes, length) {
                prop_assert!(request.pages.end() <= 8);
            }
            let to = if zero { GiveBackTo::Zero } else { GiveBackTo::Base };
            let request = GiveBack { to, pages: PageRange::new(first, count) };
            let decoded = GiveBack::decode(&request.encode(), length);
            prop_assert_eq!(decoded.is_ok(), first + count <= 8);
            if let Ok(decoded) = decoded {
                prop_assert_eq!(decoded, request);
            }
        }

        #[test]
        fn an_answer_survives_the_wire_and_any_bytes_are_read_or_refused(
            blocks in prop::collection::vec(any::<(u32, u64, u64)>(), 0..6), bytes: Vec<u8>,
        ) {
            let _ = OpenBaseReply::decode(&mut Decoder::new(&bytes));
            let block = |(id, offset, length)| BaseBlock { id, offset, length };
            let reply = OpenBaseReply { blocks: blocks.into_iter().map(block).collect() };
            let body = reply.encode(Encoder::new()).finish();
            prop_assert_eq!(OpenBaseReply::decode(&mut Decoder::new(&body)).unwrap(), reply);
        }
    }
}
