// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Assembly of host pages that are larger than a page: they are placed when they are complete.
//!
//! The source sends all pages of a host page on one stream, in any order, and nothing else between
//! them. So each stream assembles one host page at a time.

use crate::incoming::IncomingError;
use crate::job::JobError;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::shm::bitmap::WORD_BITS;
use std::fmt;

/// The host page that is being received on one stream.
#[derive(Default)]
pub struct Assembly {
    /// Index of its block, and its own index in the block.
    open: Option<(usize, u64)>,
    /// One bit for each page that has been received.
    here: Vec<u64>,
    count: u64,
    /// True if one of the pages came with content.
    content: bool,
    bytes: Vec<u8>,
}

/// A complete host page.
#[derive(Debug, PartialEq, Eq)]
pub enum CompleteHostPage<'a> {
    /// Host pages that are all zero.
    Zeroes(PageRange),
    /// The index of a host page, and its content.
    Content(u64, &'a [u8]),
}

impl Assembly {
    /// Adds the pages `range` of a block whose host pages have `unit` pages each. The pages are
    /// zero if there is no `content`. Calls `complete` for each host page that becomes complete.
    ///
    /// # Errors
    /// If a page comes twice, or belongs to another host page than the open one. Also the errors of
    /// `complete`.
    pub fn add(
        &mut self, (at, id): (usize, u32), unit: u64, range: PageRange, content: Option<&[u8]>,
        mut complete: impl FnMut(CompleteHostPage<'_>) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let mut rest = range;
        while !rest.is_empty() {
            let host_page = rest.first / unit;
            if content.is_none()
                && self.open.is_none()
                && rest.first.is_multiple_of(unit)
                && rest.count >= unit
            {
                let zeroes = PageRange::new(host_page, rest.count / unit);
                complete(CompleteHostPage::Zeroes(zeroes))?;
                rest = PageRange::new(zeroes.end() * unit, rest.count % unit);
                continue;
            }
            let part = rest.intersection(&PageRange::new(host_page * unit, unit));
            let torn = |open| IncomingError::HostPageInterrupted {
                id,
                first: part.first,
                count: part.count,
                open,
            };
            match self.open {
                None => self.start(at, host_page, unit),
                Some(open) if open == (at, host_page) => {}
                Some((_, open)) => return Err(torn(open).into()),
            }
            let first = part.first - host_page * unit;
            if !self.mark(first, part.count) {
                return Err(torn(host_page).into());
            }
            let start = (part.first - range.first) * PAGE_SIZE;
            let target = &mut self.bytes[(first * PAGE_SIZE) as usize..][..part.bytes() as usize];
            match content {
                Some(content) => {
                    target.copy_from_slice(&content[start as usize..][..part.bytes() as usize])
                }
                None => target.fill(0),
            }
            self.content |= content.is_some();
            if self.count == unit {
                self.open = None;
                let bytes = &self.bytes[..(unit * PAGE_SIZE) as usize];
                complete(if self.content {
                    CompleteHostPage::Content(host_page, bytes)
                } else {
                    CompleteHostPage::Zeroes(PageRange::new(host_page, 1))
                })?;
            }
            rest = PageRange::new(part.end(), rest.end() - part.end());
        }
        Ok(())
    }

    fn start(&mut self, at: usize, host_page: u64, unit: u64) {
        self.open = Some((at, host_page));
        self.here.clear();
        self.here.resize(unit.div_ceil(WORD_BITS) as usize, 0);
        self.count = 0;
        self.content = false;
        let bytes = (unit * PAGE_SIZE) as usize;
        if self.bytes.len() < bytes {
            self.bytes.resize(bytes, 0);
        }
    }

    /// Marks pages as received. Returns false if one of them was received before.
    fn mark(&mut self, first: u64, count: u64) -> bool {
        for page in first..first + count {
            let (word, bit) =
                (&mut self.here[(page / WORD_BITS) as usize], 1 << (page % WORD_BITS));
            if *word & bit != 0 {
                return false;
            }
            *word |= bit;
        }
        self.count += count;
        true
    }

    /// The host page that is not complete yet.
    pub fn open(&self) -> Option<(usize, u64)> {
        self.open
    }
}

impl fmt::Debug for Assembly {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Assembly")
            .field("open", &self.open)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNIT: u64 = 128;

