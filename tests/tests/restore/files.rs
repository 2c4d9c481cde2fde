// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restores from files that fail, shrink or are not an image.

use super::scene::under_way;
use pageferry_agent::image::Chain;
use pageferry_client::{Config, Phase, RestoreOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, eager, lazy, restore_modes, slow,
};
use pageferry_tests::scenario::images::{FIRST, assert_right_or_missing, paused};
use pageferry_tests::scenario::{At, Guest, Host};
use rustix::fs::{CWD, FileType, Mode};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image of a guest with content in all its pages, and that content.
fn image(host: &Host, seed: u64) -> (PathBuf, Vec<u8>) {
    let name = format!("image{seed}");
    let guest = Guest::new(host, PAGES);
    guest.fill(0..PAGES, seed);
    guest.saved(host, &name, &paused());
    (host.images.path(&name), guest.bytes())
}

/// A copy of the image at `path`.
fn copy(host: &Host, path: &Path) -> PathBuf {
    let copy = host.images.path("copy");
    std::fs::copy(path, &copy).unwrap();
    copy
}

/// Checks that a good image can still be restored.
#[track_caller]
fn assert_restores(guest: &Guest, path: &Path, bytes: &[u8], options: &RestoreOptions) {
    let resumes = guest.vmm.resumes();
    assert_completed(&guest.restored(path, options));
    assert_eq!(guest.vmm.resumes(), resumes + 1);
    assert!(guest.bytes() == bytes, "the memory differs from the image");
}

/// A guest whose memory is this file.
fn guest_of(host: &Host, file: File) -> Guest {
    let backing = Backing::File(Arc::new(file));
    let layout = BlockLayout { backing, ..BlockLayout::ram(PAGES * PAGE_SIZE) };
    Guest::of(host, vec![layout], Config::default())
}

#[test]
fn memory_that_refuses_writes_fails_the_restore() {
    let mut host = Host::start();
    let (path, bytes) = image(&host, 1);
    // Pages come into shared memory by other means, to which the limit does not apply.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(file) = require::file_on_disk(folder, PAGES * PAGE_SIZE) else { return };
    let guest = guest_of(&host, file);
    for limit in [0, PAGE_SIZE + 1, PAGES * PAGE_SIZE / 2] {
        host.agent.process().limit_files(Some(limit)).unwrap();
        let status = guest.restored(&path, &eager());
        assert_failed(&status, &[if limit == 0 { "state" } else { "block 0" }, "File too large"]);
        host.agent.process().limit_files(None).unwrap();
        assert!(guest.is_hole());
        assert_eq!(guest.vmm.resumes(), 0);
    }
    assert_restores(&guest, &path, &bytes, &eager());
}

#[test]
fn memory_without_room_fails_the_restore() {
    let Some(tmpfs) = require::tmpfs() else { return };
    let host = Host::start();
    let (path, _) = image(&host, 1);
    let guest = guest_of(&host, tmpfs.file("size=5M", PAGES * PAGE_SIZE).unwrap());
    let status = guest.restored(&path, &eager());
    assert_failed(&status, &["block 0", "No space left on device"]);
    assert!(guest.is_hole());
    assert_eq!(guest.vmm.resumes(), 0);
}

#[test]
fn an_image_truncated_during_an_eager_restore_fails_it() {
    let host = Host::start();
    let (path, bytes) = image(&host, 1);
    let layout = Chain::open(&path).unwrap();
    let layout = layout.newest().layout();
    let (last, sums) = (layout.page(0, PAGES - 1), layout.page_sums() + layout.page_sums_size());
    let guest = Guest::new(&host, PAGES);
    let mut random = Random::new(1);
    let some = random.below(last - FIRST) + FIRST;
    for length in [0, FIRST, some, last + 1, sums - 1] {
        let copy = copy(&host, &path);
        let job = guest.restore(&copy, &slow(eager()));
        guest.reaches(Phase::Restoring);
        File::options().write(true).open(&copy).unwrap().set_len(length).unwrap();
        guest.hurry();
        let status = guest.wait(job);
        let ends = format!("the file ends at byte {length:#x}, ");
        assert_failed(&status, &["copy: block 0: ", " at byte 0x", &ends, "it is truncated"]);
        assert!(guest.is_hole(), "{length:#x}");
        assert_eq!(guest.vmm.resumes(), 0);
    }
    assert_restores(&guest, &path, &bytes, &eager());
}

#[test]
fn an_image_truncated_before_the_guest_runs_leaves_none() {
    if !require::uffd() {
        return;
    }
    let host = Host::start();
    let (path, bytes) = image(&host, 1);
    let guest = Guest::new(&host, PAGES);
    let mut random = Random::new(2);
    for _ in 0..5 {
        let length = random.below(FIRST + PAGES * PAGE_SIZE);
        let copy = copy(&host, &path);
        let (file, memory) =
            (File::options().write(true).open(&copy).unwrap(), guest.memory.clone());
        guest.vmm.on(At::LoadState, move || {
            file.set_len(length).unwrap();
            // A device touches memory. It continues with content on which no guest will ever run.
            memory.blocks()[0].load((PAGES - 1) * PAGE_SIZE).unwrap();
            Ok(())
        });
        let status = guest.restored(&copy, &lazy());
        let ends = format!("the file ends at byte {length:#x}, ");
        assert_failed(&status, &["copy: block 0: ", " at byte 0x", &ends]);
        assert!(guest.is_hole(), "{length:#x}");
        assert_eq!((guest.vmm.resumes(), guest.losses()), (0, 0));
        guest.vmm.off(At::LoadState);
    }
    assert_restores(&guest, &path, &bytes, &lazy());
}

