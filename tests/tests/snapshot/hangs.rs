// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that hang in a snapshot, and are killed when the client gives them up.

use pageferry_client::{Phase, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{PAGES, background, endless, snapshot_modes};
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::{Guest, Host, SOON, lock};
use std::time::Duration;

/// Request timeout of the VMM. It also limits a handshake, so it is long enough for a busy machine
/// on which nothing hangs.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Checks that the agent was killed and that nothing is left of its job. Then starts another one.
fn replace(host: &mut Host, before: &[(String, Vec<u8>)]) {
    assert!(!host.agent.process().wait(SOON).unwrap().success());
    assert!(host.images.bytes() == before, "{:?}", host.images.files());
    host.replace_agent();
}

#[test]
fn a_guest_writes_everywhere_after_its_agent_hangs() {
    let modes = snapshot_modes();
    for options in modes {
        for increment in [false, true] {
            let mut host = Host::start();
            let guest = Guest::hasty(&host, PAGES, TIMEOUT);
            let base = host.images.path("base");
            guest.saved(&host, "base", &tracked(paused()));
            guest.fill(0..PAGES, 2);
            let before = host.images.bytes();
            let options = if increment { on(&base, options.clone()) } else { options.clone() };
            eprintln!("{options:?}");
            guest.snapshot(&host.images.path("image"), &endless(options.clone()));
            guest.reaches(Phase::Saving);
            host.agent.process().freeze().unwrap();
            // The hang is found without a request.
            wait_until("the agent to be lost", SOON, || !lock(&guest.vmm.asked).losses.is_empty())
                .unwrap();
            assert_eq!(lock(&guest.vmm.asked).losses, ["agent"]);
            guest.assert_free();
            guest.fill(0..PAGES, 3);
            replace(&mut host, &before);
            guest.reattach(&host);
            let next = SnapshotOptions { base: String::new(), ..options.clone() };
            guest.check(&guest.saved(&host, "next", &next));
            guest.assert_free();
        }
    }
}

#[test]
fn threads_waiting_to_write_go_on_after_the_agent_hangs() {
    if !require::uffd() {
        return;
    }
    let mut host = Host::start();
    let guest = Guest::hasty(&host, PAGES, TIMEOUT);
    guest.snapshot(&host.images.path("image"), &endless(background()));
    guest.reaches(Phase::Saving);
    host.agent.process().freeze().unwrap();
    // These threads wait for the agent until it is given up.
    let memory = guest.memory.clone();
    let writing = std::thread::spawn(move || {
        let block = &memory.blocks()[0];
        std::thread::scope(|scope| {
            for first in 0..4 {
                scope.spawn(move || {
                    let pages = (first..PAGES).step_by(4);
                    pages.for_each(|page| block.store(page * PAGE_SIZE, page).unwrap());
                });
            }
        });
    });
    wait_until("all to be written", SOON, || writing.is_finished()).unwrap();
    writing.join().unwrap();
    guest.assert_free();
    replace(&mut host, &[]);
    guest.reattach(&host);
    guest.check(&guest.saved(&host, "next", &background()));
}