    /// Adds runs of pages and returns the complete host pages. `Some(byte)` fills a run with bytes.
    fn add(
        assembly: &mut Assembly, runs: &[(u64, u64, Option<u8>)],
    ) -> Result<Vec<(u64, Vec<u8>)>, JobError> {
        let mut found = Vec::new();
        for (first, count, byte) in runs {
            let content = byte.map(|byte| vec![byte; (count * PAGE_SIZE) as usize]);
            assembly.add(
                (0, 7),
                UNIT,
                PageRange::new(*first, *count),
                content.as_deref(),
                |host_page| {
                    match host_page {
                        CompleteHostPage::Zeroes(range) => (range.first..range.end())
                            .for_each(|page| found.push((page, Vec::new()))),
                        CompleteHostPage::Content(page, bytes) => {
                            found.push((page, bytes.to_vec()))
                        }
                    }
                    Ok(())
                },
            )?;
        }
        Ok(found)
    }

    #[test]
    fn pieces_in_any_order_make_a_host_page() {
        let mut assembly = Assembly::default();
        assert!(
            add(&mut assembly, &[(UNIT + 100, 28, Some(3)), (UNIT, 50, None)]).unwrap().is_empty()
        );
        assert_eq!(assembly.open(), Some((0, 1)));
        let found = add(&mut assembly, &[(UNIT + 50, 50, Some(4))]).unwrap();
        let mut expected = vec![0; 50 * 4096];
        expected.extend(vec![4; 50 * 4096]);
        expected.extend(vec![3; 28 * 4096]);
        assert!(found == [(1, expected)]);
        assert_eq!(assembly.open(), None);
    }

    #[test]
    fn zeroes_over_several_host_pages_complete_them() {
        let mut assembly = Assembly::default();
        let found =
            add(&mut assembly, &[(0, 3 * UNIT + 5, None), (3 * UNIT + 5, UNIT - 5, None)]).unwrap();
        assert_eq!(found, (0..4).map(|page| (page, Vec::new())).collect::<Vec<_>>());
    }

    #[test]
    fn a_second_host_page_and_a_repeated_page_are_refused() {
        let error =
            add(&mut Assembly::default(), &[(0, 5, Some(1)), (UNIT, 1, Some(1))]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "record for pages 0x80 + 0x1 of block 7 before host page 0x0 was whole"
        );
        assert!(add(&mut Assembly::default(), &[(0, 5, Some(1)), (4, 1, None)]).is_err());
    }

    proptest! {
        #[test]
        fn host_pages_have_the_bytes_that_came_however_they_were_cut(
            cuts in prop::collection::btree_set(1u64..2 * UNIT, 0..20), zero in any::<u64>(),
        ) {
            let mut ends: Vec<u64> = cuts.into_iter().collect();
            ends.push(2 * UNIT);
            let mut runs = Vec::new();
            let mut first = 0;
            for (index, end) in ends.into_iter().enumerate() {
                let byte = (zero >> (index % 64) & 1 == 0).then_some(index as u8 + 1);
                runs.push((first, end - first, byte));
                first = end;
            }
            let found = add(&mut Assembly::default(), &runs).unwrap();
            prop_assert_eq!(found.iter().map(|(page, _)| *page).collect::<Vec<_>>(), vec![0, 1]);
            for (first, count, byte) in runs {
                for page in first..first + count {
                    let (_, bytes) = &found[(page / UNIT) as usize];
                    let at = (page % UNIT * PAGE_SIZE) as usize;
                    let value = bytes.get(at).copied().unwrap_or(0);
                    prop_assert_eq!(value, byte.unwrap_or(0));
                }
            }
        }
    }
}
