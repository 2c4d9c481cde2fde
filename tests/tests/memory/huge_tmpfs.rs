// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory on a tmpfs that hands out huge pages for small writes: what arrives there, or is
//! restored, allocates nothing that the source had not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use pageferry_client::{
    BlockRange, IncomingOptions, Mode, OutgoingOptions, Phase, Punch, RestoreMode, RestoreOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{Backing, BlockLayout, TestBlock};
use pageferry_tests::require;
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{MockSide, passes};
use pageferry_tests::tmpfs::{Tmpfs, hands_out_huge_pages};
use pageferry_tests::vmm::PATIENCE;
use std::ops::Deref;
use std::sync::Arc;

/// Pages of a huge page.
const HUGE: u64 = 512;
const PAGES: u64 = 20 * HUGE;

/// A VMM with one block.
struct Side {
    mock: MockSide,
}

impl Deref for Side {
    type Target = MockSide;

    fn deref(&self) -> &MockSide {
        &self.mock
    }
}

impl Side {
    fn new(fd_offset: u64, backing: Backing) -> Self {
        let ram = BlockLayout { fd_offset, backing, ..BlockLayout::ram(PAGES * PAGE_SIZE) };
        Self { mock: MockSide::new(vec![ram]) }
    }

    /// In a memfd, which allocates page by page.
    fn source() -> Self {
        let side = Self::new(0, Backing::Memfd);
        let runs = [
            // One page of a huge page.
            PageRange::new(5, 1),
            // A huge page that begins densely, and is not.
            PageRange::new(HUGE, 200),
            // A whole one, and one that is discarded in part.
            PageRange::new(2 * HUGE, 2 * HUGE),
            // Across the border of two.
            PageRange::new(6 * HUGE - 10, 90),
        ];
        for run in runs {
            side.block().fill(run, 3).unwrap();
        }
        // One page of each of the rest.
        for huge_page in 8..PAGES / HUGE {
            side.block().fill(PageRange::new(huge_page * HUGE + huge_page, 1), 4).unwrap();
        }
        let discarded = PageRange::new(3 * HUGE + 100, 50);
        let range = BlockRange { block: 0, offset: discarded.offset(), length: discarded.bytes() };
        side.vmm.client().discard(&[range], Punch::Yes).unwrap();
        side.vmm.start().unwrap();
        side
    }

    /// On a tmpfs that is mounted with `huge`; not aligned to its huge pages if `odd`. `None` if
    /// the kernel has no huge pages to hand out now.
    fn on(tmpfs: Tmpfs, huge: &str, odd: bool) -> Option<Self> {
        let fd_offset = if odd { 3 * PAGE_SIZE } else { 0 };
        let options = format!("size=256M,huge={huge}");
        let file = tmpfs.file(&options, fd_offset + PAGES * PAGE_SIZE).unwrap();
        // Else there is nothing to be seen.
        require::met("huge-tmpfs", hands_out_huge_pages(&file).map_err(Into::into))?;
        Some(Self::new(fd_offset, Backing::File(Arc::new(file))))
    }

    fn block(&self) -> &TestBlock {
        self.vmm.memory().block(0).unwrap()
    }

    /// It holds what the other does, and has allocated nothing that the other has not.
    #[track_caller]
    fn assert_no_more_than(&self, source: &Side, what: &str) {
        for page in 0..PAGES {
            assert_eq!(
                self.block().read_page(page).unwrap(),
                source.block().read_page(page).unwrap(),
                "{what}: page {page:#x}"
            );
        }
        let pages = |side: &Side| side.block().extents().unwrap();
        let there = pages(source);
        let surplus = |run: &PageRange| !there.iter().any(|have| have.intersection(run) == *run);
        let more: Vec<PageRange> = pages(self).into_iter().filter(surplus).collect();
        assert!(more.is_empty(), "{what}: allocated here alone: {more:x?}");
    }
}

/// The ways of a tmpfs to hand out huge pages, aligned and not.
fn ways() -> Vec<(Tmpfs, &'static str, bool)> {
    let Some(tmpfs) = require::huge_tmpfs() else { return Vec::new() };
    // Or khugepaged would fill holes of what the VMM has mapped, at any moment. What is written is
    // given huge pages all the same.
    rustix::thread::disable_transparent_huge_pages(true).unwrap();
    vec![(tmpfs, "always", false), (tmpfs, "within_size", false), (tmpfs, "always", true)]
}

#[test]
fn a_guest_that_arrives_takes_no_more_than_before() {
    for (tmpfs, huge, odd) in ways() {
        let precopy = passes(2);
        let mut options = vec![precopy.clone(), OutgoingOptions { streams: 3, ..precopy.clone() }];
        if require::uffd() {
            options.push(OutgoingOptions {
                mode: Mode::Hybrid,
                switch_after: 1,
                ..precopy.clone()
            });
            options.push(OutgoingOptions { mode: Mode::Postcopy, ..precopy });
        }
        for options in options {
            let what =
                format!("{huge}, {odd}, {:?} with {} streams", options.mode, options.streams);
            let Some(to) = Side::on(tmpfs, huge, odd) else { continue };
            let from = Side::source();
            let (incoming, address) = to.listen(&IncomingOptions::default());
            let outgoing = from.vmm.start_outgoing(&address, &options).unwrap();
            for (side, job) in [(&from, outgoing), (&to, incoming)] {
                let status = side.vmm.wait_job(job, PATIENCE).unwrap();
                assert_eq!(status.phase, Phase::Completed, "{what}: {}", status.error);
            }
            to.assert_no_more_than(&from, &what);
        }
    }
}

#[test]
fn a_restored_guest_takes_no_more_huge_pages_than_before() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let from = Side::source();
    let status =
        from.vmm.wait_job(from.vmm.start_snapshot(&image, &paused()).unwrap(), PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    for (tmpfs, huge, odd) in ways() {
        let mut modes = vec![RestoreMode::Eager];
        if require::uffd() {
            modes.push(RestoreMode::Lazy);
        }
        for mode in modes {
            let what = format!("{huge}, {odd}, {mode:?}");
            let Some(to) = Side::on(tmpfs, huge, odd) else { continue };
            let options = RestoreOptions { mode, ..RestoreOptions::default() };
            let status =
                to.vmm.wait_job(to.vmm.start_restore(&image, &options).unwrap(), PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Completed, "{what}: {}", status.error);
            to.assert_no_more_than(&from, &what);
        }
    }
}
