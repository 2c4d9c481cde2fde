// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restores that an operator starts in a VMM that already runs a guest.

use super::scene::image;
use pageferry_client::{HookError, Ownership, Punch, RestoreMode, Trackers};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::process::program;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, background, restore_modes,
};
use pageferry_tests::scenario::images::{flip, on, paused, tracked};
use pageferry_tests::scenario::{At, Guest, Host, lock};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn operator(host: &Host, path: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(program());
    command
        .arg("restore")
        .arg("--socket")
        .arg(host.agent.socket())
        .arg(path)
        .args(more)
        .stdin(Stdio::null());
    command.output().unwrap()
}

/// Checks that the operator gets the reason, that the old guest keeps running, and that its tracked
/// changes are still known.
#[track_caller]
fn assert_in_vain(host: &Host, guest: &Guest, path: &Path, more: &[&str], why: &str) {
    let (before, files) = (guest.bytes(), host.images.files());
    let resumes = guest.vmm.resumes();
    guest.write(50, resumes + 1);
    let output = operator(host, path, more);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(why) && output.stdout.is_empty(), "{output:?}");
    assert_failed(&host.status(), &[why]);
    assert_eq!(
        (guest.client.ownership(), guest.vmm.resumes(), guest.losses()),
        (Ownership::Ours, resumes, 0)
    );
    guest.assert_free();
    guest.client.discard(&[guest.range(60, 2)], Punch::Yes).unwrap();
    guest.client.populate(&[guest.range(60, 2)]).unwrap();
    assert!(guest.bytes()[80 * PAGE_SIZE as usize..] == before[80 * PAGE_SIZE as usize..]);
    let chain = guest.saved(host, "after", &on(&host.images.path("tracked"), tracked(paused())));
    guest.check(&chain);
    drop(chain);
    // The next increment is based on this image.
    std::fs::remove_file(host.images.path("after")).unwrap();
    std::fs::remove_file(host.images.path("tracked")).unwrap();
    guest.saved(host, "tracked", &tracked(paused()));
    assert_eq!(host.images.files(), files);
}

#[test]
fn a_restore_that_the_vmm_refuses_changes_nothing() {
    let host = Host::start();
    let path = image(&host);
    let guest = Guest::full(&host, PAGES);
    guest.fill(0..PAGES, 5);
    guest.saved(&host, "tracked", &tracked(paused()));
    for more in [&[][..], &["--lazy"]] {
        assert_in_vain(&host, &guest, &path, more, "this VMM does not wait for");
    }
    guest.vmm.on(At::AcceptGuest, || Err(HookError::new("not on a Sunday")));
    for more in [&[][..], &["--lazy"]] {
        assert_in_vain(&host, &guest, &path, more, "not on a Sunday");
    }
}

#[test]
fn restoring_a_useless_image_costs_no_guest() {
    let host = Host::start();
    let path = image(&host);
    let guest = Guest::full(&host, PAGES);
    guest.fill(0..PAGES, 5);
    guest.saved(&host, "tracked", &tracked(paused()));
    guest.vmm.on(At::AcceptGuest, || panic!("the VMM would have given its guest up"));
    let length = std::fs::metadata(&path).unwrap().len();
    let copy = host.images.path("copy");
    let layout = pageferry_agent::image::Chain::open(&path).unwrap();
    let layout = layout.newest().layout();
    let places = [0, 100, layout.states(), layout.extent_sums(), layout.contents(), length - 1];
    for more in [&[][..], &["--lazy"]] {
        for place in places {
            std::fs::copy(&path, &copy).unwrap();
            flip(&copy, place, 0xff);
            assert_in_vain(&host, &guest, &copy, more, "image ");
        }
        for length in [0, 5000, length - 1] {
            std::fs::copy(&path, &copy).unwrap();
            File::options().write(true).open(&copy).unwrap().set_len(length).unwrap();
            assert_in_vain(&host, &guest, &copy, more, "truncated");
        }
        // No job starts for this one.
        let output = operator(&host, &host.images.path("nothing"), more);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("nothing: No such file"), "{said}");
    }
}

#[test]
fn an_operator_restores_into_a_vmm_that_gives_its_guest_up() {
    let host = Host::start();
    let path = image(&host);
    for options in restore_modes() {
        let guest = Guest::full(&host, PAGES);
        guest.fill(0..PAGES, 5);
        if require::uffd() {
            // The tracker has the mappings registered, also between two images.
            guest.client.set_trackers(Trackers::WRITE_PROTECT).unwrap();
        }
        guest.saved(&host, "tracked", &tracked(paused()));
        let vmm = guest.vmm.clone();
        guest.vmm.on(At::AcceptGuest, move || {
            lock(&vmm.asked).paused = true;
            Ok(())
        });
        let more: &[&str] = if options.mode == RestoreMode::Lazy { &["--lazy"] } else { &[] };
        let output = operator(&host, &path, more);
        assert!(output.status.success(), "{output:?}");
        assert_completed(&host.status());
        guest.assert_holds(1);
        guest.assert_free();
        // The changes between the saved guest and this one are not known.
        let increment = on(&host.images.path("tracked"), tracked(paused()));
        let status = guest.wait(guest.snapshot(&host.images.path("increment"), &increment));
        assert_failed(&status, &["a restore was started"]);
        std::fs::remove_file(host.images.path("tracked")).unwrap();
        if require::uffd() {
            guest.check(&guest.saved(&host, "next", &background()));
            std::fs::remove_file(host.images.path("next")).unwrap();
        }
    }
}
