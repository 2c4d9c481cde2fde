// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files that clones share: where they are, who keeps them, and what becomes of clones if there
//! is no room.

use super::{Clone, content, image};
use pageferry_client::error::chain;
use pageferry_client::{Client, Config, Phase, RestoreOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::program;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{PAGES, assert_completed, cloning, slow};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Guest, Host, SOON};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// An agent whose bases are in this folder.
fn host(bases: &Path) -> Host {
    Host::start_as(Command::new(program()).env("PAGEFERRY_BASES", bases), &[])
}

fn names(bases: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(bases).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_base_is_there_as_long_as_a_clone_has_it() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let bases = folder.path();
    let mut one = Clone::on(host(bases), &image, &cloning());
    let other = Clone::on(host(bases), &image, &cloning());
    assert_eq!(names(bases).len(), 1);
    drop(other);
    // The VMM has it, whatever becomes of its agent.
    one.host.agent.process().kill().unwrap();
    let third = Clone::on(host(bases), &image, &cloning());
    assert_eq!(names(bases).len(), 1);
    assert_eq!((one.word(3), third.word(3)), (content(3), content(3)));
    drop((one, third));
    wait_until("the base to be removed", SOON, || names(bases).is_empty()).unwrap();
}

#[test]
fn what_nobody_removed_is_removed_by_the_next_clone() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let base = |digit: &str| folder.path().join(digit.repeat(64));
    let others = [folder.path().join("notes"), folder.path().join("00ff"), base("g")];
    for file in others.iter().chain([&base("0")]) {
        std::fs::write(file, [1; 4096]).unwrap();
    }
    // Nobody waits for whoever opens the other end of a pipe, and a link is no base.
    let pipe = std::ffi::CString::new(base("a").into_os_string().into_encoded_bytes()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    std::os::unix::fs::symlink(&others[0], base("b")).unwrap();
    let _clone = Clone::on(host(folder.path()), &image, &cloning());
    assert!(!base("0").exists());
    assert!(others.iter().all(|file| file.exists()));
}

#[test]
fn an_image_that_was_replaced_has_another_base() {
    if !require::uffd() {
        return;
    }
    let (host_of_image, path) = image();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let before = Clone::on(host(folder.path()), &path, &cloning());
    before.guest.write(3, 5);
    let replace = pageferry_client::SnapshotOptions { replace: true, ..paused() };
    let job = before.guest.client.start_snapshot(&path, &replace).unwrap().job;
    assert_eq!(before.guest.wait(job).error_text(), "");
    let after = Clone::on(host(folder.path()), &path, &cloning());
    assert_eq!(names(folder.path()).len(), 2);
    assert_eq!((before.word(6), after.word(3), after.word(6)), (content(6), 5, content(6)));
    drop(host_of_image);
}

#[test]
fn a_folder_that_others_can_change_is_refused() {
    let (_host, image) = image();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o770)).unwrap();
    let host = host(folder.path());
    let (client, _) = Client::connect(host.agent.socket(), Config::default()).unwrap();
    let refused = chain(&client.open_base(&image).unwrap_err());
    assert!(refused.contains("others can change it (mode 770)"), "{refused}");
    assert!(refused.contains("PAGEFERRY_BASES"), "{refused}");
}

#[test]
fn a_clone_records_what_it_touches_of_a_base_that_is_complete() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let folders = [(), ()].map(|()| tempfile::tempdir_in("/dev/shm").unwrap());
    let complete = Clone::on(host(folders[0].path()), &image, &cloning());
    let working_set = image.with_extension("touched").to_str().unwrap().to_owned();
    let options = RestoreOptions { working_set, ..cloning() };
    let recording = host(folders[0].path());
    let guest = Guest::clone_of(&recording, &image);
    let job = guest.restore(&image, &slow(options.clone()));
    guest.reaches(Phase::Prefetching);
    for page in [3, 600, 1800] {
        assert_eq!(guest.block().load(page * PAGE_SIZE + 8).unwrap(), content(page));
    }
    guest.hurry();
    assert_completed(&guest.wait(job));
    // Whoever has nothing yet reads these pages first.
    let other = host(folders[1].path());
    let reading = Guest::clone_of(&other, &image);
    let status = reading.restored(&image, &options);
    assert_completed(&status);
    assert_eq!(status.counters.working_set_pages, 3, "{status:?}");
    drop((guest, reading, complete));
}

/// An agent whose bases have room for this many bytes.
fn cramped(folder: &Path, bytes: u64) -> Option<Host> {
    let tmpfs = require::tmpfs()?;
    let mut command = tmpfs.command(folder, bytes, program());
    Some(Host::start_as(command.env("PAGEFERRY_BASES", folder), &[]))
}

#[test]
fn a_clone_gets_pages_of_its_own_if_its_base_has_no_room() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let (_host, image) = image();
    let content_pages = (0..PAGES).filter(|page| content(*page) != 0).count() as u64;
    let Some(host) = cramped(folder.path(), content_pages / 3 * PAGE_SIZE) else { return };
    if !require::uffd() {
        return;
    }
    // The root of the mount has the mode of /tmp.
    let root = format!("/proc/{}/root{}", host.agent.id(), folder.path().display());
    std::fs::set_permissions(root, PermissionsExt::from_mode(0o700)).unwrap();
    let clone = Clone::on(host, &image, &cloning());
    for page in 0..PAGES {
        assert_eq!(clone.word(page), content(page), "{page:#x}");
    }
    clone.guest.client.free(&[clone.guest.range(0, PAGES / 2)]).unwrap();
    for page in 0..PAGES {
        let expected = if page < PAGES / 2 { 0 } else { content(page) };
        assert_eq!(clone.word(page), expected, "{page:#x}");
    }
    clone.guest.check(&clone.guest.saved(&clone.host, "saved", &paused()));
}

#[test]
fn a_base_for_whose_bitmaps_there_is_no_room_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_host, image) = image();
    let Some(host) = cramped(folder.path(), PAGE_SIZE) else { return };
    let root = format!("/proc/{}/root{}", host.agent.id(), folder.path().display());
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::write(format!("{root}/ballast"), [1; PAGE_SIZE as usize]).unwrap();
    // It is in use, so that it stays.
    let ballast = std::fs::File::open(format!("{root}/ballast")).unwrap();
    rustix::fs::flock(&ballast, rustix::fs::FlockOperation::LockShared).unwrap();
    let (client, _) = Client::connect(host.agent.socket(), Config::default()).unwrap();
    let refused = chain(&client.open_base(&image).unwrap_err());
    assert!(refused.contains("no room for") && refused.contains("PAGEFERRY_BASES"), "{refused}");
}
