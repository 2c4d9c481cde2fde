// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that the guest frees, and may write to again at any time.

use super::scene::{PAGES, Scene, assert_freed, discard, free, has_stamp};
use pageferry_client::Punch;
use pageferry_protocol::stream::Kind;
use pageferry_tests::scenario::{assert_same, passes};

#[test]
fn memory_freed_before_the_start_is_never_sent() {
    let mut scene = Scene::new();
    free(&scene.source, 30, 70);
    // Without a populate, and without a mark, because tracking has not started.
    scene.source.ram.write(50, 4711);
    scene.start(&passes(2));
    scene.after_pass(0, |_| {});
    let status = scene.finish();
    assert!((30..100).filter(|page| *page != 50).all(|page| scene.carried(page).is_empty()));
    assert_eq!(scene.destination().ram.stamp(50), 4711);
    assert_freed(&scene, 30..50);
    assert_freed(&scene, 51..100);
    scene.assert_untouched((0..30).chain(100..PAGES));
    let counters = status.counters;
    assert_eq!(
        (counters.zero_pages, counters.freed_pages, counters.discarded_pages, counters.stray_pages),
        (0, 0, 0, 0)
    );
}

#[test]
fn a_free_makes_a_hole_and_later_writes_arrive() {
    let mut scene = Scene::new();
    scene.start(&passes(4));
    // Pages that are dirty before the free, and pages that are not.
    scene.after_pass(0, |source| {
        (30..60).for_each(|page| source.write(page, 1));
        free(source, 30, 70);
        // The guest writes in the same pass, and frees again.
        source.write(90, 2);
        free(source, 90, 1);
        source.write(91, 3);
    });
    scene.after_pass(1, |source| {
        source.write(40, 5);
        free(source, 40, 1);
        free(source, 41, 1);
        source.write(41, 6);
    });
    scene.after_pass(2, |source| source.write(42, 7));
    let status = scene.finish();
    assert_same(&scene.source.ram, &scene.destination().ram);
    let there = &scene.destination().ram;
    assert_eq!((there.stamp(91), there.stamp(41), there.stamp(42)), (3, 6, 7));
    assert_freed(&scene, 30..41);
    assert_freed(&scene, 43..91);
    scene.assert_untouched((0..30).chain(100..PAGES));
    assert!(
        !scene
            .relay
            .seen
            .iter()
            .any(|record| [1, 2, 5].iter().any(|stale| has_stamp(record, *stale))),
        "stale"
    );
    // 69 pages after pass 0, and page 40 once more.
    assert_eq!((status.counters.freed_pages, status.counters.discarded_pages), (69 + 1, 0));
    // Each freed page is sent once as zero. For page 40 the others of its word are not sent again.
    assert_eq!(
        scene.carried(35).iter().map(|record| record.kind).collect::<Vec<_>>(),
        [Kind::Data, Kind::Zero]
    );
}

#[test]
fn a_free_of_discarded_memory_leaves_it_discarded() {
    let mut scene = Scene::new();
    scene.discard(60, 20, Punch::No);
    assert_eq!(scene.source.client.free(&[scene.source.ram.range(50, 40)]).unwrap(), 20);
    scene.start(&passes(2));
    scene.after_pass(0, |source| {
        discard(source, 100, 20, Punch::Yes);
        source.write(105, 1);
        assert_eq!(source.client.free(&[source.ram.range(90, 40)]).unwrap(), 20);
    });
    let status = scene.finish();
    scene.assert_discarded(60..80);
    scene.assert_discarded(100..120);
    assert_freed(&scene, 50..60);
    assert_freed(&scene, 80..100);
    assert_freed(&scene, 120..130);
    assert_eq!((status.counters.discarded_pages, status.counters.stray_pages), (40, 0));
}

#[test]
fn a_free_after_the_last_pass_is_a_hole_there_too() {
    let mut scene = Scene::new();
    scene.start(&passes(1));
    // The guest is already paused.
    scene.after_pass(1, |source| free(source, 30, 70));
    let status = scene.finish();
    assert_freed(&scene, 30..100);
    scene.assert_untouched((0..30).chain(100..PAGES));
    assert_eq!(status.counters.freed_pages, 70);
}
