// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decompression of the pages of one stream.
//!
//! The output is bounded by the page count of the record, whatever the payload claims. The header
//! was checked before, so the count is at most [`MAX_DATA_PAGES`]. The decompressor writes into a
//! buffer that is exactly as large as the pages, and a payload that holds more is an error.

use super::error::{DecompressError, IncomingError};
use crate::job::JobError;
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::RecordHeader;
use pageferry_protocol::stream::hello::{FEATURE_LZ4, FEATURE_ZSTD};
use pageferry_protocol::stream::record::{FLAG_LZ4, FLAG_ZSTD, MAX_DATA_PAGES};
use std::fmt;

/// Decompresses the records of one stream.
#[derive(Default)]
pub struct Decompressor {
    /// The features that were negotiated.
    features: u64,
    /// Allocated by the first compressed record, and grown by larger ones.
    buffer: Vec<u8>,
    /// Created by the first record that is compressed with Zstandard.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// A decompressor for a stream on which `features` were negotiated. It allocates nothing before
    /// the first compressed record.
    pub fn new(features: u64) -> Self {
        Self { features, ..Self::default() }
    }

    /// Decompresses the payload of a record. The header was checked, and has one of the flags for
    /// compression.
    ///
    /// # Errors
    /// If the compression was not negotiated, or the payload does not hold exactly these pages.
    pub fn unpack(&mut self, header: &RecordHeader, payload: &[u8]) -> Result<&[u8], JobError> {
        let range = header.range();
        let failed = |source| IncomingError::Decompress {
            id: header.block(),
            first: range.first,
            count: range.count,
            source,
        };
        let (flag, feature, method) = if header.flags() & FLAG_LZ4 != 0 {
            (FLAG_LZ4, FEATURE_LZ4, "lz4")
        } else {
            (FLAG_ZSTD, FEATURE_ZSTD, "zstd")
        };
        if self.features & feature == 0 {
            return Err(failed(DecompressError::NotNegotiated { flag, method }).into());
        }
        debug_assert!((1..=MAX_DATA_PAGES).contains(&range.count));
        let expected = (range.count * PAGE_SIZE) as usize;
        if self.buffer.len() < expected {
            self.buffer.resize(expected, 0);
        }
        let length = payload.len();
        let broken =
            |reason: String| failed(DecompressError::Broken { method, length, expected, reason });
        let pages = &mut self.buffer[..expected];
        let found = if flag == FLAG_LZ4 {
            lz4_flex::block::decompress_into(payload, pages)
                .map_err(|error| broken(error.to_string()))?
        } else {
            let context = match &mut self.zstd {
                Some(context) => context,
                none => none.insert(zstd::bulk::Decompressor::new().map_err(|source| {
                    JobError::Io { what: "create a zstd decompressor", source }
                })?),
            };
            context
                .decompress_to_buffer(payload, pages)
                .map_err(|error| broken(error.to_string()))?
        };
        if found != expected {
            return Err(failed(DecompressError::Short { method, length, found, expected }).into());
        }
        Ok(pages)
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Decompressor")
            .field("features", &self.features)
            .field("buffer", &self.buffer.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::memory::PageRange;
    use pageferry_protocol::stream::Kind;
    use pageferry_protocol::stream::hello::FEATURES;
    use proptest::prelude::*;

    fn header(flag: u16, count: u64, payload: &[u8]) -> RecordHeader {
        RecordHeader::new(Kind::Data, flag, 3, PageRange::new(9, count), payload.len())
    }

    fn pack(flag: u16, bytes: &[u8]) -> Vec<u8> {
        if flag == FLAG_LZ4 {
            lz4_flex::block::compress(bytes)
        } else {
            zstd::bulk::compress(bytes, 1).unwrap()
        }
    }

    #[track_caller]
    fn refused(flag: u16, count: u64, payload: &[u8]) -> String {
        let mut decompressor = Decompressor::new(FEATURES);
        let error = decompressor.unpack(&header(flag, count, payload), payload).unwrap_err();
        assert!(decompressor.buffer.len() as u64 <= count * PAGE_SIZE);
        crate::error::chain(&error)
    }

    #[test]
    fn too_long_too_short_and_malformed_payloads_are_refused() {
        for (flag, method) in [(FLAG_LZ4, "lz4"), (FLAG_ZSTD, "zstd")] {
            let short = refused(flag, 2, &pack(flag, &[7; 8191]));
            assert!(short.contains("pages 0x9 + 0x2 of block 3"), "{short}");
            assert!(
                short.contains(&format!("of {method} hold 0x1fff bytes, expected 0x2000")),
                "{short}"
            );
            // The last one is 64 MiB in few bytes.
            for much in [4097, 8192, 64 << 20] {
                let bomb = refused(flag, 1, &pack(flag, &vec![7; much]));
                assert!(
                    bomb.contains(&format!("of {method} cannot be decompressed to 0x1000 bytes")),
                    "{bomb}"
                );
            }
            let garbage = refused(flag, 2, &[0xff; 100]);
            assert!(garbage.contains("0x64 bytes of"), "{garbage}");
            let cut = pack(flag, &[7; 8192]);
            refused(flag, 2, &cut[..cut.len() - 1]);
        }
    }

    #[test]
    fn compression_that_was_not_negotiated_is_refused() {
        for (flag, features, words) in [
            (FLAG_LZ4, FEATURE_ZSTD, "flag 0x2, lz4, was not negotiated"),
            (FLAG_ZSTD, FEATURE_LZ4, "flag 0x4, zstd, was not negotiated"),
            (FLAG_LZ4, 0, "flag 0x2, lz4"),
        ] {
            let payload = pack(flag, &[7; 4096]);
            let mut decompressor = Decompressor::new(features);
            let error = decompressor.unpack(&header(flag, 1, &payload), &payload).unwrap_err();
            assert!(crate::error::chain(&error).contains(words), "{}", crate::error::chain(&error));
            assert!(decompressor.buffer.is_empty());
        }
    }

    #[test]
    fn a_good_record_after_a_broken_one_is_right() {
        let mut decompressor = Decompressor::new(FEATURES);
        for flag in [FLAG_LZ4, FLAG_ZSTD] {
            let good = pack(flag, &[5; 12288]);
            assert!(decompressor.unpack(&header(flag, 3, &good[..9]), &good[..9]).is_err());
            assert!(decompressor.unpack(&header(flag, 3, &good), &good).unwrap() == [5; 12288]);
        }
    }

    proptest! {
        #[test]
        fn no_payload_causes_a_panic(
            payload in prop::collection::vec(any::<u8>(), 1..300), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let mut decompressor = Decompressor::new(FEATURES);
            for flag in [FLAG_LZ4, FLAG_ZSTD] {
                let _ = decompressor.unpack(&header(flag, 1, &payload), &payload);
                // A valid payload with one wrong byte.
                let mut close = pack(flag, &payload.repeat(4096 / payload.len() + 1)[..4096]);
                let at = at.index(close.len());
                close[at] = byte;
                if let Ok(pages) = decompressor.unpack(&header(flag, 1, &close), &close) {
                    prop_assert_eq!(pages.len(), 4096);
                }
            }
        }
    }
}
