// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The working set: a file beside an image that lists the pages that a restored guest accessed, in
//! the order of the first access.
//!
//! Its magic, `PFwkset` and a zero byte (8 bytes); version, 1 (4); the number of runs (4); the id
//! of the image (16); the runs in order, each a block (4), zero (4), its first page (8) and the
//! number of pages (8); the CRC-32C of everything before it (4).
//!
//! A sealed one ([`SealedWorkingSet`]) has version 2. It is the magic (8); version, 2 (4); zero
//! (4); a salt (32); a seal (24); all bytes of the above, sealed; the CRC-32C of everything before
//! it (4). A reader of version 1 takes it for a working set of a later version, and uses none.

use super::sealing::{SALT_SIZE, SEAL_SIZE, Seal};
use super::{ImageId, checksum};
use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::memory::PageRange;

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"PFwkset\0";
/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Largest number of runs: 24 MiB of file.
pub const MAX_RUNS: usize = 1 << 20;
/// Bytes before the runs.
const HEAD: usize = 32;
/// Bytes of a run.
const RUN: usize = 24;
/// The version of a sealed one.
pub const SEALED_VERSION: u32 = 2;
/// Bytes before the sealed ones.
const SEALED_HEAD: usize = 16 + SALT_SIZE + SEAL_SIZE as usize;
/// Largest length of the file in bytes.
pub const MAX_SIZE: u64 = (SEALED_HEAD + HEAD + MAX_RUNS * RUN + 8) as u64;

/// The pages that were accessed first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet {
    /// The image.
    pub image: ImageId,
    /// The id of a block and pages of it, in the order of the first access.
    pub runs: Vec<(u32, PageRange)>,
}

/// Why a file is not a working set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkingSetError {
    /// It is another kind of file.
    #[error("the file is not a working set of pageferry")]
    Magic,
    /// The file is damaged.
    #[error("working set: checksum is {found:#010x}, that of its bytes is {computed:#010x}")]
    Checksum {
        /// As written.
        found: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// A field is wrong.
    #[error("working set")]
    Field(#[from] DecodeError),
}

impl WorkingSet {
    /// The bytes. Runs after [`MAX_RUNS`] are left out.
    pub fn encode(&self) -> Vec<u8> {
        let runs = &self.runs[..self.runs.len().min(MAX_RUNS)];
        let head =
            Encoder::new().bytes(&MAGIC).u32(VERSION).u32(runs.len() as u32).bytes(&self.image);
        let run = |encoder: Encoder, (block, range): &(u32, PageRange)| {
            encoder.u32(*block).u32(0).u64(range.first).u64(range.count)
        };
        let mut bytes = runs.iter().fold(head, run).finish();
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        bytes
    }

    /// Decodes a working set. Does not check that its runs lie in the blocks.
    ///
    /// # Errors
    /// What is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let mut decoder = Decoder::new(bytes);
        if decoder.array("magic")? != MAGIC {
            return Err(WorkingSetError::Magic);
        }
        let checked = bytes.len().saturating_sub(4).max(HEAD.min(bytes.len()));
        let found = Decoder::new(&bytes[checked..]).u32("checksum")?;
        let computed = checksum(&bytes[..checked]);
        if found != computed {
            return Err(WorkingSetError::Checksum { found, computed });
        }
        let version = decoder.u32("version")?;
        if version != VERSION {
            return Err(DecodeError::InvalidValue {
                field: "version",
                value: version.into(),
                allowed: "1",
            }
            .into());
        }
        let count = decoder.u32("runs")?;
        let image = decoder.array("image")?;
        if count as usize > MAX_RUNS
            || count as usize * RUN != decoder.remaining().saturating_sub(4)
        {
            let allowed = "at most 2^20, and as many as the file holds";
            return Err(
                DecodeError::InvalidValue { field: "runs", value: count.into(), allowed }.into()
            );
        }
        let mut run = |_| -> Result<_, DecodeError> {
            let block = decoder.u32("block")?;
            decoder.u32("zero")?;
            Ok((block, PageRange::new(decoder.u64("first page")?, decoder.u64("page count")?)))
        };
        let runs = (0..count).map(&mut run).collect::<Result<_, _>>()?;
        Ok(Self { image, runs })
    }
}

/// A working set that is sealed, in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedWorkingSet {
    /// The key is derived from it and from the operator's key.
    pub salt: [u8; SALT_SIZE],
    /// Of all the bytes.
    pub seal: Seal,
    /// The bytes of a [`WorkingSet`], sealed.
    pub bytes: Vec<u8>,
}

