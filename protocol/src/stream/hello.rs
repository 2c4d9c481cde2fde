// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first record on a stream.
//!
//! The source sends a [`Hello`] on every stream. The hello on the primary stream carries the block
//! table. When all streams are connected, the destination [answers](super::answer) on the primary.

use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::control::job::{Compression, MAX_STREAMS};
use crate::memory::geometry::MAX_NAME;
use crate::memory::{BlockGeometry, BlockTable, GeometryError, MAX_BLOCKS};

/// The version of the page stream that this crate speaks.
pub const STREAM_VERSION: u16 = 1;

/// First bytes of the payload of a hello.
pub const MAGIC: [u8; 8] = *b"PAGEFRRY";

/// Feature: data records may be compressed with LZ4.
pub const FEATURE_LZ4: u64 = 1 << 0;
/// Feature: data records may be compressed with Zstandard.
pub const FEATURE_ZSTD: u64 = 1 << 1;
/// Feature: the guest may run before its memory is there.
pub const FEATURE_POSTCOPY: u64 = 1 << 2;
/// Feature: data records may have [`FLAG_WHOLE`](super::record::FLAG_WHOLE).
pub const FEATURE_WHOLE: u64 = 1 << 3;
/// All features that this crate knows. A destination accepts those of them that are offered.
pub const FEATURES: u64 = FEATURE_LZ4 | FEATURE_ZSTD | FEATURE_POSTCOPY | FEATURE_WHOLE;

/// Flag: the source recovers a postcopy, named by its session.
pub const HELLO_RECOVER: u16 = 1 << 0;
/// Flag: in postcopy the destination reports the pages that it has placed
/// ([`super::Kind::Placed`]).
pub const HELLO_ACKNOWLEDGE: u16 = 1 << 1;

/// The feature that a source offers for this compression; 0 for none.
pub fn feature_of(compression: Compression) -> u64 {
    match compression {
        Compression::None => 0,
        Compression::Lz4 => FEATURE_LZ4,
        Compression::Zstd(_) => FEATURE_ZSTD,
    }
}

/// Longest payload of a hello in bytes, with the largest block table.
pub const MAX_HELLO: usize = 48 + MAX_BLOCKS * (32 + MAX_NAME);

/// The first record of the source on each stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version that the source speaks.
    pub version_min: u16,
    /// Highest version that the source speaks.
    pub version_max: u16,
    /// Feature bits that the source offers: [`FEATURES`], or others of a newer source.
    pub features: u64,
    /// Random; the same on all streams of one migration.
    pub session: [u8; 16],
    /// Index of this stream; 0 is the primary.
    pub stream: u16,
    /// Number of streams.
    pub streams: u16,
    /// Number of urgent streams, which are the last ones. They carry only pages that a guest in
    /// postcopy waits for.
    pub urgent: u16,
    /// [`HELLO_RECOVER`], [`HELLO_ACKNOWLEDGE`].
    pub flags: u16,
    /// The blocks of the source on the primary; empty on all others.
    pub blocks: BlockTable,
}

