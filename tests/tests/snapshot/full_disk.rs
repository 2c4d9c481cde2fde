// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots to a full file system.

use pageferry_client::{Phase, Punch, SnapshotMode, SnapshotOptions, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, background, byte_of, endless, snapshot_modes,
};
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::{Guest, Host, SOON};
use std::ops::Range;

const MIB: u64 = 1 << 20;
/// Room for the whole guest, and a little more.
const ROOM: u64 = 12 * MIB;
const FULL: &str = "No space left on device";

/// Checks that the failed snapshot left nothing behind and changed nothing. `before` are the
/// earlier files.
#[track_caller]
fn assert_nothing_happened(host: &Host, guest: &Guest, before: &[(String, Vec<u8>)]) {
    guest.assert_free();
    assert!(host.images.bytes() == before, "{:?} have changed", host.images.files());
}

#[test]
fn a_full_file_system_fails_the_snapshot_and_nothing_else() {
    let Some(tmpfs) = require::tmpfs() else { return };
    for options in snapshot_modes() {
        for cached in [false, true] {
            let options = SnapshotOptions { cached, ..options.clone() };
            eprintln!("{options:?}");
            let host = Host::cramped(tmpfs, ROOM);
            let guest = Guest::new(&host, PAGES);
            // A small image, on which others build.
            guest.fill(0..100, 1);
            let base = host.images.path("base");
            guest.saved(&host, "base", &tracked(paused()));
            guest.fill(0..PAGES, 2);
            host.images.fill(5 * MIB);
            let before = host.images.bytes();

            // This image does not fit, so later increments build on the one before.
            let whole =
                guest.wait(guest.snapshot(&host.images.path("whole"), &tracked(options.clone())));
            let named =
                format!("image {}: cannot write at byte 0x", host.images.path("whole").display());
            assert_failed(&whole, &[&named, FULL]);
            assert!(byte_of(whole.error_text()) >= 2 * MIB, "{}", whole.error_text());
            assert_nothing_happened(&host, &guest, &before);

            // The changes since the base are still known after the failure.
            for name in ["one", "two"] {
                let status = guest.wait(
                    guest.snapshot(&host.images.path(name), &on(&base, tracked(options.clone()))),
                );
                assert_failed(&status, &[name, FULL]);
                assert_nothing_happened(&host, &guest, &before);
            }
            host.images.relieve();
            let chain = guest.saved(&host, "three", &on(&base, options.clone()));
            guest.check(&chain);
            drop(chain);
            assert_eq!(host.images.files(), ["base", "three"]);
            // That snapshot did not remove it either.
            guest.write(7, 7);
            std::fs::remove_file(host.images.seen("three")).unwrap();
            let chain = guest.saved(&host, "four", &on(&base, options.clone()));
            guest.check(&chain);
        }
    }
}

#[test]
fn space_for_the_pages_only_leaves_no_file() {
    let Some(tmpfs) = require::tmpfs() else { return };
    let host = Host::cramped(tmpfs, ROOM);
    let guest = Guest::full(&host, PAGES);
    let empty = host.images.free();
    // A job closes its image a moment after it has ended. Only then is the space free.
    let wait_until_empty =
        || wait_until("an empty file system", SOON, || host.images.free() == empty).unwrap();
    for options in snapshot_modes() {
        let chain = guest.saved(&host, "whole", &options);
        guest.check(&chain);
        let states = chain.newest().layout().states();
        drop(chain);
        let needed = empty - host.images.free();
        std::fs::remove_file(host.images.seen("whole")).unwrap();
        // States, checksums of extents, contents, state of the VMM, header.
        for short in 1..=5 {
            wait_until_empty();
            host.images.fill(needed - short * PAGE_SIZE);
            let status = guest.wait(guest.snapshot(&host.images.path("whole"), &options));
            assert_failed(&status, &["image", FULL]);
            assert_eq!(status.counters.pages_saved, PAGES, "all pages were saved");
            let byte = byte_of(status.error_text());
            assert!(byte == 0 || byte >= states, "{}", status.error_text());
            guest.assert_free();
            assert_eq!(host.images.files(), ["ballast"]);
            host.images.relieve();
        }
        wait_until_empty();
        host.images.fill(needed);
        guest.check(&guest.saved(&host, "whole", &options));
        std::fs::remove_file(host.images.seen("whole")).unwrap();
        host.images.relieve();
        wait_until_empty();
    }
}

