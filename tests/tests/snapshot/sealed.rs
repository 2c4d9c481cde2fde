// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents with a key: what they save is sealed, and they restore nothing else.

use pageferry_agent::image::{Chain, ImageKey};
use pageferry_client::{JobStatus, Phase, RestoreOptions};
use pageferry_protocol::image::working_set::{SealedWorkingSet, WorkingSet};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, eager, lazy, restore_modes, snapshot_modes,
};
use pageferry_tests::scenario::images::{flip, on, paused, tracked};
use pageferry_tests::scenario::{Guest, Host};
use std::fs::Permissions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Keys in files.
struct Keys(tempfile::TempDir);

impl Keys {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The file of the key that has 32 times this byte.
    fn file(&self, byte: u8) -> PathBuf {
        let path = self.0.path().join(format!("{byte}.key"));
        std::fs::write(&path, format!("{byte:02x}").repeat(32) + "\n").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn host(&self, byte: u8) -> Host {
        Host::start_with(&["--image-key", self.file(byte).to_str().unwrap()])
    }
}

fn key(byte: u8) -> ImageKey {
    ImageKey::parse(&[byte; 32]).unwrap()
}

fn save(guest: &Guest, path: &Path, options: &pageferry_client::SnapshotOptions) -> Chain {
    assert_completed(&guest.wait(guest.snapshot(path, options)));
    Chain::open(path).expect_err("it is sealed");
    Chain::open_with(path, Some(&key(1))).unwrap()
}

#[test]
fn a_sealed_guest_is_saved_and_restored_in_every_mode() {
    let host = Keys::new().host(1);
    for (number, options) in snapshot_modes().into_iter().enumerate() {
        let path = |name: &str| host.images.path(&format!("{name}-{number}"));
        let guest = Guest::full(&host, PAGES);
        guest.check(&save(&guest, &path("full"), &tracked(options.clone())));
        guest.fill(0..300, 2);
        guest.client.discard(&[guest.range(700, 20)], pageferry_client::Punch::Yes).unwrap();
        let chain = save(&guest, &path("next"), &on(&path("full"), options));
        guest.check(&chain);
        let right = guest.bytes();
        for mode in restore_modes() {
            guest.fill(0..PAGES, 9);
            assert_completed(&guest.restored(&path("next"), &mode));
            assert!(guest.bytes() == right, "{mode:?}");
            guest.check(&chain);
        }
    }
}

/// Refused before memory changes.
#[track_caller]
fn refuses(guest: &Guest, path: &Path, with: &str) {
    for mode in restore_modes() {
        assert_failed(&guest.restored(path, &mode), &[with]);
        guest.assert_holds(1);
    }
}

#[test]
fn an_agent_restores_only_what_is_sealed_with_its_key() {
    let (keys, plain) = (Keys::new(), Host::start());
    let (one, other) = (keys.host(1), keys.host(2));
    let hosts = [&plain, &one, &other];
    let guests = hosts.map(|host| Guest::full(host, PAGES));
    let paths = hosts.map(|host| host.images.path("image"));
    for (guest, path) in guests.iter().zip(&paths) {
        assert_completed(&guest.wait(guest.snapshot(path, &tracked(paused()))));
    }
    // None of them is the base of an increment.
    for (at, base, with) in [(1, 0, "it is not sealed"), (1, 2, "the key does not fit")] {
        let options = on(&paths[base], paused());
        let status = guests[at].wait(guests[at].snapshot(&one.images.path("next"), &options));
        assert_failed(&status, &[with]);
    }
    assert!(!one.images.path("next").exists());
    refuses(&guests[0], &paths[1], "it is sealed, and can be used only with its key");
    refuses(&guests[1], &paths[0], "it is not sealed, so anybody may have made it");
    refuses(&guests[1], &paths[2], "the key does not fit this image");
}

#[test]
fn a_sealed_image_that_was_changed_never_reaches_the_guest() {
    let host = Keys::new().host(1);
    let (guest, path) = (Guest::full(&host, PAGES), host.images.path("image"));
    let chain = save(&guest, &path, &paused());
    let layout = chain.newest().layout();
    for at in [layout.page(0, 700) + 9, layout.page_sum(0, 700), layout.page_sum(0, 700) + 20] {
        flip(&path, at, 1);
        assert_failed(&guest.restored(&path, &eager()), &["page 0x2bc,", "seal is broken"]);
        assert!(guest.is_hole());
        flip(&path, at, 1);
    }
    assert_completed(&guest.restored(&path, &eager()));
    guest.assert_holds(1);
}

fn recorded(set: &Path) -> RestoreOptions {
    RestoreOptions { working_set: set.to_str().unwrap().into(), workers: 1, ..lazy() }
}

/// Restores lazily with this working set, while the VMM touches a page before its guest runs.
fn restored(guest: &Guest, path: &Path, set: &Path) -> JobStatus {
    let status = guest.restored(path, &recorded(set));
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    status
}

#[test]
fn the_working_set_of_a_sealed_image_is_sealed() {
    if !require::uffd() {
        return;
    }
    let host = Keys::new().host(1);
    let (guest, path) = (Guest::full(&host, PAGES), host.images.path("image"));
    let chain = save(&guest, &path, &paused());
    let image = chain.newest().header().id;
    let set = host.images.path("touched");
    // One in plain text is ignored, whatever it says.
    let plain = WorkingSet { image, runs: vec![(0, PageRange::new(0, 100))] }.encode();
    std::fs::write(&set, &plain).unwrap();
    assert_eq!(restored(&guest, &path, &set).counters.working_set_pages, 0);
    // One that is sealed is used.
    let bytes = sealed(plain);
    std::fs::write(&set, &bytes).unwrap();
    assert_eq!(restored(&guest, &path, &set).counters.working_set_pages, 100);
    assert!(std::fs::read(&set).unwrap() == bytes, "it is never changed");
    // One that somebody has changed is ignored.
    let mut changed = SealedWorkingSet::decode(&bytes).unwrap();
    changed.bytes[20] ^= 1;
    std::fs::write(&set, changed.encode()).unwrap();
    assert_eq!(restored(&guest, &path, &set).counters.working_set_pages, 0);
    guest.assert_holds(1);
}

/// What a restore with the key writes.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let sealer = pageferry_agent::image::seal::Sealer::new(&key(1)).unwrap();
    let seal = sealer.seal(pageferry_protocol::image::Place::WorkingSet, &mut bytes).unwrap();
    SealedWorkingSet { salt: sealer.salt(), seal, bytes }.encode()
}

