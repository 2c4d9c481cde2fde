// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discards and populates while a guest is restored.

use super::scene::{image, under_way};
use pageferry_client::{Error, Ownership, Punch, RestoreMode, RestoreOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::random::{Random, page_content};
use pageferry_tests::scenario::image_guest::{PAGES, assert_completed, restore_modes, slow};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Guest, Host};
use std::path::Path;

/// A guest whose restore is under way, and the job.
fn restoring(host: &Host, path: &Path, options: &RestoreOptions) -> (Guest, u64) {
    let guest = Guest::new(host, PAGES);
    let job = guest.restore(path, options);
    guest.reaches(under_way(options));
    (guest, job)
}

#[test]
fn all_memory_is_discarded_during_a_restore() {
    let host = Host::start();
    let path = image(&host);
    for options in restore_modes() {
        let (guest, job) = restoring(&host, &path, &slow(options.clone()));
        assert_eq!(guest.client.discard(&[guest.range(0, PAGES)], Punch::Yes).unwrap(), PAGES);
        assert!(guest.is_hole());
        guest.hurry();
        assert_completed(&guest.wait(job));
        assert_eq!((guest.vmm.resumes(), guest.losses()), (1, 0));
        let discarded = guest.client.discarded(0).unwrap();
        assert_eq!(discarded.count(discarded.all()), PAGES);
        assert!(guest.is_hole(), "{options:?}");
        // Afterwards it is like any other guest.
        assert_eq!(guest.client.populate(&[guest.range(0, PAGES)]).unwrap(), PAGES);
        guest.assert_free();
        guest.fill(0..PAGES, 3);
        guest.check(&guest.saved(&host, "next", &paused()));
        std::fs::remove_file(host.images.path("next")).unwrap();
    }
}

#[test]
fn a_populate_during_a_restore_waits_for_the_guest_to_run() {
    let host = Host::start();
    let path = image(&host);
    for options in restore_modes() {
        let (guest, job) = restoring(&host, &path, &slow(options.clone()));
        let part = [guest.range(PAGES / 2, 100)];
        guest.client.discard(&part, Punch::Yes).unwrap();
        let populated = guest.client.populate(&part);
        let runs = options.mode == RestoreMode::Lazy;
        if runs {
            assert_eq!(populated.unwrap(), 100);
            // This is new memory, which is not in the image.
            for page in PAGES / 2..PAGES / 2 + 100 {
                assert_eq!(guest.block().load(page * PAGE_SIZE).unwrap(), 0, "page {page:#x}");
                guest.write(page, page);
            }
        } else {
            assert!(matches!(populated, Err(Error::Refused { .. })), "{populated:?}");
        }
        guest.hurry();
        assert_completed(&guest.wait(job));
        for page in 0..PAGES {
            let found = guest.block().read_page(page).unwrap();
            if (PAGES / 2..PAGES / 2 + 100).contains(&page) {
                let word = u64::from_le_bytes(found[8..16].try_into().unwrap());
                assert_eq!(word, if runs { page } else { 0 }, "page {page:#x}");
                assert_eq!(
                    guest.client.discarded(0).unwrap().contains(page),
                    !runs,
                    "page {page:#x}"
                );
            } else {
                assert!(found == page_content(1, page), "page {page:#x}");
            }
        }
        guest.client.populate(&part).unwrap();
    }
}

#[test]
fn after_random_discards_and_populates_the_last_one_holds() {
    let host = Host::start();
    let path = image(&host);
    for options in restore_modes() {
        for seed in 0..4 {
            eprintln!("seed {seed}, {options:?}");
            let options = RestoreOptions { bandwidth: 32 << 20, ..options.clone() };
            let (guest, job) = restoring(&host, &path, &options);
            let mut random = Random::new(seed);
            let was_discarded = pageferry_protocol::shm::MappedBitmap::private(PAGES).unwrap();
            while !guest.client.status().unwrap().phase.is_final() {
                let first = random.below(PAGES);
                let count = random.below(40).min(PAGES - first - 1) + 1;
                if random.percent(70) {
                    guest.client.discard(&[guest.range(first, count)], Punch::Yes).unwrap();
                    was_discarded.set(PageRange::new(first, count));
                } else if guest.client.ownership() == Ownership::Ours {
                    guest.client.populate(&[guest.range(first, count)]).unwrap();
                }
            }
            assert_completed(&guest.wait(job));
            let discarded = guest.client.discarded(0).unwrap();
            for page in 0..PAGES {
                let found = guest.block().read_page(page).unwrap();
                if was_discarded.contains(page) {
                    assert!(
                        found.iter().all(|byte| *byte == 0),
                        "page {page:#x} was loaded after its discard"
                    );
                } else {
                    assert!(
                        !discarded.contains(page) && found == page_content(1, page),
                        "page {page:#x}"
                    );
                }
                let hole = guest.block().is_hole(PageRange::new(page, 1)).unwrap();
                assert!(
                    hole || !discarded.contains(page),
                    "page {page:#x} is discarded but allocated"
                );
            }
        }
    }
}
