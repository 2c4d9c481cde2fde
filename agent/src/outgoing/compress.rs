// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compression of the pages that one worker sends.
//!
//! Each run of pages is compressed by itself, so that the destination can place it without any
//! other run. A run that does not shrink by at least one part in `WORTH` is sent uncompressed, so
//! that the destination need not spend time on it.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use pageferry_protocol::control::job::Compression;
use pageferry_protocol::stream::record::{FLAG_LZ4, FLAG_ZSTD};
use std::fmt;
use std::ops::Range;

/// A run is sent compressed if that saves at least one part in this many.
const WORTH: usize = 16;

/// Compresses runs of pages one after another into its own buffer. The buffer and the contexts of
/// the compressors are reused.
pub struct Compressor {
    method: Method,
    output: Vec<u8>,
    filled: usize,
}

enum Method {
    Lz4(CompressTable),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// A compressor, or `None` if no compression is wanted.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(compression: Compression) -> std::io::Result<Option<Self>> {
        let method = match compression {
            Compression::None => return Ok(None),
            Compression::Lz4 => Method::Lz4(CompressTable::large()),
            Compression::Zstd(level) => Method::Zstd(zstd::bulk::Compressor::new(level.into())?),
        };
        Ok(Some(Self { method, output: Vec::new(), filled: 0 }))
    }

    /// Forgets the runs that were added. The runs of the next batch have at most `bytes` in total.
    pub fn begin(&mut self, bytes: usize) {
        // The runs before the last take at most `bytes`. The last one is compressed behind them,
        // and may need more room than its own length.
        let needed =
            bytes + get_maximum_output_size(bytes).max(zstd::zstd_safe::compress_bound(bytes));
        if self.output.len() < needed {
            self.output.resize(needed, 0);
        }
        self.filled = 0;
    }

    /// Adds a run of pages. Returns where in [`Self::output`] its payload lies, and the flag that
    /// the record needs.
    pub fn add(&mut self, pages: &[u8]) -> (Range<usize>, u16) {
        let start = self.filled;
        let room = &mut self.output[start..];
        let (compressed, flag) = match &mut self.method {
            Method::Lz4(table) => (compress_into_with_table(pages, room, table).ok(), FLAG_LZ4),
            Method::Zstd(context) => (context.compress_to_buffer(pages, room).ok(), FLAG_ZSTD),
        };
        // If the compressor fails, the run is sent uncompressed. That costs bytes, and never the
        // migration.
        let (length, flag) = match compressed {
            Some(length) if length <= pages.len() - pages.len() / WORTH => (length, flag),
            _ => {
                room[..pages.len()].copy_from_slice(pages);
                (pages.len(), 0)
            }
        };
        self.filled = start + length;
        (start..self.filled, flag)
    }

    /// The payloads of all runs, one after another.
    pub fn output(&self) -> &[u8] {
        &self.output[..self.filled]
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = if matches!(self.method, Method::Lz4(_)) { "lz4" } else { "zstd" };
        formatter
            .debug_struct("Compressor")
            .field("method", &method)
            .field("filled", &self.filled)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::incoming::decompress::Decompressor;
    use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
    use pageferry_protocol::stream::hello::FEATURES;
    use pageferry_protocol::stream::{Kind, RecordHeader};

    const PAGE: usize = PAGE_SIZE as usize;

    fn text(pages: usize) -> Vec<u8> {
        let words = (0..).map(|number: u64| format!("page {} word {number}, ", number / 7));
        words.flat_map(String::into_bytes).take(pages * PAGE).collect()
    }

    /// Bytes that do not compress.
    fn noise(pages: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..pages * PAGE).map(|_| next()).collect()
    }

    #[test]
    fn a_run_that_does_not_shrink_is_sent_as_it_is() {
        let runs = [text(1), noise(3), text(50), vec![7; 8 * PAGE], noise(1), vec![0; PAGE]];
        for compression in
            [Compression::Lz4, Compression::Zstd(1), Compression::Zstd(Compression::MAX_LEVEL)]
        {
            let mut compressor = Compressor::new(compression).unwrap().unwrap();
            let mut decompressor = Decompressor::new(FEATURES);
            for round in 0..3 {
                compressor.begin(runs.iter().map(Vec::len).sum());
                let added: Vec<_> = runs.iter().map(|run| compressor.add(run)).collect();
                assert_eq!(
                    compressor.output().len(),
                    added.iter().map(|(bytes, _)| bytes.len()).sum::<usize>()
                );
                for (run, (bytes, flag)) in runs.iter().zip(added) {
                    let payload = &compressor.output()[bytes];
                    let range = PageRange::new(round, (run.len() / PAGE) as u64);
                    let header = RecordHeader::new(Kind::Data, flag, 3, range, payload.len());
                    assert_eq!(header.check(), Ok(Kind::Data), "{compression:?}");
                    if flag == 0 {
                        assert!(
                            payload == run && run[..] == noise(run.len() / PAGE)[..],
                            "{compression:?}"
                        );
                    } else {
                        assert!(payload.len() <= run.len() - run.len() / WORTH);
                        assert!(
                            decompressor.unpack(&header, payload).unwrap() == run,
                            "{compression:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn no_compression_needs_no_compressor() {
        assert!(Compressor::new(Compression::None).unwrap().is_none());
    }
}
