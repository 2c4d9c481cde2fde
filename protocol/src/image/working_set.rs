//! The file beside an image that remembers which pages a restored guest touched, and in which order.
//!
//! Its magic, `PFwkset` and a zero byte (8 bytes); version, 1 (4); the number of runs (4); the id of the image (16); the runs, each a block (4), zero (4), its first page (8) and
//! their number (8), in the order of the first touch; the CRC-32C of all before it (4).

use super::{ImageId, checksum};
use crate::control::codec::{DecodeError, Decoder, Encoder};
use crate::memory::PageRange;

/// What the file begins with.
pub const MAGIC: [u8; 8] = *b"PFwkset\0";
/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Most runs: 24 MiB of file.
pub const MAX_RUNS: usize = 1 << 20;
/// Bytes before the runs.
const HEAD: usize = 32;
/// Bytes of a run.
const RUN: usize = 24;
/// Most bytes of the file.
pub const MAX_SIZE: u64 = (HEAD + MAX_RUNS * RUN + 4) as u64;

/// Which pages were touched first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet {
    /// The image.
    pub image: ImageId,
    /// The id of a block and pages of it, in the order of the first touch.
    pub runs: Vec<(u32, PageRange)>,
}

/// Why a file is not a working set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkingSetError {
    /// It is something else.
    #[error("the file is not a working set of pageferry")]
    Magic,
    /// It is damaged.
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
        let head = Encoder::new().bytes(&MAGIC).u32(VERSION).u32(runs.len() as u32).bytes(&self.image);
        let run = |encoder: Encoder, (block, range): &(u32, PageRange)| {
            encoder.u32(*block).u32(0).u64(range.first).u64(range.count)
        };
        let mut bytes = runs.iter().fold(head, run).finish();
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        bytes
    }

    /// The working set in these bytes. Whether its runs lie in the blocks is not known here.
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
            return Err(DecodeError::Value { field: "version", value: version.into(), allowed: "1" }.into());
        }
        let count = decoder.u32("runs")?;
        let image = decoder.array("image")?;
        if count as usize > MAX_RUNS || count as usize * RUN != decoder.left().saturating_sub(4) {
            let allowed = "at most 2^20, and as many as the file holds";
            return Err(DecodeError::Value { field: "runs", value: count.into(), allowed }.into());
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
