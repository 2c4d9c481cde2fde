// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Increments whose base was replaced or removed, and images of other guests: the VMM's memory is
//! not touched, and the next restore completes.

use pageferry_client::{Config, RestoreOptions, Target};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::memory::BlockLayout;
use pageferry_tests::scenario::image_guest::{assert_completed, assert_failed, restore_modes};
use pageferry_tests::scenario::images::{bytes_of, on, paused, tracked};
use pageferry_tests::scenario::{Folder, Guest, Host};

const PAGES: u64 = 700;

fn low() -> BlockLayout {
    BlockLayout::ram(PAGES * PAGE_SIZE)
}

fn high() -> BlockLayout {
    BlockLayout { id: 3, name: "high".into(), gpa: 1 << 30, ..BlockLayout::ram(100 * PAGE_SIZE) }
}

fn guest(host: &Host, layouts: Vec<BlockLayout>) -> Guest {
    let guest = Guest::of(host, layouts, Config::default());
    for block in guest.memory.blocks() {
        block.fill(block.all(), 9).unwrap();
    }
    guest
}

fn bytes(guest: &Guest) -> Vec<Vec<u8>> {
    guest.memory.blocks().iter().map(bytes_of).collect()
}

/// Checks that the restore is refused and changes nothing.
#[track_caller]
fn assert_refused(
    guest: &Guest, images: &Folder, name: &str, options: &RestoreOptions, why: &[&str],
) {
    let (before, resumes) = (bytes(guest), guest.vmm.resumes());
    assert_failed(&guest.restored(&images.path(name), options), why);
    assert!(bytes(guest) == before, "the memory was touched");
    assert_eq!((guest.vmm.resumes(), guest.losses()), (resumes, 0));
}

#[test]
fn an_increment_on_another_base_is_refused_and_both_named() {
    let host = Host::start();
    let source = guest(&host, vec![low()]);
    let (base, one) = (host.images.path("base"), host.images.path("one"));
    source.saved(&host, "base", &tracked(paused()));
    source.fill(0..50, 2);
    source.saved(&host, "one", &on(&base, tracked(paused())));
    source.fill(20..70, 3);
    source.saved(&host, "two", &on(&one, paused()));
    let right = bytes(&source);
    // Other images of the same guest and of another one.
    source.saved(&host, "other", &paused());
    drop(source);
    let stranger = guest(&host, vec![low(), high()]);
    stranger.saved(&host, "stranger", &paused());
    drop(stranger);

    let path = |name: &str| host.images.seen(name);
    for options in restore_modes() {
        let here = guest(&host, vec![low()]);
        let (one, base) = (path("one").display().to_string(), path("base").display().to_string());
        let two = path("two").display().to_string();
        std::fs::rename(path("base"), path("away")).unwrap();
        assert_refused(&here, &host.images, "two", &options, &[&one, &base, "No such file"]);
        for in_its_place in ["other", "stranger", "one"] {
            std::fs::copy(path(in_its_place), path("base")).unwrap();
            assert_refused(
                &here,
                &host.images,
                "two",
                &options,
                &[&one, &base, "the file was replaced by another"],
            );
        }
        std::fs::write(path("base"), "nothing at all").unwrap();
        assert_refused(&here, &host.images, "two", &options, &[&one, &base, "truncated"]);
        std::fs::remove_file(path("base")).unwrap();
        std::fs::create_dir(path("base")).unwrap();
        assert_refused(&here, &host.images, "two", &options, &[&one, &base]);
        std::fs::remove_dir(path("base")).unwrap();
        std::fs::rename(path("away"), path("base")).unwrap();
        // Removes the image in the middle of the chain.
        std::fs::rename(path("one"), path("away")).unwrap();
        assert_refused(&here, &host.images, "two", &options, &[&two, &one, "No such file"]);
        std::fs::copy(path("base"), path("one")).unwrap();
        assert_refused(
            &here,
            &host.images,
            "two",
            &options,
            &[&two, &one, "the file was replaced by another"],
        );
        std::fs::rename(path("away"), path("one")).unwrap();
        assert_completed(&here.restored(&path("two"), &options));
        assert!(bytes(&here) == right);
        // The whole folder is moved.
        let moved = host.images.seen("moved");
        std::fs::create_dir(&moved).unwrap();
        for name in ["base", "one", "two"] {
            std::fs::copy(path(name), moved.join(name)).unwrap();
        }
        std::fs::rename(path("base"), path("away")).unwrap();
        assert_completed(&here.restored(&moved.join("two"), &options));
        assert!(bytes(&here) == right);
        std::fs::rename(path("away"), path("base")).unwrap();
        std::fs::remove_dir_all(&moved).unwrap();
    }
}

