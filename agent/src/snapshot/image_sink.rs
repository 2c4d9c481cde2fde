// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An image takes what copy-before-write captures.

use crate::image::ImageWriter;
use crate::memory::copy_before_write::{BATCH, Run, Sink, SinkError};

impl Sink for ImageWriter {
    fn put(&self, runs: Vec<Run<'_>>) -> Result<u64, SinkError> {
        Ok(self.put_runs(runs.into_iter().map(|run| (run.at, run.pages, run.bytes)))?)
    }

    fn batch(&self) -> usize {
        // With direct I/O, the disk has only the writes that the workers have under way, so they
        // are larger.
        if self.is_direct() { 2 * BATCH } else { BATCH }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test_support::table;

    #[test]
    fn image_with_direct_io_gets_larger_batches() {
        let folder = tempfile::tempdir().unwrap();
        for cached in [false, true] {
            let path = folder.path().join(format!("{cached}"));
            let writer = ImageWriter::create(&path, &table(&[8]), false, cached).unwrap();
            assert!(!(cached && writer.is_direct()));
            // Not every file system supports direct I/O.
            let expected = if writer.is_direct() { 2 << 20 } else { 1 << 20 };
            assert_eq!(writer.batch(), expected, "cached: {cached}");
        }
    }
}
