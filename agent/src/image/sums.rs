// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checksums or seals of the pages of a new image, collected and written in large pieces.
//!
//! Below, a seal counts as a checksum. The writers of pages add the checksums here. When many have
//! been collected, or at the end, they are written to the file.
//!
//! Writing them with each run of pages, one kilobyte for each megabyte, would cost far more than
//! their size. Large runs of pages are written with direct I/O, checksums through the page cache. A
//! write through the page cache locks the file: it waits for the direct writes in flight, and later
//! writes wait for it. Two threads that write pages would take turns.
//!
//! The collected bytes are bounded by `MOST_PAGES` and `MOST_RUNS`.

use super::bytes::write_at;
use super::error::ImageFault;
use crate::lock::lock;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

/// Most pages whose checksums are collected: 256 MiB. That is 256 KiB of checksums, or 1.5 MiB of
/// seals.
const MOST_PAGES: usize = 64 << 10;
/// Most runs that are collected. For scattered pages, the list of runs is larger than the
/// checksums.
const MOST_RUNS: usize = 8192;

/// Checksums that are not written to the file yet.
#[derive(Debug)]
pub struct PageSums {
    collected: Mutex<Runs>,
    /// Most bytes that are collected.
    most: usize,
}

/// Checksums that were collected, in runs.
#[derive(Debug, Default)]
pub struct Runs {
    /// Each run of bytes, by its offset in the file.
    runs: BTreeMap<u64, Vec<u8>>,
    /// Bytes of all runs.
    bytes: usize,
}

impl PageSums {
    /// For checksums of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { collected: Mutex::default(), most: MOST_PAGES * size as usize }
    }

    /// Adds bytes that belong at offset `place` of the file. Returns everything if a limit is
    /// reached: the caller must write it.
    pub fn add(&self, place: u64, bytes: &[u8]) -> Option<Runs> {
        let mut collected = lock(&self.collected);
        collected.bytes += bytes.len();
        let before = collected.runs.range_mut(..place).next_back();
        match before.filter(|(start, run)| **start + run.len() as u64 == place) {
            Some((_, run)) => run.extend_from_slice(bytes),
            None => drop(collected.runs.insert(place, bytes.to_vec())),
        }
        if collected.bytes < self.most && collected.runs.len() < MOST_RUNS {
            return None;
        }
        // Other threads can add checksums during the write.
        Some(std::mem::take(&mut *collected))
    }

    /// Writes all collected checksums.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn flush(&self, file: BorrowedFd<'_>) -> Result<(), ImageFault> {
        std::mem::take(&mut *lock(&self.collected)).write(file)
    }
}

impl Runs {
    /// Writes the runs in order, and runs that touch each other with one write.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(self, file: BorrowedFd<'_>) -> Result<(), ImageFault> {
        let mut joined: (u64, Vec<u8>) = Default::default();
        for (place, mut bytes) in self.runs {
            if joined.0 + joined.1.len() as u64 == place {
                joined.1.append(&mut bytes);
            } else {
                write_at(file, &joined.1, joined.0)?;
                joined = (place, bytes);
            }
        }
        write_at(file, &joined.1, joined.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    proptest! {
        #[test]
        fn all_added_checksums_are_in_the_file_after_a_flush(order in Just((0u32..2000).collect::<Vec<_>>()).prop_shuffle(), at_once in 1usize..40) {
            let file = tempfile::tempfile().unwrap();
            let sums = PageSums::new(4);
            let mut expected = vec![0; 8000 + 40 * 4];
            // The runs do not overlap, and are not in order.
            for (index, place) in order.iter().enumerate().step_by(at_once) {
                let (place, bytes) = (u64::from(*place) * 4, (index as u32 + 1).to_le_bytes());
                if let Some(full) = sums.add(place, &bytes) {
                    full.write(file.as_fd()).unwrap();
                }
                expected[place as usize..place as usize + 4].copy_from_slice(&bytes);
            }
            sums.flush(file.as_fd()).unwrap();
            file.set_len(expected.len() as u64).unwrap();
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn checksums_must_be_written_at_the_limit() {
        let file = tempfile::tempfile().unwrap();
        let sums = PageSums::new(4);
        let part = vec![7; MOST_PAGES];
        for index in 0..3 {
            assert!(sums.add(index * part.len() as u64, &part).is_none());
        }
        let full = sums.add(3 * part.len() as u64, &part).unwrap();
        full.write(file.as_fd()).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4 * MOST_PAGES as u64);
    }
}
