// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files that fail while a guest is saved: the image, and the memory itself.

use pageferry_client::{Config, Phase, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::files::unsealed_memfd;
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_failed, byte_of, endless, snapshot_modes,
};
use pageferry_tests::scenario::images::{FIRST, on, paused, tracked};
use pageferry_tests::scenario::{Guest, Host, lock};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Allows the agent to write again. Checks that the guest runs without protection, and that the
/// images are the same as before.
#[track_caller]
fn assert_nothing_happened(host: &mut Host, guest: &Guest, before: &[(String, Vec<u8>)]) {
    host.agent.process().limit_files(None).unwrap();
    guest.assert_free();
    assert!(host.images.bytes() == before, "{:?}", host.images.files());
}

#[test]
fn a_file_that_may_not_grow_fails_the_snapshot() {
    let mut host = Host::start();
    let guest = Guest::new(&host, PAGES);
    guest.fill(0..1, 1);
    let base = host.images.path("base");
    // File size limits that are reached while pages are written.
    let end = guest.saved(&host, "base", &tracked(paused())).newest().layout().contents();
    guest.fill(0..PAGES, 2);
    let before = host.images.bytes();
    for options in snapshot_modes() {
        // File size limits after the pages: before the rest of the image, inside its first part,
        // and inside the state of the VMM.
        let (length, contents) = ("cannot set the length of the file", "cannot write at byte 0x");
        for (cached, limit, why) in [
            (false, 0, length),
            (true, FIRST + 100 * PAGE_SIZE, length),
            (false, end, contents),
            (true, end, contents),
            (false, end + PAGE_SIZE, contents),
        ] {
            let options = SnapshotOptions { cached, ..options.clone() };
            for options in [options.clone(), on(&base, tracked(options))] {
                host.agent.process().limit_files(Some(limit)).unwrap();
                let status = guest.wait(guest.snapshot(&host.images.path("image"), &options));
                assert_failed(&status, &["image: cannot", why, "File too large"]);
                if why == contents {
                    assert_eq!(
                        (status.counters.pages_saved, byte_of(status.error_text())),
                        (PAGES, limit),
                        "all was captured"
                    );
                }
                assert_nothing_happened(&mut host, &guest, &before);
            }
        }
    }
    let chain = guest.saved(&host, "next", &on(&base, paused()));
    guest.check(&chain);
}

#[test]
fn a_file_that_refuses_writes_midway_fails_the_snapshot() {
    let mut host = Host::start();
    let guest = Guest::full(&host, PAGES);
    let base = host.images.path("base");
    guest.saved(&host, "base", &tracked(paused()));
    guest.fill(0..PAGES, 2);
    let before = host.images.bytes();
    for options in snapshot_modes() {
        for cached in [false, true] {
            let options = endless(SnapshotOptions { cached, ..options.clone() });
            for options in [options.clone(), on(&base, tracked(options))] {
                let job = guest.snapshot(&host.images.path("image"), &options);
                guest.reaches(Phase::Saving);
                // The file has its final length already. A write beyond the limit is still refused.
                host.agent.process().limit_files(Some(FIRST)).unwrap();
                guest.hurry();
                let status = guest.wait(job);
                assert_failed(&status, &["image: cannot write", "File too large"]);
                // The error is that of the first write. The later ones would be refused, too.
                let byte = byte_of(status.error_text());
                assert!(
                    (FIRST..FIRST + PAGES * PAGE_SIZE).contains(&byte),
                    "no page: {}",
                    status.error_text()
                );
                assert_nothing_happened(&mut host, &guest, &before);
            }
        }
    }
    let chain = guest.saved(&host, "next", &on(&base, paused()));
    guest.check(&chain);
}

#[test]
fn memory_truncated_during_a_snapshot_is_named() {
    let host = Host::start();
    for options in snapshot_modes() {
        let fd: OwnedFd =
            unsealed_memfd("ram", PAGES * PAGE_SIZE, rustix::fs::MemfdFlags::empty()).unwrap();
        let file = Arc::new(File::from(fd));
        let layout = BlockLayout {
            backing: Backing::File(file.clone()),
            ..BlockLayout::ram(PAGES * PAGE_SIZE)
        };
        let guest = Guest::of(&host, vec![layout], Config::default());
        guest.fill(0..PAGES, 1);
        let job = guest.snapshot(&host.images.path("image"), &endless(options));
        guest.reaches(Phase::Saving);
        rustix::fs::ftruncate(file.as_fd(), PAGES / 2 * PAGE_SIZE).unwrap();
        guest.hurry();
        assert_failed(&guest.wait(job), &["block 0", "truncated", "byte"]);
        rustix::fs::ftruncate(file.as_fd(), PAGES * PAGE_SIZE).unwrap();
        guest.assert_free();
        assert!(host.images.files().is_empty());
        assert!(!lock(&guest.vmm.asked).paused);
        guest.check(&guest.saved(&host, "image", &paused()));
        std::fs::remove_file(host.images.path("image")).unwrap();
    }
}
