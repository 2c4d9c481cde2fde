//! How a stream opens.
//!
//! The source sends a [`Hello`] on every stream; the one on the primary carries the block table.
//! The destination answers on the primary, once all streams are there, with [`Accept`] or with a
//! code and a sentence.

use crate::control::codec::{DecodeError, Decoder, Encoder, clip};
use crate::control::job::{Compression, MAX_SENTENCE, MAX_STREAMS};
use crate::control::request::{ErrorCode, RemoteError};
use crate::memory::geometry::MAX_NAME;
use crate::memory::{BlockGeometry, BlockTable, GeometryError, MAX_BLOCKS, PAGE_SIZE};

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
/// All features that this crate knows. A destination accepts those of them that are offered.
pub const FEATURES: u64 = FEATURE_LZ4 | FEATURE_ZSTD | FEATURE_POSTCOPY;

/// Flag: the source recovers a postcopy, whose session it names.
pub const HELLO_RECOVER: u16 = 1 << 0;
/// Flag: in postcopy the source wants to be told what is placed ([`super::Kind::Placed`]).
pub const HELLO_ACKNOWLEDGE: u16 = 1 << 1;

/// The feature that a source offers for this compression; 0 for none.
pub fn feature_of(compression: Compression) -> u64 {
    match compression {
        Compression::None => 0,
        Compression::Lz4 => FEATURE_LZ4,
        Compression::Zstd(_) => FEATURE_ZSTD,
    }
}

/// Longest payload of a hello in bytes: that with the largest block table.
pub const MAX_HELLO: usize = 48 + MAX_BLOCKS * (32 + MAX_NAME);

/// What the source says first on each stream.
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
    /// Which stream this is; 0 is the primary.
    pub stream: u16,
    /// How many there are.
    pub streams: u16,
    /// How many of them, the last ones, are urgent: for the pages that a guest in postcopy waits
    /// for, and nothing else.
    pub urgent: u16,
    /// [`HELLO_RECOVER`], [`HELLO_ACKNOWLEDGE`].
    pub flags: u16,
    /// The source's blocks; empty but on the primary.
    pub blocks: BlockTable,
}

