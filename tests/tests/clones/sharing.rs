// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What clones share, and what they do not.

use super::{Clone, content, image};
use pageferry_client::{Punch, RestoreOptions};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::guest_mapping::lock_memory;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{PAGES, assert_completed, cloning};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Guest, Host};
use std::os::unix::fs::MetadataExt;

#[test]
fn clones_have_what_none_has_written_once_and_see_nothing_of_each_other() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let (one, other) = (Clone::of(&image), Clone::of(&image));
    let base = || one.guest.block().file().metadata().unwrap().blocks() * 512;
    let pages = (0..PAGES).filter(|page| content(*page) != 0).count() as u64;
    // The pages with content, the header, and the bits of those that are filled.
    assert_eq!(base(), (pages + 2) * PAGE_SIZE);
    for page in 0..PAGES {
        assert_eq!((one.word(page), other.word(page)), (content(page), content(page)), "{page}");
    }
    for page in [3, 4, 9] {
        one.guest.write(page, 7);
        other.guest.write(page, 8);
    }
    assert_eq!((one.word(3), other.word(4)), (7, 8));
    one.guest.client.free(&[one.guest.range(3, 4)]).unwrap();
    assert_eq!([3, 4, 5, 6, 7, 9].map(|page| one.word(page)), [0, 0, 0, 0, 0, 7]);
    assert_eq!([3, 4, 6, 9].map(|page| other.word(page)), [8, 8, content(6), 8]);
    one.guest.client.discard(&[one.guest.range(12, 1)], Punch::No).unwrap();
    assert!(one.guest.block().is_hole(PageRange::new(12, 1)).unwrap());
    assert_eq!(other.word(12), content(12));
    // Whatever they read and wrote: nothing came into the base.
    assert_eq!(base(), (pages + 2) * PAGE_SIZE);

    // A clone is saved, and cloned again.
    one.guest.check(&one.guest.saved(&one.host, "saved", &paused()));
    let again = Clone::of(&one.host.images.path("saved"));
    assert_eq!(
        [0, 3, 6, 9, 12, 15].map(|page| again.word(page)),
        [content(0), 0, 0, 7, 0, content(15)]
    );
}

/// Against the rules: this makes pages of zeroes in the base.
#[test]
fn a_vmm_that_touches_its_memory_too_early_harms_no_clone() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let clones: Vec<_> = (0..2)
        .map(|_| {
            let host = Host::start();
            let guest = Guest::clone_of(&host, &image);
            for page in (0..PAGES).step_by(2) {
                guest.block().load(page * PAGE_SIZE).unwrap();
            }
            assert_completed(&guest.restored(&image, &cloning()));
            Clone { guest, host }
        })
        .collect();
    for page in 0..PAGES {
        assert!(clones.iter().all(|clone| clone.word(page) == content(page)), "{page:#x}");
    }
}

#[test]
fn clones_that_start_at_once_place_each_page_once() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let waiting: Vec<_> = (0..6).map(|_| Host::start()).collect();
    let waiting: Vec<_> =
        waiting.into_iter().map(|host| (Guest::clone_of(&host, &image), host)).collect();
    let options = RestoreOptions { workers: 2, ..cloning() };
    let jobs: Vec<_> = waiting.iter().map(|(guest, _)| guest.restore(&image, &options)).collect();
    for ((guest, host), job) in waiting.into_iter().zip(jobs) {
        assert_completed(&guest.wait(job));
        let clone = Clone { guest, host };
        for page in 0..PAGES {
            assert_eq!(clone.word(page), content(page), "{page:#x}");
        }
    }
}

#[test]
fn a_clone_whose_memory_is_locked_gives_it_back() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let clone = Clone::of(&image);
    clone.guest.write(5, 77);
    let block = clone.guest.block();
    lock_memory(block.address(), block.layout().length).unwrap();
    clone.guest.client.free(&[clone.guest.range(0, 16)]).unwrap();
    assert_eq!([0, 3, 5, 6, 18].map(|page| clone.word(page)), [0, 0, 0, 0, content(18)]);
    assert_completed(&clone.guest.restored(&image, &cloning()));
    assert_eq!([0, 3, 5, 6].map(|page| clone.word(page)), [0, 3, 5, 6].map(content));
}
