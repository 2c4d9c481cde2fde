//! Files that fail, shrink, or are none.

use pageferry_agent::image::Chain;
use pageferry_client::{Config, Phase, RestoreMode, RestoreOptions, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::files::unsealed_memfd;
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, background, both, byte_of, eager, endless, lazy, slow,
};
use pageferry_tests::scenario::images::{assert_right_or_missing, on, paused, tracked};
use pageferry_tests::scenario::{At, Guest, Host, lock};
use rustix::fs::{CWD, FileType, Mode};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where pages begin in an image.
const FIRST: u64 = 2 << 20;

/// The modes of a snapshot that this machine has, of those that an operator may ask for.
fn modes() -> Vec<SnapshotOptions> {
    if require::uffd() { vec![background(), paused()] } else { vec![paused()] }
}

/// The agent may write again; the guest runs, free of protection, and the images are those of
/// before.
#[track_caller]
fn assert_nothing_happened(host: &mut Host, guest: &Guest, before: &[(String, Vec<u8>)]) {
    host.agent.process().limit_files(None).unwrap();
    guest.assert_free();
    assert!(host.images.bytes() == before, "{:?}", host.images.files());
}

/// An image of a guest whose pages are all full, and what is in them.
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

/// A guest can still be restored from a good image, and is the right one.
#[track_caller]
fn assert_restores(guest: &Guest, path: &Path, bytes: &[u8], options: &RestoreOptions) {
    let resumes = guest.vmm.resumes();
    assert_completed(&guest.restored(path, options));
    assert_eq!(guest.vmm.resumes(), resumes + 1);
    assert!(guest.bytes() == bytes, "the memory is not what was saved");
}

#[test]
fn a_file_that_may_not_grow_further_fails_the_snapshot_and_not_the_agent() {
    let mut host = Host::new();
    let guest = Guest::new(&host, PAGES);
    guest.fill(0..1, 1);
    let base = host.images.path("base");
    // Where the file ends while its pages are written.
    let end = guest.saved(&host, "base", &tracked(paused())).newest().layout().contents();
    guest.fill(0..PAGES, 2);
    let before = host.images.bytes();
    for options in modes() {
        // The pages, and not what comes after them; nor then the first of it, nor the state of the
        // VMM.
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
                        (status.counters.pages_sent, byte_of(&status.error)),
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
fn a_file_that_may_not_be_written_from_here_on_fails_the_snapshot_and_not_the_agent() {
    let mut host = Host::new();
    let guest = Guest::full(&host, PAGES);
    let base = host.images.path("base");
    guest.saved(&host, "base", &tracked(paused()));
    guest.fill(0..PAGES, 2);
    let before = host.images.bytes();
    for options in modes() {
        for cached in [false, true] {
            let options = endless(SnapshotOptions { cached, ..options.clone() });
            for options in [options.clone(), on(&base, tracked(options))] {
                let job = guest.snapshot(&host.images.path("image"), &options);
                guest.reaches(Phase::Saving);
                // Its length is as it will be; what is written past the limit is refused all the
                // same.
                host.agent.process().limit_files(Some(FIRST)).unwrap();
                guest.hurry();
                let status = guest.wait(job);
                assert_failed(&status, &["image: cannot write", "File too large"]);
                // What is written first, and not what comes after it and would be refused as well.
                let byte = byte_of(&status.error);
                assert!(
                    (FIRST..FIRST + PAGES * PAGE_SIZE).contains(&byte),
                    "no page: {}",
                    status.error
                );
                assert_nothing_happened(&mut host, &guest, &before);
            }
        }
    }
    let chain = guest.saved(&host, "next", &on(&base, paused()));
    guest.check(&chain);
}

#[test]
fn memory_that_may_not_be_written_to_fails_the_restore_and_not_the_agent() {
    let mut host = Host::new();
    let (path, bytes) = image(&host, 1);
    let guest = Guest::new(&host, PAGES);
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
fn an_image_that_is_cut_off_while_all_of_it_is_read_fails_the_restore() {
    let host = Host::new();
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
fn an_image_that_is_cut_off_before_a_guest_runs_that_it_is_read_for_leaves_none() {
    if !require::uffd() {
        return;
    }
    let host = Host::new();
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
            // A device does, which goes on with what nobody will ever run on.
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
fn an_image_that_is_cut_off_under_a_guest_that_runs_loses_it_and_nothing_wrong_is_there() {
    if !require::uffd() {
        return;
    }
    let host = Host::new();
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
    let host = Host::new();
    let ((path, bytes), (second, second_bytes)) = (image(&host, 1), image(&host, 2));
    for options in both() {
        let (image, other) = (copy(&host, &path), host.images.path("other"));
        std::fs::copy(&second, &other).unwrap();
        let guest = Guest::new(&host, PAGES);
        let job = guest.restore(&image, &slow(options.clone()));
        guest.reaches(if options.mode == RestoreMode::Lazy {
            Phase::Prefetching
        } else {
            Phase::Restoring
        });
        std::fs::rename(&other, &image).unwrap();
        guest.hurry();
        assert_completed(&guest.wait(job));
        assert!(guest.bytes() == bytes);
        assert_restores(&guest, &image, &second_bytes, &options);
        // Nor does it have to have a name.
        let job = guest.restore(&image, &slow(options.clone()));
        guest.reaches(if options.mode == RestoreMode::Lazy {
            Phase::Prefetching
        } else {
            Phase::Restoring
        });
        std::fs::remove_file(&image).unwrap();
        guest.hurry();
        assert_completed(&guest.wait(job));
        assert!(guest.bytes() == second_bytes);
    }
}

#[test]
fn what_is_no_image_is_refused_by_name_and_the_memory_is_left_alone() {
    let host = Host::new();
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
    for options in both() {
        for (path, why) in [
            (empty.clone(), "the file has 0 bytes"),
            (fifo.clone(), ""),
            (folder.clone(), ""),
            ("/dev/zero".into(), ""),
            (socket.clone(), ""),
            (zeroes.clone(), "not an image of pageferry"),
            (text.clone(), "not an image of pageferry"),
            (host.images.path("nothing"), "cannot open it: No such file"),
            (path.join("below"), "cannot open it: Not a directory"),
        ] {
            assert_failed(
                &guest.restored(&path, &options),
                &[&format!("image {}", path.display()), why],
            );
            assert!(guest.bytes() == before, "{}", path.display());
            assert_eq!(guest.vmm.resumes(), 0);
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
    for options in both() {
        assert_failed(
            &guest.restored(&path, &options),
            &["image1: cannot open it: Permission denied"],
        );
    }
    rustix::fs::chmod(&path, Mode::RUSR).unwrap();
    assert_restores(&guest, &path, &bytes, &eager());
    // Nor may it be written where it is not allowed to.
    rustix::fs::chmod(host.images.path(""), Mode::RUSR | Mode::XUSR).unwrap();
    let status = guest.wait(guest.snapshot(&host.images.path("next"), &paused()));
    assert_failed(&status, &["next: cannot create a file in its folder: Permission denied"]);
    guest.assert_free();
}

#[test]
fn memory_that_is_cut_off_while_it_is_saved_is_named_and_the_guest_runs() {
    let host = Host::new();
    for options in modes() {
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
