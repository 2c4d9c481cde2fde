// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory on a tmpfs that hands out huge pages for small writes: a guest that arrives or is
//! restored there allocates only pages that the source had allocated.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use pageferry_client::{
    BlockRange, HugePages, IncomingOptions, Mode, OutgoingOptions, Phase, Placing, Punch,
    RestoreMode, RestoreOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::require;
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{MockSide, passes};
use pageferry_tests::tmpfs::{Tmpfs, hands_out_huge_pages};
use pageferry_tests::vmm::PATIENCE;
use std::sync::Arc;

/// Pages of a huge page.
const HUGE: u64 = 512;
const PAGES: u64 = 20 * HUGE;

/// A VMM with one block.
fn side(fd_offset: u64, backing: Backing) -> MockSide {
    let ram = BlockLayout { fd_offset, backing, ..BlockLayout::ram(PAGES * PAGE_SIZE) };
    MockSide::new(vec![ram])
}

/// A source in a memfd, which allocates page by page.
fn source() -> MockSide {
    let side = side(0, Backing::Memfd);
    let runs = [
        // One page of a huge page.
        PageRange::new(5, 1),
        // A huge page that is dense at its start only.
        PageRange::new(HUGE, 200),
        // A whole huge page, and one that is partly discarded.
        PageRange::new(2 * HUGE, 2 * HUGE),
        // Pages across the border of two huge pages.
        PageRange::new(6 * HUGE - 10, 90),
    ];
    for run in runs {
        side.block(0).fill(run, 3).unwrap();
    }
    // One page in each of the other huge pages.
    for huge_page in 8..PAGES / HUGE {
        side.block(0).fill(PageRange::new(huge_page * HUGE + huge_page, 1), 4).unwrap();
    }
    let discarded = PageRange::new(3 * HUGE + 100, 50);
    let range = BlockRange { block: 0, offset: discarded.offset(), length: discarded.bytes() };
    side.vmm.client().discard(&[range], Punch::Yes).unwrap();
    side.vmm.start().unwrap();
    side
}

/// A destination on a tmpfs that is mounted with `huge`. If `odd`, its block is not aligned to huge
/// pages. `None` if the kernel has no free huge pages now.
fn destination_on(tmpfs: Tmpfs, huge: &str, odd: bool) -> Option<MockSide> {
    let fd_offset = if odd { 3 * PAGE_SIZE } else { 0 };
    let options = format!("size=256M,huge={huge}");
    let file = tmpfs.file(&options, fd_offset + PAGES * PAGE_SIZE).unwrap();
    // Without huge pages the test would show nothing.
    require::met("huge-tmpfs", hands_out_huge_pages(&file).map_err(Into::into))?;
    Some(side(fd_offset, Backing::File(Arc::new(file))))
}

/// Checks that the destination holds the same as the source, and has allocated only pages that the
/// source has allocated.
#[track_caller]
fn assert_allocates_no_more(destination: &MockSide, source: &MockSide, what: &str) {
    for page in 0..PAGES {
        assert_eq!(
            destination.block(0).read_page(page).unwrap(),
            source.block(0).read_page(page).unwrap(),
            "{what}: page {page:#x}"
        );
    }
    let pages = |side: &MockSide| side.block(0).extents().unwrap();
    let there = pages(source);
    let surplus = |run: &PageRange| !there.iter().any(|have| have.intersection(run) == *run);
    let more: Vec<PageRange> = pages(destination).into_iter().filter(surplus).collect();
    assert!(more.is_empty(), "{what}: allocated only at the destination: {more:x?}");
}

/// The mount options with which a tmpfs hands out huge pages, with aligned and unaligned blocks.
fn ways() -> Vec<(Tmpfs, &'static str, bool)> {
    let Some(tmpfs) = require::huge_tmpfs() else { return Vec::new() };
    // Otherwise khugepaged would fill holes in the VMM's mappings at any moment. Writes still get
    // huge pages.
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
        let choices = [HugePages::Auto, HugePages::Never];
        let both = |options: &OutgoingOptions| choices.map(|choice| (options.clone(), choice));
        for (options, huge_pages) in options.iter().flat_map(both) {
            let what = format!(
                "{huge}, {odd}, {huge_pages:?}, {:?} with {} streams",
                options.mode, options.streams
            );
            let Some(to) = destination_on(tmpfs, huge, odd) else { continue };
            let from = source();
            let (incoming, address) =
                to.listen(&IncomingOptions { huge_pages, ..IncomingOptions::default() });
            let outgoing = from.vmm.start_outgoing(&address, &options).unwrap();
            for (side, job) in [(&from, outgoing), (&to, incoming)] {
                let status = side.vmm.wait_job(job, PATIENCE).unwrap();
                assert_eq!(status.phase, Phase::Completed, "{what}: {}", status.error_text());
            }
            assert_allocates_no_more(&to, &from, &what);
            let expected = match huge_pages {
                HugePages::Auto => Placing::HugePages,
                HugePages::Never => Placing::Pages,
            };
            assert_eq!(to.status().placing, expected, "{what}");
        }
    }
}

#[test]
fn a_restored_guest_takes_no_more_huge_pages_than_before() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let from = source();
    let status =
        from.vmm.wait_job(from.vmm.start_snapshot(&image, &paused()).unwrap(), PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    for (tmpfs, huge, odd) in ways() {
        let mut modes = vec![RestoreMode::Eager];
        if require::uffd() {
            modes.push(RestoreMode::Lazy);
        }
        for mode in modes {
            let what = format!("{huge}, {odd}, {mode:?}");
            let Some(to) = destination_on(tmpfs, huge, odd) else { continue };
            let options = RestoreOptions { mode, ..RestoreOptions::default() };
            let status =
                to.vmm.wait_job(to.vmm.start_restore(&image, &options).unwrap(), PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Completed, "{what}: {}", status.error_text());
            assert_allocates_no_more(&to, &from, &what);
        }
    }
}