/// Why a hello is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// It does not begin with [`MAGIC`].
    #[error("magic is {0:02x?}: this is no page stream")]
    Magic([u8; 8]),
    /// Both sides share no version.
    #[error("version {min} to {max} offered, this side speaks {STREAM_VERSION}")]
    Version {
        /// Lowest that the source speaks.
        min: u16,
        /// Highest that the source speaks.
        max: u16,
    },
    /// The block table is not valid.
    #[error("block table")]
    Blocks(#[from] GeometryError),
    /// A field is malformed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl Hello {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let encoder = Encoder::new()
            .bytes(&MAGIC)
            .u16(self.version_min)
            .u16(self.version_max)
            .u16(self.stream)
            .u16(self.streams)
            .u64(self.features)
            .bytes(&self.session)
            .u16(self.urgent)
            .u16(self.flags)
            .u32(self.blocks.blocks().len() as u32);
        self.blocks
            .blocks()
            .iter()
            .fold(encoder, |encoder, block| {
                encoder
                    .u32(block.id)
                    .u64(block.gpa)
                    .u64(block.length)
                    .u64(block.granularity)
                    .text(&block.name)
            })
            .finish()
    }

    /// Reads the payload; the block table that comes out is valid.
    ///
    /// # Errors
    /// What is wrong, with the field and its value.
    pub fn decode(payload: &[u8]) -> Result<Self, HelloError> {
        let mut decoder = Decoder::new(payload);
        let magic = decoder.bytes("magic", 8)?;
        if magic != MAGIC {
            let mut found = [0; 8];
            found.copy_from_slice(magic);
            return Err(HelloError::Magic(found));
        }
        let version_min = decoder.u16("version_min")?;
        let version_max = decoder.u16("version_max")?;
        // Before any field that another version may have changed.
        if version_min > STREAM_VERSION || version_max < STREAM_VERSION {
            return Err(HelloError::Version { min: version_min, max: version_max });
        }
        let stream = decoder.u16("stream")?;
        let streams = decoder.u16("streams")?;
        if streams == 0 || streams > MAX_STREAMS {
            return Err(DecodeError::InvalidValue {
                field: "streams",
                value: streams.into(),
                allowed: "1 to 64",
            }
            .into());
        }
        if stream >= streams {
            return Err(DecodeError::InvalidValue {
                field: "stream",
                value: stream.into(),
                allowed: "less than streams",
            }
            .into());
        }
        let features = decoder.u64("features")?;
        let mut session = [0; 16];
        session.copy_from_slice(decoder.bytes("session", 16)?);
        let urgent = decoder.u16("urgent")?;
        if urgent >= streams || (urgent == 0 && features & FEATURE_POSTCOPY != 0) {
            let allowed = "less than streams, and at least 1 with postcopy";
            return Err(DecodeError::InvalidValue {
                field: "urgent",
                value: urgent.into(),
                allowed,
            }
            .into());
        }
        let flags = decoder.u16("flags")?;
        if flags & !(HELLO_RECOVER | HELLO_ACKNOWLEDGE) != 0 {
            let allowed = "bit 0, recover, and bit 1, acknowledge";
            return Err(
                DecodeError::InvalidValue { field: "flags", value: flags.into(), allowed }.into()
            );
        }
        let count = decoder.u32("blocks")?;
        if count as usize > MAX_BLOCKS {
            return Err(DecodeError::InvalidValue {
                field: "blocks",
                value: count.into(),
                allowed: "at most 512",
            }
            .into());
        }
        let mut blocks = BlockTable::new();
        for _ in 0..count {
            let block = BlockGeometry {
                id: decoder.u32("block id")?,
                gpa: decoder.u64("block gpa")?,
                length: decoder.u64("block length")?,
                granularity: decoder.u64("block granularity")?,
                name: decoder.text("block name", MAX_NAME)?.to_owned(),
            };
            blocks.insert(block, MAX_BLOCKS)?;
        }
        decoder.finish()?;
        Ok(Self {
            version_min,
            version_max,
            features,
            session,
            stream,
            streams,
            urgent,
            flags,
            blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::geometry::test_table as table;
    use proptest::prelude::*;

    fn hello(blocks: BlockTable) -> Hello {
        let (session, flags) = ([7; 16], HELLO_RECOVER);
        Hello {
            version_min: 1,
            version_max: 3,
            features: 4,
            session,
            stream: 0,
            streams: 4,
            urgent: 2,
            flags,
            blocks,
        }
    }

    #[test]
    fn a_hello_survives_the_wire_even_with_512_blocks() {
        let full = hello(table(&[1; MAX_BLOCKS]));
        assert_eq!(Hello::decode(&full.encode()), Ok(full));
    }

    #[test]
    fn the_longest_hello_has_the_length_that_is_allowed() {
        let mut blocks = BlockTable::new();
        for id in 0..MAX_BLOCKS as u32 {
            let name = format!("{id:0>MAX_NAME$}");
            let gpa = u64::from(id) * 4096;
            blocks
                .insert(
                    BlockGeometry { id, name, gpa, length: 4096, granularity: 4096 },
                    MAX_BLOCKS,
                )
                .unwrap();
        }
        assert_eq!(hello(blocks).encode().len(), MAX_HELLO);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut magic = hello(table(&[1])).encode();
        magic[0] = b'Q';
        assert!(matches!(Hello::decode(&magic), Err(HelloError::Magic(_))));
        let version = Hello { version_min: 2, ..hello(table(&[1])) }.encode();
        assert_eq!(Hello::decode(&version), Err(HelloError::Version { min: 2, max: 3 }));
        let stream = Hello { stream: 4, ..hello(table(&[])) }.encode();
        assert!(matches!(
            Hello::decode(&stream),
            Err(HelloError::Decode(DecodeError::InvalidValue { field: "stream", .. }))
        ));
        for urgent in [0, 4, u16::MAX] {
            let wrong = Hello { urgent, ..hello(table(&[])) }.encode();
            let refused = Hello::decode(&wrong);
            assert!(
                matches!(
                    refused,
                    Err(HelloError::Decode(DecodeError::InvalidValue { field: "urgent", .. }))
                ),
                "{urgent}"
            );
        }
        let mut overlap = hello(table(&[1, 1])).encode();
        let second_gpa = overlap.len() - (4 + 4) - 8 - 8 - 8;
        overlap[second_gpa..second_gpa + 8].fill(0);
        assert!(matches!(
            Hello::decode(&overlap),
            Err(HelloError::Blocks(GeometryError::Overlap { .. }))
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(tail in prop::collection::vec(any::<u8>(), 0..200), honest in any::<bool>()) {
            let mut payload = if honest { MAGIC.to_vec() } else { Vec::new() };
            if honest { payload.extend([1, 0, 1, 0]); }
            payload.extend(tail);
            let _ = Hello::decode(&payload);
        }
    }
}