/// Why a hello is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// It does not begin with [`MAGIC`].
    #[error("magic is {0:02x?}: this is no page stream")]
    Magic([u8; 8]),
    /// There is no version that both speak.
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
        // Before anything that another version may have changed.
        if version_min > STREAM_VERSION || version_max < STREAM_VERSION {
            return Err(HelloError::Version { min: version_min, max: version_max });
        }
        let stream = decoder.u16("stream")?;
        let streams = decoder.u16("streams")?;
        if streams == 0 || streams > MAX_STREAMS {
            return Err(DecodeError::Value {
                field: "streams",
                value: streams.into(),
                allowed: "1 to 64",
            }
            .into());
        }
        if stream >= streams {
            return Err(DecodeError::Value {
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
            return Err(
                DecodeError::Value { field: "urgent", value: urgent.into(), allowed }.into()
            );
        }
        let flags = decoder.u16("flags")?;
        if flags & !(HELLO_RECOVER | HELLO_ACKNOWLEDGE) != 0 {
            let allowed = "bit 0, recover, and bit 1, acknowledge";
            return Err(DecodeError::Value { field: "flags", value: flags.into(), allowed }.into());
        }
        let count = decoder.u32("blocks")?;
        if count as usize > MAX_BLOCKS {
            return Err(DecodeError::Value {
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

/// The destination's answer, if it takes the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The version that is used.
    pub version: u16,
    /// The features that may be used: those offered that the destination knows.
    pub features: u64,
    /// The destination's host page size in bytes for each block, in the order of the table: in
    /// postcopy whole host pages remain. Empty without postcopy.
    pub host_pages: Vec<u64>,
}

impl Accept {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let encoder =
            Encoder::new().u16(self.version).u64(self.features).u32(self.host_pages.len() as u32);
        self.host_pages.iter().fold(encoder, |encoder, size| encoder.u64(*size)).finish()
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(payload);
        let version = decoder.u16("version")?;
        if version != STREAM_VERSION {
            return Err(DecodeError::Value {
                field: "version",
                value: version.into(),
                allowed: "1",
            });
        }
        let features = decoder.u64("features")?;
        let count = decoder.u32("host_pages")?;
        if count as usize > MAX_BLOCKS {
            return Err(DecodeError::Value {
                field: "host_pages",
                value: count.into(),
                allowed: "at most 512",
            });
        }
        let host_page = |_| match decoder.u64("host page")? {
            size if size.is_power_of_two() && size >= PAGE_SIZE => Ok(size),
            value => Err(DecodeError::Value {
                field: "host page",
                value,
                allowed: "powers of two from 4096",
            }),
        };
        let host_pages = (0..count).map(host_page).collect::<Result<_, _>>()?;
        decoder.finish()?;
        Ok(Self { version, features, host_pages })
    }
}

/// The payload of a reject or error record.
pub fn encode_error(error: &RemoteError) -> Vec<u8> {
    Encoder::new().u32(error.code as u32).text(clip(&error.sentence, MAX_SENTENCE)).finish()
}

/// Reads the payload of a reject or error record.
///
/// # Errors
/// The field that is wrong.
pub fn decode_error(payload: &[u8]) -> Result<RemoteError, DecodeError> {
    let mut decoder = Decoder::new(payload);
    let code = ErrorCode::from_wire(decoder.u32("code")?);
    let error = RemoteError::new(code, decoder.text("sentence", MAX_SENTENCE)?);
    decoder.finish()?;
    Ok(error)
}

/// Where the destination's table differs from the source's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableMismatch {
    /// The numbers of blocks differ.
    #[error("the source has {source_count} blocks, this side {own_count}")]
    Count {
        /// Blocks of the source.
        source_count: usize,
        /// Blocks of this side.
        own_count: usize,
    },
    /// A block is missing here.
    #[error("block {id} \"{name}\" of the source does not exist here")]
    Missing {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A field differs.
    #[error("block {id}: {field} is {theirs} at the source and {own} here")]
    Field {
        /// The block.
        id: u32,
        /// The field.
        field: &'static str,
        /// The source's value.
        theirs: String,
        /// This side's value.
        own: String,
    },
}

impl TableMismatch {
    /// What the source may know: which field differs, and its own value. This side's values are for
    /// its own log and operator, or whoever reaches the port could read the table field by field.
    pub fn for_source(&self) -> String {
        let here = "the destination's status and log say what it has";
        match self {
            Self::Count { source_count, .. } => {
                format!(
                    "the source has {source_count} blocks, the destination another number: {here}"
                )
            }
            Self::Missing { id, name } => {
                format!("block {id} \"{name}\" of the source does not exist at the destination")
            }
            Self::Field { id, field, theirs, .. } => {
                format!(
                    "block {id}: {field} is {theirs} at the source and differs at the destination: {here}"
                )
            }
        }
    }
}

/// Compares the tables of the source and of this side.
///
/// # Errors
/// The first difference.
pub fn compare(theirs: &BlockTable, own: &BlockTable) -> Result<(), TableMismatch> {
    for block in theirs.blocks() {
        let Some(here) = own.get(block.id) else {
            return Err(TableMismatch::Missing { id: block.id, name: block.name.clone() });
        };
        let hex = |value: u64| format!("{value:#x}");
        let fields = [
            ("name", block.name.clone(), here.name.clone()),
            ("gpa", hex(block.gpa), hex(here.gpa)),
            ("length", hex(block.length), hex(here.length)),
            ("granularity", hex(block.granularity), hex(here.granularity)),
        ];
        if let Some((field, theirs, own)) =
            fields.into_iter().find(|(_, theirs, own)| theirs != own)
        {
            return Err(TableMismatch::Field { id: block.id, field, theirs, own });
        }
    }
    let (source_count, own_count) = (theirs.blocks().len(), own.blocks().len());
    if source_count != own_count {
        return Err(TableMismatch::Count { source_count, own_count });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(lengths: &[u64]) -> BlockTable {
        let mut table = BlockTable::new();
        let mut gpa = 0;
        for (id, length) in lengths.iter().enumerate() {
            let name = format!("ram{id}");
            let block = BlockGeometry {
                id: id as u32,
                name,
                gpa,
                length: length * 4096,
                granularity: 4096,
            };
            gpa += length * 4096;
            table.insert(block, MAX_BLOCKS).unwrap();
        }
        table
    }

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
            Err(HelloError::Decode(DecodeError::Value { field: "stream", .. }))
        ));
        for urgent in [0, 4, u16::MAX] {
            let wrong = Hello { urgent, ..hello(table(&[])) }.encode();
            let refused = Hello::decode(&wrong);
            assert!(
                matches!(
                    refused,
                    Err(HelloError::Decode(DecodeError::Value { field: "urgent", .. }))
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

    #[test]
    fn tables_that_differ_are_refused_by_field() {
        let ours = table(&[2, 3]);
        compare(&ours, &ours.clone()).unwrap();
        let longer = compare(&table(&[2, 4]), &ours).unwrap_err();
        assert_eq!(longer.to_string(), "block 1: length is 0x4000 at the source and 0x3000 here");
        assert!(matches!(
            compare(&table(&[2, 3, 1]), &ours),
            Err(TableMismatch::Missing { id: 2, .. })
        ));
        assert!(matches!(
            compare(&table(&[2]), &ours),
            Err(TableMismatch::Count { source_count: 1, own_count: 2 })
        ));
        let told = longer.for_source();
        assert!(
            told.starts_with("block 1: length is 0x4000 at the source") && !told.contains("0x3000"),
            "{told}"
        );
    }

    #[test]
    fn an_accept_survives_the_wire_and_odd_host_pages_do_not() {
        let accept = Accept { version: 1, features: 4, host_pages: vec![4096, 2 << 20] };
        assert_eq!(Accept::decode(&accept.encode()), Ok(accept.clone()));
        for size in [0, 1, 2048, 4097, u64::MAX] {
            let refused =
                Accept::decode(&Accept { host_pages: vec![4096, size], ..accept.clone() }.encode());
            assert!(
                matches!(refused, Err(DecodeError::Value { field: "host page", .. })),
                "{size}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(tail in prop::collection::vec(any::<u8>(), 0..200), honest in any::<bool>()) {
            let mut payload = if honest { MAGIC.to_vec() } else { Vec::new() };
            if honest { payload.extend([1, 0, 1, 0]); }
            payload.extend(tail);
            let _ = Hello::decode(&payload);
            let _ = Accept::decode(&payload);
            let _ = decode_error(&payload);
        }
    }
}