#[test]
fn an_image_of_another_geometry_is_refused_by_block_and_field() {
    let host = Host::start();
    let source = guest(&host, vec![low(), high()]);
    source.saved(&host, "image", &paused());
    let right = bytes(&source);
    drop(source);
    let others: [(Vec<BlockLayout>, &str); 7] = [
        (
            vec![BlockLayout { length: (PAGES - 1) * PAGE_SIZE, ..low() }, high()],
            "block 0: length is 2796 KiB",
        ),
        (
            vec![BlockLayout { length: (PAGES + 1) * PAGE_SIZE, ..low() }, high()],
            "block 0: length is 2804 KiB",
        ),
        (vec![low(), BlockLayout { gpa: 2 << 30, ..high() }], "block 3: gpa is 0x80000000"),
        (
            vec![low(), BlockLayout { name: "higher".into(), ..high() }],
            "block 3: name is \"higher\"",
        ),
        (
            vec![low(), BlockLayout { id: 4, ..high() }],
            "block 3 \"high\" of the image does not exist",
        ),
        (vec![low()], "block 3 \"high\" of the image does not exist"),
        (
            vec![low(), high(), BlockLayout { id: 5, name: "more".into(), gpa: 4 << 30, ..high() }],
            "block 5 \"more\" of this VMM is not in the image",
        ),
    ];
    for options in restore_modes() {
        for (layouts, why) in &others {
            let other = guest(&host, layouts.clone());
            assert_refused(&other, &host.images, "image", &options, &[why]);
            // The guest's own image can still be restored.
            let own = host.images.path("own");
            let before = bytes(&other);
            other.client.take_by_force().unwrap();
            other.saved(&host, "own", &paused());
            other.block().fill(other.block().all(), 33).unwrap();
            assert_completed(&other.restored(&own, &options));
            assert!(bytes(&other) == before);
            std::fs::remove_file(&own).unwrap();
        }
        let same = guest(&host, vec![low(), high()]);
        assert_completed(&same.restored(&host.images.path("image"), &options));
        assert!(bytes(&same) == right);
    }
}

#[test]
fn a_migrated_guest_is_no_increment_to_the_one_before() {
    let (host, far) = (Host::start(), Host::start());
    let here = guest(&host, vec![low()]);
    let base = host.images.path("base");
    here.saved(&host, "base", &tracked(paused()));
    let there = guest(&far, vec![low()]);
    there.fill(0..PAGES, 6);
    let address = || Target::Address(format!("unix:{}", far.images.path("stream").display()));
    let incoming = here.client.start_incoming(address(), &Default::default()).unwrap().job;
    let outgoing = there.client.start_outgoing(address(), &Default::default()).unwrap().job;
    assert_completed(&there.wait(outgoing));
    assert_completed(&here.wait(incoming));
    assert!(bytes(&here) == bytes(&there));
    let status = here.wait(here.snapshot(&host.images.path("one"), &on(&base, tracked(paused()))));
    assert_failed(&status, &["a guest came by a migration"]);
    here.check(&here.saved(&host, "whole", &paused()));
}
