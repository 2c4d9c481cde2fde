// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hooks of the VMM that wait for memory of a damaged image: they get an error, and the VMM learns
//! that memory is lost.

use pageferry_client::{Error, Ownership, RestoreOptions};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::random::page_content;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{PAGES, assert_completed, assert_failed, lazy, slow};
use pageferry_tests::scenario::images::{flip, paused};
use pageferry_tests::scenario::{At, Guest, Host, SOON, Touch, lock};
use std::sync::mpsc::channel;
use std::time::Duration;

/// The page that the hook waits for.
const WANTED: u64 = 700;

#[test]
fn a_resume_waiting_for_a_damaged_page_gets_an_error() {
    if !require::uffd() {
        return;
    }
    let host = Host::start();
    let chain = Guest::full(&host, PAGES).saved(&host, "image", &paused());
    let (path, at) = (host.images.seen("image"), chain.newest().layout().page(0, WANTED) + 9);
    flip(&path, at, 1 << 3);
    let guest = Guest::new(&host, PAGES);
    let (mapping, (say, found)) = (guest.block().mapping().clone(), channel());
    guest.vmm.on(At::Resume, move || {
        let _ = say.send(Touch::of(mapping.clone(), WANTED).found());
        Ok(())
    });
    let options = RestoreOptions { hook_timeout: Duration::from_secs(5), ..slow(lazy()) };
    let status = guest.restored(&host.images.path("image"), &options);
    assert_failed(&status, &["block 0: page 0x2bc", "checksum"]);
    let error = found.recv_timeout(SOON).unwrap().unwrap_err();
    assert!(error.to_string().contains("Bad address"), "{error}");
    wait_until("the VMM to be told", SOON, || guest.losses() == 1).unwrap();
    assert_eq!(lock(&guest.vmm.asked).losses, ["memory"], "the agent still lives");
    assert_eq!(guest.client.ownership(), Ownership::Ours);
    let refused = guest.client.start_snapshot(&host.images.path("after"), &paused()).unwrap_err();
    assert!(matches!(refused, Error::MemoryLost), "{refused:?}");

    // A good image can be restored.
    flip(&path, at, 1 << 3);
    guest.vmm.off(At::Resume);
    assert_completed(&guest.restored(&host.images.path("image"), &lazy()));
    assert!((0..PAGES).all(|page| guest.block().read_page(page).unwrap() == page_content(1, page)));
    guest.check(&guest.saved(&host, "after", &paused()));
}
