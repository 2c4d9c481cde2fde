// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restores that are cancelled, or that fail because of a hook.

use super::scene::image;
use pageferry_client::{HookError, MIN_BANDWIDTH, Ownership, Phase, RestoreMode, RestoreOptions};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, eager, lazy, restore_modes, slow,
};
use pageferry_tests::scenario::{At, Guest, Host, SOON};

#[test]
fn a_cancelled_restore_leaves_nothing() {
    let host = Host::start();
    let path = image(&host);
    let guest = Guest::new(&host, PAGES);
    // None of these jobs ends by itself before the cancel, even on a slow machine.
    for bandwidth in [MIN_BANDWIDTH, 1 << 20] {
        let job = guest.restore(&path, &RestoreOptions { bandwidth, ..eager() });
        guest.reaches(Phase::Restoring);
        guest.client.cancel().unwrap();
        assert_eq!(guest.wait(job).phase, Phase::Cancelled);
        assert!(guest.is_hole());
        assert_eq!((guest.vmm.resumes(), guest.client.ownership()), (0, Ownership::Awaiting));
    }
    assert_completed(&guest.restored(&path, &eager()));
    assert_eq!(guest.vmm.resumes(), 1);
    guest.assert_holds(1);
    if !require::uffd() {
        return;
    }
    // After the commit point.
    let job = guest.restore(&path, &slow(lazy()));
    guest.reaches(Phase::Prefetching);
    let refused = guest.client.cancel().unwrap_err().to_string();
    assert!(refused.contains("too late to cancel: the guest that is restored runs"), "{refused}");
    guest.hurry();
    assert_completed(&guest.wait(job));
    guest.assert_free();
}

#[test]
fn failed_hooks_leave_no_guest() {
    let host = Host::start();
    let path = image(&host);
    for options in restore_modes() {
        let guest = Guest::new(&host, PAGES);
        for at in [At::LoadState, At::MemoryPending] {
            if at == At::MemoryPending && options.mode == RestoreMode::Eager {
                continue;
            }
            guest.vmm.on(at, || Err(HookError::new("it is raining")));
            assert_failed(&guest.restored(&path, &options), &["it is raining"]);
            assert!(guest.is_hole());
            assert_eq!((guest.vmm.resumes(), guest.losses()), (0, 0));
            guest.vmm.off(at);
        }
        assert_completed(&guest.restored(&path, &options));
        guest.assert_holds(1);
        wait_until("the guest to run", SOON, || guest.vmm.resumes() == 1).unwrap();
        guest.assert_free();
    }
}