/// A snapshot that does not end by itself, and for which there is not enough room. `act` makes the
/// agent save the rest of the pages.
fn runs_full(act: impl Fn(&Host, &Guest)) {
    let Some(tmpfs) = require::tmpfs() else { return };
    let modes =
        if require::uffd() { vec![SnapshotMode::Background, SnapshotMode::Paused] } else { vec![] };
    for mode in modes {
        let host = Host::cramped(tmpfs, ROOM);
        let guest = Guest::full(&host, PAGES);
        let base = host.images.path("base");
        guest.saved(&host, "base", &tracked(paused()));
        // The ballast takes most of the room.
        let before = host.images.bytes();
        for options in [background(), on(&base, background())] {
            guest.client.populate(&[guest.range(0, PAGES)]).unwrap();
            guest.fill(0..PAGES, 2);
            // A worker saves a piece of 2 MiB before it waits, and two pieces would not fit.
            let options = endless(SnapshotOptions { mode, workers: 1, ..options });
            let job = guest.snapshot(&host.images.path("image"), &options);
            guest.reaches(Phase::Saving);
            act(&host, &guest);
            let status = guest.wait(job);
            assert_failed(&status, &[FULL]);
            assert_nothing_happened(&host, &guest, &before);
        }
        std::fs::remove_file(host.images.seen("base")).unwrap();
        guest.client.populate(&[guest.range(0, PAGES)]).unwrap();
        guest.fill(0..PAGES, 3);
        let chain = guest.saved(&host, "next", &background());
        guest.check(&chain);
    }
}

#[test]
fn a_discard_that_cannot_be_saved_first_is_no_less_a_discard() {
    runs_full(|_, guest| {
        guest.client.discard(&[guest.range(0, PAGES)], Punch::Yes).unwrap();
        assert!(guest.is_hole(), "an acknowledged discard has freed the memory");
    });
}

#[test]
fn a_write_that_cannot_be_saved_first_goes_on() {
    runs_full(|_, guest| {
        if guest.vmm.is_paused() {
            // Without writes: only the bandwidth limit is removed.
            guest.hurry();
            return;
        }
        let memory = guest.memory.clone();
        let writing = std::thread::spawn(move || {
            let block = &memory.blocks()[0];
            (0..PAGES).for_each(|page| block.store(page * PAGE_SIZE, page).unwrap());
        });
        wait_until("all to be written", SOON, || writing.is_finished()).unwrap();
        writing.join().unwrap();
    });
}

#[test]
fn a_folder_without_room_for_a_file_is_named() {
    let Some(tmpfs) = require::tmpfs() else { return };
    let host = Host::cramped(tmpfs, ROOM);
    let guest = Guest::full(&host, PAGES);
    host.images.fill(0);
    for options in snapshot_modes() {
        let status = guest.wait(guest.snapshot(&host.images.path("image"), &options));
        assert_failed(&status, &["image", FULL]);
        guest.assert_free();
        assert_eq!(host.images.files(), ["ballast"]);
    }
    host.images.relieve();
    assert_completed(&guest.wait(guest.snapshot(&host.images.path("image"), &paused())));
}

#[test]
fn write_protect_marks_survive_a_full_file_system() {
    let Some(tmpfs) = require::tmpfs() else { return };
    if !require::uffd() {
        return;
    }
    let host = Host::cramped(tmpfs, ROOM);
    let guest = Guest::new(&host, PAGES);
    guest.fill(0..100, 1);
    guest.client.set_trackers(Trackers::WRITE_PROTECT).unwrap();
    let base = host.images.path("base");
    guest.saved(&host, "base", &tracked(paused()));
    // Written through the mapping, and not marked.
    let write = |pages: Range<u64>| {
        pages.for_each(|page| guest.block().store(page * PAGE_SIZE, page + 1).unwrap())
    };
    write(0..PAGES / 2);
    host.images.fill(2 * MIB);
    for pages in [PAGES / 2..PAGES / 2 + 5, PAGES / 2 + 5..PAGES] {
        let status =
            guest.wait(guest.snapshot(&host.images.path("one"), &on(&base, tracked(paused()))));
        assert_failed(&status, &["one", FULL]);
        write(pages);
    }
    host.images.relieve();
    guest.check(&guest.saved(&host, "one", &on(&base, tracked(paused()))));
    write(0..3);
    guest.check(&guest.saved(&host, "two", &on(&host.images.path("one"), paused())));
}