impl SealedWorkingSet {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let head = Encoder::new().bytes(&MAGIC).u32(SEALED_VERSION).u32(0).bytes(&self.salt);
        let head = head.bytes(&self.seal.nonce).bytes(&self.seal.tag);
        let mut bytes = head.bytes(&self.bytes).finish();
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        bytes
    }

    /// The parts of a file; `None` if it is not a sealed working set, or is damaged.
    /// [`WorkingSet::decode`] says what it is then.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (checked, sum) = bytes.split_last_chunk()?;
        let mut decoder = Decoder::new(checked);
        let magic: [u8; 8] = decoder.array("magic").ok()?;
        let version = decoder.u32("version").ok()?;
        decoder.u32("zero").ok()?;
        let salt = decoder.array("salt").ok()?;
        let seal = Seal { nonce: decoder.array("nonce").ok()?, tag: decoder.array("tag").ok()? };
        let is_one = (magic, version) == (MAGIC, SEALED_VERSION);
        let is_whole = u32::from_le_bytes(*sum) == checksum(checked);
        let bytes = checked[SEALED_HEAD..].to_vec();
        (is_one && is_whole).then_some(Self { salt, seal, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::error::Error;

    fn any_working_set() -> impl Strategy<Value = WorkingSet> {
        let run = (any::<u32>(), any::<u64>(), any::<u64>());
        let run = run.prop_map(|(block, first, count)| (block, PageRange::new(first, count)));
        (any::<ImageId>(), prop::collection::vec(run, 0..40))
            .prop_map(|(image, runs)| WorkingSet { image, runs })
    }

    /// A file that says it has `count` runs, with a checksum that is right.
    fn sealed(version: u32, count: u32, runs: &[u8]) -> Vec<u8> {
        let mut bytes = Encoder::new()
            .bytes(&MAGIC)
            .u32(version)
            .u32(count)
            .bytes(&[7; 16])
            .bytes(runs)
            .finish();
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_and_any_byte_that_is_changed_is_found(
            set in any_working_set(), at in any::<prop::sample::Index>(), change in 1u8..,
        ) {
            let mut bytes = set.encode();
            prop_assert_eq!(bytes.len(), HEAD + set.runs.len() * RUN + 4);
            prop_assert_eq!(WorkingSet::decode(&bytes), Ok(set));
            let at = at.index(bytes.len());
            prop_assert!(WorkingSet::decode(&bytes[..at]).is_err());
            bytes[at] ^= change;
            prop_assert!(WorkingSet::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_sealed_one_is_read_and_is_of_a_later_version_for_a_reader_without_a_key() {
        let seal = Seal { nonce: [1; 8], tag: [2; 16] };
        let set = SealedWorkingSet { salt: [3; 32], seal, bytes: vec![4; 100] };
        let bytes = set.encode();
        assert_eq!((bytes.len(), SealedWorkingSet::decode(&bytes)), (72 + 100 + 4, Some(set)));
        let error = WorkingSet::decode(&bytes).unwrap_err();
        assert_eq!(error.source().unwrap().to_string(), "version is 0x2, allowed: 1");
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(SealedWorkingSet::decode(&changed), None, "byte {at}");
            assert_eq!(SealedWorkingSet::decode(&bytes[..at]), None, "{at} bytes");
        }
        assert_eq!(SealedWorkingSet::decode(&WorkingSet::default().encode()), None);
    }

    #[test]
    fn more_runs_than_a_file_may_have_are_left_out() {
        let runs = (0..=MAX_RUNS as u64).map(|first| (0, PageRange::new(first, 1))).collect();
        let bytes = WorkingSet { image: [7; 16], runs }.encode();
        assert!(bytes.len() as u64 <= MAX_SIZE);
        let seal = Seal::NONE;
        let sealed = SealedWorkingSet { salt: [1; SALT_SIZE], seal, bytes: bytes.clone() };
        assert_eq!(sealed.encode().len() as u64, MAX_SIZE);
        assert_eq!(
            WorkingSet::decode(&bytes).unwrap().runs.last(),
            Some(&(0, PageRange::new(MAX_RUNS as u64 - 1, 1)))
        );
    }

    #[test]
    fn a_count_that_is_not_that_of_the_runs_is_refused_before_they_are_read() {
        let runs = [0; 2 * RUN];
        assert_eq!(WorkingSet::decode(&sealed(VERSION, 2, &runs)).unwrap().runs.len(), 2);
        let too_many = vec![0; (MAX_RUNS + 1) * RUN];
        for (count, runs) in [
            (0, &runs[..]),
            (1, &runs),
            (3, &runs),
            (u32::MAX, &runs),
            (2, &runs[1..]),
            (MAX_RUNS as u32, &[]),
            (MAX_RUNS as u32 + 1, &too_many),
        ] {
            let error = WorkingSet::decode(&sealed(VERSION, count, runs)).unwrap_err();
            let allowed = "at most 2^20, and as many as the file holds";
            assert_eq!(error.to_string(), "working set");
            assert_eq!(
                error.source().unwrap().to_string(),
                format!("runs is {count:#x}, allowed: {allowed}")
            );
        }
    }

    #[test]
    fn what_is_something_else_is_told_from_what_is_damaged_or_newer() {
        assert_eq!(WorkingSet::decode(b"PFimage\0"), Err(WorkingSetError::Magic));
        let field =
            |bytes: &[u8]| WorkingSet::decode(bytes).unwrap_err().source().unwrap().to_string();
        assert_eq!(field(b"PF"), "body ends in field magic: 8 bytes needed, 2 left");
        assert_eq!(
            field(&sealed(VERSION, 0, &[])[..HEAD]),
            "body ends in field checksum: 4 bytes needed, 0 left"
        );
        assert_eq!(field(&sealed(2, 0, &[])), "version is 0x2, allowed: 1");
        let mut bytes = sealed(VERSION, 0, &[]);
        let computed = checksum(&bytes[..HEAD]);
        bytes[HEAD] ^= 1;
        assert_eq!(
            WorkingSet::decode(&bytes),
            Err(WorkingSetError::Checksum { found: computed ^ 1, computed })
        );
    }
}
