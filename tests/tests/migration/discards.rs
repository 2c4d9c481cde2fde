// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discards at every moment of a migration.

use super::scene::{PAGES, Scene, discard, populate};
use pageferry_client::{BlockRange, Punch};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::Kind;
use pageferry_protocol::stream::record::FLAG_STRAY;
use pageferry_tests::scenario::{assert_same, passes};

#[test]
fn a_discard_of_a_page_that_was_sent_leaves_a_hole() {
    for (punch, pass) in [(Punch::Yes, 0), (Punch::No, 0), (Punch::Yes, 1), (Punch::No, 1)] {
        let mut scene = Scene::new();
        scene.start(&passes(2));
        scene.after_pass(pass, |source| discard(source, 30, 70, punch));
        let status = scene.finish();
        assert_eq!(scene.carried(30).len(), 1, "the page was sent in pass 0");
        scene.assert_discarded(30..100);
        scene.assert_untouched((0..30).chain(100..PAGES));
        assert_eq!(status.counters.discarded_pages, 70);
        assert_eq!(status.counters.stray_pages, 0);
    }
}

#[test]
fn a_page_discarded_and_written_again_has_the_last_write() {
    let mut scene = Scene::new();
    scene.discard(10, 5, Punch::Yes);
    scene.start(&passes(3));
    scene.after_pass(0, |source| {
        populate(source, 10, 5);
        source.write(11, 1);
        discard(source, 20, 5, Punch::Yes);
        discard(source, 40, 5, Punch::No);
    });
    scene.after_pass(1, |source| {
        populate(source, 20, 5);
        source.write(21, 2);
        populate(source, 40, 5);
        source.write(41, 3);
    });
    scene.finish();
    let there = &scene.destination().ram;
    assert_same(&scene.source.ram, there);
    assert_eq!((there.stamp(11), there.stamp(21), there.stamp(41)), (1, 2, 3));
    assert_eq!((there.stamp(10), there.stamp(20)), (0, 0), "punched pages read as zero");
    scene.assert_untouched((0..10).chain(50..PAGES));
    let bitmap = scene.destination().client.discarded(there.id).unwrap();
    assert_eq!(bitmap.count(bitmap.all()), 0);
}

#[test]
fn the_same_within_one_pass_has_the_last_write() {
    let mut scene = Scene::new();
    scene.start(&passes(1));
    scene.after_pass(0, |source| {
        discard(source, 10, 5, Punch::Yes);
        populate(source, 10, 5);
        source.write(12, 77);
    });
    scene.finish();
    assert_same(&scene.source.ram, &scene.destination().ram);
    assert_eq!(scene.destination().ram.stamp(12), 77);
    assert_eq!(scene.destination().ram.stamp(11), 0);
}

#[test]
fn a_stray_write_is_sent_and_its_page_stays_discarded() {
    let mut scene = Scene::new();
    scene.discard(60, 20, Punch::Yes);
    scene.start(&passes(2));
    scene.after_pass(0, |source| {
        for page in [61, 62, 79] {
            source.write(page, 5000 + page);
        }
    });
    let status = scene.finish();
    assert_eq!(status.counters.stray_pages, 3);
    let there = &scene.destination();
    assert_eq!(there.client.status().unwrap().counters.stray_pages, 3);
    let bitmap = there.client.discarded(there.ram.id).unwrap();
    for page in [61, 62, 79] {
        assert_eq!(there.ram.stamp(page), 5000 + page);
        assert!(bitmap.contains(page), "a stray page stays discarded");
        let carried = scene.carried(page);
        assert_eq!(carried.len(), 1);
        assert_eq!(carried[0].header.flags(), FLAG_STRAY);
    }
    scene.assert_discarded(63..79);
    scene.assert_untouched((0..60).chain(80..PAGES));
    let flagged = scene.relay.seen.iter().filter(|record| record.header.flags() & FLAG_STRAY != 0);
    assert_eq!(flagged.map(|record| record.header.range().count).sum::<u64>(), 3);
}

#[test]
fn a_stray_page_punched_by_the_vmm_is_a_hole_there() {
    // After so many zero pages the source seeks the next data instead of reading further.
    const STRAY: u64 = 64 * 9 + 17;
    for zeros_before in [0, 64 * 8] {
        let mut scene = Scene::empty(64 * 10);
        scene.discard(STRAY, 2, Punch::Yes);
        scene.start(&passes(3));
        scene.after_pass(0, |source| source.write(STRAY, 4711));
        scene.after_pass(1, |source| {
            source.ram.punch(STRAY, 1);
            let log_page = |page| source.ram.gpa / PAGE_SIZE + page;
            source.client.log().mark(PageRange::new(log_page(0), zeros_before));
            source.client.log().mark(PageRange::new(log_page(STRAY), 1));
        });
        let status = scene.finish();
        let carried: Vec<_> = scene
            .carried(STRAY)
            .iter()
            .map(|record| (record.kind, record.header.flags()))
            .collect();
        assert_eq!(carried, [(Kind::Data, FLAG_STRAY), (Kind::Zero, FLAG_STRAY)]);
        scene.assert_discarded(STRAY..STRAY + 2);
        assert_eq!(status.counters.stray_pages, 2);
        assert_eq!(scene.destination().client.status().unwrap().counters.stray_pages, 2);
        assert_same(&scene.source.ram, &scene.destination().ram);
    }
}

#[test]
fn a_discard_rounds_inward_and_partial_pages_migrate() {
    let mut scene = Scene::new();
    let id = scene.source.ram.id;
    // From the middle of page 50 to the middle of page 90.
    let ragged = BlockRange { block: id, offset: 50 * PAGE_SIZE + 1234, length: 40 * PAGE_SIZE };
    assert_eq!(scene.source.client.discard(&[ragged], Punch::Yes).unwrap(), 39);
    scene.start(&passes(2));
    // From the start of page 120 to one byte before the end of page 129; and less than a page.
    let ends_early = BlockRange { block: id, offset: 120 * PAGE_SIZE, length: 10 * PAGE_SIZE - 1 };
    let tiny = BlockRange { block: id, offset: 140 * PAGE_SIZE + 1, length: PAGE_SIZE };
    scene.after_pass(0, |source| {
        assert_eq!(source.client.discard(&[ends_early, tiny], Punch::Yes).unwrap(), 9)
    });
    let status = scene.finish();
    scene.assert_discarded(51..90);
    scene.assert_discarded(120..129);
    scene.assert_untouched((0..51).chain(90..120).chain(129..PAGES));
    assert_eq!(status.counters.discarded_pages, 39 + 9);
    assert!(
        (51..90).all(|page| scene.carried(page).is_empty()),
        "a page discarded before the start is never sent"
    );
}
