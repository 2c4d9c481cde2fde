// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that come in pages of 2 MiB: what the source has not, or gives back meanwhile, is not
//! allocated at the destination, and the rest is the same.

use pageferry_client::{
    BlockRange, Compression, IncomingOptions, OutgoingOptions, Parameters, Phase, Punch,
    RestoreOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::random::Random;
use pageferry_tests::scenario::image_guest::eager;
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{MockSide, passes};
use pageferry_tests::vmm::PATIENCE;
use std::sync::Arc;

/// Pages of a large page.
const LARGE: u64 = 512;
const PIECES: u64 = 8;
/// The last pages are no large page.
const PAGES: u64 = PIECES * LARGE + 37;

fn side(fd_offset: u64) -> MockSide {
    let length = fd_offset + PAGES * PAGE_SIZE;
    let file = pageferry_tests::files::memfd(length).unwrap();
    let backing = Backing::File(Arc::new(file.into()));
    MockSide::new(vec![BlockLayout { fd_offset, backing, ..BlockLayout::ram(PAGES * PAGE_SIZE) }])
}

fn range(pages: PageRange) -> BlockRange {
    BlockRange { block: 0, offset: pages.offset(), length: pages.bytes() }
}

/// Some pages of a piece, mostly not the first ones.
fn some_pages(chance: &mut Random) -> PageRange {
    let first = chance.below(PAGES);
    PageRange::new(first, 1 + chance.below((PAGES - first).min(90)))
}

/// A guest that uses most of its memory: some pages are zero, some were given back.
fn source(chance: &mut Random) -> MockSide {
    let side = side(0);
    for piece in 0..PIECES {
        if !chance.one_in(6) {
            let all = PageRange::new(piece * LARGE, LARGE);
            side.block(0).fill(all, chance.below(1000)).unwrap();
        }
    }
    side.block(0).fill(PageRange::new(PIECES * LARGE, 20), 5).unwrap();
    let zeroes = vec![0; PAGE_SIZE as usize];
    for page in 0..PAGES {
        if page % LARGE > 64
            && chance.one_in(40)
            && !side.block(0).is_hole(PageRange::new(page, 1)).unwrap()
        {
            side.block(0).write(page * PAGE_SIZE, &zeroes).unwrap();
        }
    }
    for _ in 0..chance.below(4) {
        give_back(chance, &side);
    }
    side.vmm.start().unwrap();
    side
}

/// The guest or its VMM gives pages back: as discarded, or as free. Returns them.
fn give_back(chance: &mut Random, side: &MockSide) -> PageRange {
    let pages = some_pages(chance);
    if chance.one_in(2) {
        side.client().discard(&[range(pages)], Punch::Yes).unwrap();
    } else {
        side.client().free(&[range(pages)]).unwrap();
    }
    pages
}

/// Checks that the destination holds the same as the source, and has allocated only pages that the
/// source has allocated.
#[track_caller]
fn assert_same(there: &MockSide, here: &MockSide, what: &str) {
    assert_same_but(there, here, &[], what);
}

/// The same, but pages that were given back at the destination may be holes there.
#[track_caller]
fn assert_same_but(there: &MockSide, here: &MockSide, given_back: &[PageRange], what: &str) {
    let mut more = Vec::new();
    for page in 0..PAGES {
        let one = PageRange::new(page, 1);
        let is_hole = |side: &MockSide| side.block(0).is_hole(one).unwrap();
        let (from, to) = (here.block(0).read_page(page), there.block(0).read_page(page));
        let may_be_hole = given_back.iter().any(|pages| pages.overlaps(&one));
        let is_same = from.unwrap() == to.unwrap() || may_be_hole && is_hole(there);
        assert!(is_same, "{what}: page {page:#x}");
        if is_hole(here) && !is_hole(there) {
            more.push(page);
        }
    }
    assert!(more.is_empty(), "{what}: allocated only at the destination: {more:x?}");
}

#[test]
fn what_is_given_back_while_a_guest_comes_in_large_pages_is_not_allocated() {
    for seed in 0..24 {
        let chance = &mut Random::new(seed);
        let from = source(chance);
        // The last one cannot have large pages.
        let offset = [0, LARGE * PAGE_SIZE, 3 * PAGE_SIZE][chance.below(3) as usize];
        let to = side(offset);
        let compression = if chance.one_in(3) { Compression::Lz4 } else { Compression::None };
        let streams = 1 + chance.below(3) as u16;
        // Slow, until enough was given back.
        let options = OutgoingOptions { streams, compression, bandwidth: 64 << 20, ..passes(2) };
        let (incoming, address) = to.listen(&IncomingOptions::default());
        let outgoing = from.vmm.start_outgoing(&address, &options).unwrap();
        let first_pass = |side: &MockSide| {
            let status = side.status();
            status.phase < Phase::Passes
                || status.phase == Phase::Passes && status.counters.passes == 0
        };
        let mut given_back_there = Vec::new();
        while first_pass(&from) && chance.below(12) > 0 {
            if chance.one_in(3) {
                given_back_there.push(give_back(chance, &to));
            } else {
                give_back(chance, &from);
            }
        }
        // It may have ended by now.
        let _ = from.client().set_parameters(&Parameters::bandwidth(0));
        let what = format!("seed {seed}, offset {offset:#x}, {streams} streams, {compression:?}");
        for (side, job) in [(&from, outgoing), (&to, incoming)] {
            let status = side.vmm.wait_job(job, PATIENCE).unwrap();
            assert_eq!(status.phase, Phase::Completed, "{what}: {}", status.error_text());
        }
        assert_same_but(&to, &from, &given_back_there, &what);
        // The guest goes on to give back parts of huge pages.
        for _ in 0..3 {
            let held = to.allocated();
            let pages = give_back(chance, &to);
            assert!(to.block(0).is_hole(pages).unwrap(), "{what}: {pages:?}");
            assert!(held - to.allocated() <= pages.bytes(), "{what}: {pages:?}");
            given_back_there.push(pages);
        }
        assert_same_but(&to, &from, &given_back_there, &what);
    }
}

#[test]
fn what_is_given_back_while_a_guest_is_restored_in_large_pages_is_a_hole() {
    let folder = tempfile::tempdir().unwrap();
    for seed in 100..112 {
        let chance = &mut Random::new(seed);
        let image = folder.path().join(format!("image{seed}"));
        let from = source(chance);
        let saved = from.vmm.start_snapshot(&image, &paused()).unwrap();
        let status = from.vmm.wait_job(saved, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        let to = side([0, LARGE * PAGE_SIZE][chance.below(2) as usize]);
        let options = RestoreOptions { bandwidth: 64 << 20, ..eager() };
        let job = to.vmm.start_restore(&image, &options).unwrap();
        let mut given_back = Vec::new();
        while to.status().phase <= Phase::Restoring && chance.below(12) > 0 {
            let pages = some_pages(chance);
            to.client().discard(&[range(pages)], Punch::Yes).unwrap();
            given_back.push(pages);
        }
        let _ = to.client().set_parameters(&Parameters::bandwidth(0));
        let status = to.vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        // The source has given them back, too.
        for pages in &given_back {
            assert!(to.block(0).is_hole(*pages).unwrap(), "seed {seed}: {pages:?}");
            from.client().discard(&[range(*pages)], Punch::Yes).unwrap();
        }
        assert_same(&to, &from, &format!("seed {seed}"));
    }
}
