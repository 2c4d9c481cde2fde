//! Checksums of pages, on their way into a new image.
//!
//! They gather here and are written many at once. To write them with their pages, a kilobyte for
//! each megabyte, is dear out of proportion: a write through the page cache has the file for
//! itself, so it waits for all that goes past it, and what comes next waits for it. Two threads
//! would write pages by turns.

use super::Fault;
use super::bytes::write_at;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

/// Bytes that are held back: the checksums of 256 MiB.
const MOST_BYTES: usize = 256 << 10;
/// Runs that are held back: those of pages here and there take more room than their checksums.
const MOST_RUNS: usize = 8192;

/// Checksums that are not in the file yet.
#[derive(Debug, Default)]
pub struct PageSums(Mutex<Runs>);

#[derive(Debug, Default)]
struct Runs {
    /// Bytes by their places in the file.
    runs: BTreeMap<u64, Vec<u8>>,
    bytes: usize,
}

impl PageSums {
    /// Takes bytes that are to be at `place` of `file`. Writes what has gathered if that is much.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&self, file: BorrowedFd<'_>, place: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut gathered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gathered.bytes += bytes.len();
        let before = gathered.runs.range_mut(..place).next_back();
        match before.filter(|(start, run)| **start + run.len() as u64 == place) {
            Some((_, run)) => run.extend_from_slice(bytes),
            None => drop(gathered.runs.insert(place, bytes.to_vec())),
        }
        if gathered.bytes < MOST_BYTES && gathered.runs.len() < MOST_RUNS {
            return Ok(());
        }
        let much = std::mem::take(&mut *gathered);
        drop(gathered);
        much.write(file)
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// As for [`PageSums::add`].
    pub fn flush(&self, file: BorrowedFd<'_>) -> Result<(), Fault> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).write(file)
    }
}

impl Runs {
    fn write(self, file: BorrowedFd<'_>) -> Result<(), Fault> {
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
        fn what_was_added_is_in_the_file_after_a_flush(order in Just((0u32..2000).collect::<Vec<_>>()).prop_shuffle(), at_once in 1usize..40) {
            let file = tempfile::tempfile().unwrap();
            let sums = PageSums::default();
            let mut expected = vec![0; 8000 + 40 * 4];
            // Runs that neither overlap nor are in order.
            for (index, place) in order.iter().enumerate().step_by(at_once) {
                let (place, bytes) = (u64::from(*place) * 4, (index as u32 + 1).to_le_bytes());
                sums.add(file.as_fd(), place, &bytes).unwrap();
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
    fn much_is_written_before_the_flush() {
        let file = tempfile::tempfile().unwrap();
        let sums = PageSums::default();
        let part = vec![7; MOST_BYTES / 4];
        for index in 0..4 {
            assert_eq!(file.metadata().unwrap().len(), 0);
            sums.add(file.as_fd(), index * part.len() as u64, &part).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), MOST_BYTES as u64);
    }
}
