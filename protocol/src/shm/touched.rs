// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which words of a bitmap were ever set, so that a walk can skip the rest.
//!
//! A guest of 1 TiB has bitmaps of 32 MiB each. A sync with its fix-up walks several of them, some
//! while the guest is paused, and most guests are mostly empty. So:
//!
//! - private memory has a summary: one bit for each 4 KiB of words;
//! - shared memory is asked by its file: other processes that write there do not know the summary,
//!   but a page that was never written is a hole.
//!
//! Neither is ever cleared. A touched word *may* be set.

use super::bitmap::WORD_BITS;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a word.
const WORD: u64 = 8;
/// Words that one bit of a summary covers: a page of memory.
const SPAN: u64 = 512;
/// `f_type` of tmpfs and of memfds, from the kernel's `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Which words may have been set.
#[derive(Debug)]
pub(super) enum Touched {
    /// Any of them.
    Unknown,
    /// Those whose bit is set here.
    Summary(Box<[AtomicU64]>),
    /// Those that are not a hole of this file, in which the first word lies at this byte.
    File(OwnedFd, u64),
}

impl Touched {
    /// A summary for `words` words that are all zero.
    pub(super) fn summary(words: u64) -> Self {
        Self::Summary((0..words.div_ceil(SPAN * WORD_BITS)).map(|_| AtomicU64::new(0)).collect())
    }

    /// The words from byte `offset` of `file`, if the file can report its holes.
    pub(super) fn file(file: OwnedFd, offset: u64) -> Self {
        match rustix::fs::fstatfs(&file) {
            Ok(stat) if stat.f_type as u64 == TMPFS_MAGIC => Self::File(file, offset),
            _ => Self::Unknown,
        }
    }

    /// A bit in word `index` was set.
    #[inline]
    pub(super) fn set(&self, index: u64) {
        let Self::Summary(summary) = self else { return };
        let bit = index / SPAN;
        let (word, bit) = (&summary[(bit / WORD_BITS) as usize], 1 << (bit % WORD_BITS));
        // Nearly always set already. Then the cache line stays shared.
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Release);
        }
    }

    /// The first run of words in `span` that may have been set.
    pub(super) fn next(&self, span: Range<u64>) -> Option<Range<u64>> {
        match self {
            _ if span.is_empty() => None,
            Self::Unknown => Some(span),
            Self::Summary(summary) => {
                let spans = span.start / SPAN..span.end.div_ceil(SPAN);
                let first = find(summary, spans.clone(), |word| word)?;
                let last = find(summary, first + 1..spans.end, |word| !word).unwrap_or(spans.end);
                Some((first * SPAN).max(span.start)..(last * SPAN).min(span.end))
            }
            Self::File(file, offset) => extent(file, *offset, span),
        }
    }
}

/// The first bit in `range` that is set after `view` was applied to its word.
fn find(summary: &[AtomicU64], range: Range<u64>, view: impl Fn(u64) -> u64) -> Option<u64> {
    let mut at = range.start;
    while at < range.end {
        let word =
            view(summary[(at / WORD_BITS) as usize].load(Ordering::Acquire)) >> (at % WORD_BITS);
        if word != 0 {
            return Some(at + u64::from(word.trailing_zeros())).filter(|found| *found < range.end);
        }
        at = (at / WORD_BITS + 1) * WORD_BITS;
    }
    None
}

/// The first run of words in `span` that are not a hole; all of `span` if the file cannot tell, or
/// was truncated. The reader of the words then finds out.
fn extent(file: &OwnedFd, offset: u64, span: Range<u64>) -> Option<Range<u64>> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(offset + span.start * WORD)) {
        Ok(data) => (data - offset) / WORD,
        Err(Errno::NXIO) if holds(file, offset + span.end * WORD) => return None,
        Err(_) => return Some(span),
    };
    if data >= span.end {
        return None;
    }
    match rustix::fs::seek(file, SeekFrom::Hole(offset + data * WORD)) {
        Ok(hole) => Some(data..((hole - offset) / WORD).min(span.end)),
        Err(_) => Some(data..span.end),
    }
}

/// True if the file is as long as that.
fn holds(file: &OwnedFd, length: u64) -> bool {
    rustix::fs::fstat(file)
        .is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(|size| size >= length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    /// All runs of touched words in `span`.
    fn walk(touched: &Touched, span: Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = span.start;
        while let Some(run) = touched.next(at..span.end) {
            assert!(
                at <= run.start && run.start < run.end && run.end <= span.end,
                "{run:?} of {at}..{}",
                span.end
            );
            at = run.end;
            runs.push(run);
        }
        runs
    }

    #[test]
    fn a_file_that_tells_no_holes_is_walked_whole() {
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        let touched = Touched::file(file.into(), 0);
        assert_eq!(walk(&touched, 3..7000), vec![3..7000]);
    }

    #[test]
    fn words_that_were_cut_off_are_no_hole() {
        let fd = memfd_create("bitmap", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 10_000 * WORD).unwrap();
        let touched = Touched::file(fd.try_clone().unwrap(), 0);
        assert_eq!(touched.next(5000..10_000), None);
        ftruncate(&fd, 9_000 * WORD).unwrap();
        assert_eq!(touched.next(5000..10_000), Some(5000..10_000));
        assert_eq!(touched.next(5000..9_000), None);
    }

    proptest! {
        #[test]
        fn every_word_that_was_set_is_found_and_little_else(
            set in prop::collection::vec(0u64..100_000, 0..20), start in 0u64..100_000, length in 0u64..100_000, page in 0u64..3,
        ) {
            let summary = Touched::summary(100_000);
            let fd = memfd_create("bitmap", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, page * 4096 + 100_000 * WORD).unwrap();
            for word in &set {
                summary.set(*word);
                rustix::io::pwrite(&fd, &[1], page * 4096 + word * WORD).unwrap();
            }
            let span = start..(start + length).min(100_000);
            let file = Touched::file(fd, page * 4096);
            for touched in [&summary, &file] {
                let runs = walk(touched, span.clone());
                for word in set.iter().filter(|word| span.contains(word)) {
                    prop_assert!(runs.iter().any(|run| run.contains(word)), "{} is not in {:?}", word, runs);
                }
                let near = |word: u64| set.iter().any(|set| set / SPAN == word / SPAN);
                prop_assert!(runs.iter().all(|run| near(run.start) && near(run.end - 1)), "{:?}", runs);
            }
        }
    }
}