/// What an agent says that does not start with these arguments.
#[track_caller]
fn does_not_start(arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(program());
    let started = AgentProcess::start_with(&mut command, folder.path(), "agent", arguments);
    started.unwrap_err().to_string()
}

#[test]
fn an_agent_without_a_usable_key_does_not_start() {
    let keys = Keys::new();
    let open = keys.file(1);
    std::fs::set_permissions(&open, Permissions::from_mode(0o644)).unwrap();
    let short = keys.file(2);
    std::fs::write(&short, "abc").unwrap();
    let not_hex = keys.file(3);
    std::fs::write(&not_hex, "x".repeat(64)).unwrap();
    let missing = keys.0.path().join("missing");
    for (path, expected) in [
        (open, "it has mode 644 and belongs to user"),
        (short, "it has 3 bytes, but a key is 32 bytes, or 64 hexadecimal digits"),
        (not_hex, "digit 0 is none of 0 to 9 and a to f"),
        (missing, "cannot open it: No such file"),
    ] {
        let path = path.to_str().unwrap();
        let said = does_not_start(&["--image-key", path]);
        assert!(said.contains(&format!("--image-key {path}: {expected}")), "{said}");
    }
    assert!(does_not_start(&["--image-key", "fd:x"]).contains("is no number of a descriptor"));
}

#[test]
fn a_key_comes_by_a_descriptor_that_one_agent_after_another_inherits() {
    let file = std::fs::File::open(Keys::new().file(1)).unwrap();
    // Only this process and its children have it. Another test starts agents that do not look.
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let name = format!("fd:{}", file.as_raw_fd());
    for _ in 0..2 {
        let host = Host::start_with(&["--image-key", &name]);
        let guest = Guest::full(&host, PAGES);
        save(&guest, &host.images.path("image"), &paused());
    }
}