#[test]
fn an_image_truncated_under_a_running_guest_loses_it() {
    if !require::uffd() {
        return;
    }
    let host = Host::start();
    let (path, bytes) = image(&host, 1);
    let mut random = Random::new(3);
    for _ in 0..5 {
        let length = random.below(FIRST + PAGES * PAGE_SIZE);
        let copy = copy(&host, &path);
        let guest = Guest::new(&host, PAGES);
        let job = guest.restore(&copy, &slow(lazy()));
        guest.reaches(Phase::Prefetching);
        File::options().write(true).open(&copy).unwrap().set_len(length).unwrap();
        guest.hurry();
        let ends = format!("the file ends at byte {length:#x}, ");
        assert_failed(&guest.wait(job), &["copy: block 0: ", " at byte 0x", &ends]);
        assert_eq!((guest.vmm.resumes(), guest.losses()), (1, 1));
        assert_right_or_missing(guest.block(), &bytes, "cut off");
    }
    assert_restores(&Guest::new(&host, PAGES), &path, &bytes, &lazy());
}

#[test]
fn an_image_that_another_takes_the_place_of_is_read_to_its_end() {
    let host = Host::start();
    let ((path, bytes), (second, second_bytes)) = (image(&host, 1), image(&host, 2));
    for options in restore_modes() {
        let (image, other) = (copy(&host, &path), host.images.path("other"));
        std::fs::copy(&second, &other).unwrap();
        let guest = Guest::new(&host, PAGES);
        let job = guest.restore(&image, &slow(options.clone()));
        guest.reaches(under_way(&options));
        std::fs::rename(&other, &image).unwrap();
        guest.hurry();
        assert_completed(&guest.wait(job));
        assert!(guest.bytes() == bytes);
        assert_restores(&guest, &image, &second_bytes, &options);
        // The image needs no name either.
        let job = guest.restore(&image, &slow(options.clone()));
        guest.reaches(under_way(&options));
        std::fs::remove_file(&image).unwrap();
        guest.hurry();
        assert_completed(&guest.wait(job));
        assert!(guest.bytes() == second_bytes);
    }
}

#[test]
fn other_files_are_refused_by_name_and_no_memory_is_touched() {
    let host = Host::start();
    let (path, bytes) = image(&host, 1);
    let (empty, fifo, folder) =
        (host.images.path("empty"), host.images.path("fifo"), host.images.path("folder"));
    File::create(&empty).unwrap();
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    std::fs::create_dir(&folder).unwrap();
    let (zeroes, text) = (host.images.path("zeroes"), host.images.path("text"));
    std::fs::write(&zeroes, vec![0; 1 << 20]).unwrap();
    std::fs::write(&text, "image\n".repeat(1000)).unwrap();
    let socket = host.agent.socket().to_owned();
    let guest = Guest::full(&host, PAGES);
    let before = guest.bytes();
    for options in restore_modes() {
        for (path, why) in [
            (empty.clone(), "the file has 0 bytes"),
            (fifo.clone(), ""),
            (folder.clone(), ""),
            ("/dev/zero".into(), ""),
            (zeroes.clone(), "not an image of pageferry"),
            (text.clone(), "not an image of pageferry"),
        ] {
            assert_failed(
                &guest.restored(&path, &options),
                &[&format!("image {}", path.display()), why],
            );
            assert!(guest.bytes() == before, "{}", path.display());
            assert_eq!(guest.vmm.resumes(), 0);
        }
        // A file that does not open is refused before a job starts.
        for (path, why) in [
            (socket.clone(), ""),
            (host.images.path("nothing"), "No such file"),
            (path.join("below"), "Not a directory"),
        ] {
            let refused = guest.client.start_restore(&path, &options).unwrap_err().to_string();
            let expected = format!("path: cannot open {}: {why}", path.display());
            assert!(refused.contains(&expected), "{refused}");
        }
    }
    assert_restores(&guest, &path, &bytes, &eager());
}

#[test]
fn an_image_that_the_agent_may_not_read_is_refused_by_name() {
    let Some(host) = Host::unprivileged() else { return };
    let (path, bytes) = image(&host, 1);
    rustix::fs::chmod(&path, Mode::empty()).unwrap();
    let guest = Guest::new(&host, PAGES);
    for options in restore_modes() {
        let refused = guest.client.start_restore(&path, &options).unwrap_err().to_string();
        assert!(refused.contains("image1: Permission denied"), "{refused}");
    }
    rustix::fs::chmod(&path, Mode::RUSR).unwrap();
    assert_restores(&guest, &path, &bytes, &eager());
    // The working set must not be written to a folder without permission either.
    rustix::fs::chmod(host.images.path(""), Mode::RUSR | Mode::XUSR).unwrap();
    let status = guest.wait(guest.snapshot(&host.images.path("next"), &paused()));
    assert_failed(&status, &["next: cannot create a file in its folder: Permission denied"]);
    guest.assert_free();
}

#[test]
fn a_working_set_without_room_does_not_fail_the_restore() {
    let Some(tmpfs) = require::tmpfs() else { return };
    if !require::uffd() {
        return;
    }
    let host = Host::cramped(tmpfs, 12 << 20);
    let guest = Guest::full(&host, PAGES);
    guest.saved(&host, "image", &paused());
    let right = guest.bytes();
    host.images.fill(0);
    let working_set = host.images.path("touched").to_str().unwrap().to_owned();
    let options = RestoreOptions { working_set, ..lazy() };
    let status = guest.restored(&host.images.path("image"), &options);
    assert_eq!(status.phase, Phase::Completed);
    let warning = format!("working_set {} is not written: ", host.images.path("touched").display());
    assert!(status.error_text().starts_with(&warning), "{}", status.error_text());
    assert!(guest.bytes() == right);
    guest.assert_free();
    assert_eq!(host.images.files(), ["ballast", "image"]);
}
