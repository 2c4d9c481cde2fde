// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty bits that are older than a discard or a free do not bring pages back
//! (`fix-up-after-sync`), and a clear beside discarded pages loses no write (`round-safely`).

use super::scene::{PAGES, Scene, assert_freed, discard, free, has_stamp, populate};
use pageferry_client::{Punch, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::scenario::{Side, assert_same, lock, passes};
use std::sync::{Arc, Mutex};

#[test]
fn dirty_bits_from_before_the_start_bring_nothing_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    for page in 80..120 {
        scene.source.write(page, STALE);
    }
    scene.discard(80, 20, Punch::No);
    scene.discard(100, 20, Punch::Yes);
    // Nothing is written after the discards, so all bits of the log are older than they are.
    scene.start(&passes(3));
    scene.after_pass(0, |_| {});
    scene.after_pass(1, |_| {});
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    assert!((80..120).all(|page| scene.carried(page).is_empty()));
    scene.assert_discarded(80..120);
    scene.assert_untouched((0..80).chain(120..PAGES));
    assert_eq!(status.counters.stray_pages, 0);
    assert!(
        (80..100).all(|page| scene.source.ram.stamp(page) == STALE),
        "the source's pages were not touched"
    );
}

#[test]
fn dirty_bits_from_before_a_discard_bring_nothing_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    scene.start(&passes(3));
    scene.after_pass(0, |source| {
        for page in 80..120 {
            source.write(page, STALE);
        }
        discard(source, 80, 20, Punch::No);
        discard(source, 100, 20, Punch::Yes);
    });
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    scene.assert_discarded(80..120);
    scene.assert_untouched((0..80).chain(120..PAGES));
    assert_eq!(status.counters.stray_pages, 0);
}

/// Writes like a guest under KVM: the page is dirty only in the VMM's tracker.
pub fn write_under_kvm(side: &Side, page: u64, stamp: u64) {
    let mut kvm = lock(&side.vmm.kvm);
    side.ram.write(page, stamp);
    kvm.dirty.insert(side.ram.gpa / PAGE_SIZE + page);
}

#[test]
fn stale_kvm_bits_bring_no_discarded_pages_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    for page in 0..PAGES {
        write_under_kvm(
            &scene.source,
            page,
            if (70..130).contains(&page) { STALE } else { 1000 + page },
        );
    }
    scene.discard(70, 30, Punch::No);
    scene.discard(100, 30, Punch::Yes);
    scene.start(&passes(3));
    scene.after_pass(0, |source| {
        // Pages beside the discarded range, in the same words of the bitmap.
        write_under_kvm(source, 69, 1069);
        write_under_kvm(source, 130, 1130);
    });
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    assert!((70..130).all(|page| scene.carried(page).is_empty()));
    scene.assert_discarded(70..130);
    scene.assert_untouched((0..70).chain(130..PAGES));
    assert_eq!(status.counters.stray_pages, 0);
}

#[test]
fn a_clear_across_a_discarded_range_loses_no_write() {
    let mut scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    let (ram, first) = (scene.source.ram.clone(), scene.source.ram.gpa / PAGE_SIZE);
    let clears = Arc::new(Mutex::new(0u64));
    let (counted, vmm) = (clears.clone(), Arc::downgrade(&scene.source.vmm));
    *lock(&scene.source.vmm.on_clear) = Some(Box::new(move |kvm, given| {
        let mut count = lock(&counted);
        *count += 1;
        let runs = vmm.upgrade().is_some_and(|vmm| !vmm.is_paused());
        // The guest writes both neighbours of the discarded range, and another page, right before
        // the clear takes effect and right after.
        let write = |page: u64, stamp: u64, kvm: &mut pageferry_tests::scenario::KvmLog| {
            ram.write(page, stamp);
            kvm.dirty.insert(first + page);
        };
        if runs {
            for page in [69, 130, 10] {
                write(page, 10_000 * *count + page, kvm);
            }
        }
        kvm.dirty.retain(|page| !given.contains(page));
        if runs {
            for page in [68, 131, 11, 69 + *count % 2 * 61] {
                write(page, 20_000 * *count + page, kvm);
            }
        }
    }));
    for page in 0..PAGES {
        write_under_kvm(&scene.source, page, 1000 + page);
    }
    scene.discard(70, 60, Punch::Yes);
    scene.start(&passes(6));
    for pass in 0..6 {
        scene.after_pass(pass, |source| {
            write_under_kvm(source, 64, 500 + pass);
            write_under_kvm(source, 127 + 5, 600 + pass);
            populate(source, 90 + pass, 1);
            write_under_kvm(source, 90 + pass, 700 + pass);
        });
    }
    scene.finish();
    assert!(*lock(&clears) > 6, "the clear hook was called for several chunks");
    assert_same(&scene.source.ram, &scene.destination().ram);
    scene.assert_discarded(70..90);
    scene.assert_discarded(96..130);
    assert_eq!(scene.destination().ram.stamp(95), 705);
}

#[test]
fn stale_kvm_bits_bring_no_freed_pages_back() {
    const STALE: u64 = 0xdead_0000_beef;
    let mut scene = Scene::new();
    scene.source.client.set_trackers(Trackers::HOOKS).unwrap();
    scene.start(&passes(4));
    scene.after_pass(0, |source| {
        (70..130).for_each(|page| write_under_kvm(source, page, STALE));
        free(source, 70, 60);
        // KVM's bits stay set, and do not tell which write is older than the free.
        write_under_kvm(source, 100, 4711);
    });
    scene.after_pass(1, |source| write_under_kvm(source, 101, 4712));
    scene.after_pass(2, |_| {});
    let status = scene.finish();
    assert!(
        !scene.relay.seen.iter().any(|record| has_stamp(record, STALE)),
        "stale content was sent"
    );
    assert_same(&scene.source.ram, &scene.destination().ram);
    assert_eq!(
        (scene.destination().ram.stamp(100), scene.destination().ram.stamp(101)),
        (4711, 4712)
    );
    assert_freed(&scene, 70..100);
    assert_freed(&scene, 102..130);
    scene.assert_untouched((0..70).chain(130..PAGES));
    assert_eq!((status.counters.freed_pages, status.counters.stray_pages), (59, 0));
}
