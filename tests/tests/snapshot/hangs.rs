//! Agents that hang, and are killed when they are given up.

use pageferry_client::{Ownership, Phase, RestoreMode, SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::random::page_content;
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, background, eager, endless, lazy, slow,
};
use pageferry_tests::scenario::images::{on, paused, tracked};
use pageferry_tests::scenario::{Guest, Host, SOON, lock};
use std::time::Duration;

/// The VMM waits no longer for its agent: longer than a busy machine takes where nothing hangs,
/// since a handshake has no more.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The agent was killed, and nothing is left of its job. Another takes its place.
fn replace(host: &mut Host, before: &[(String, Vec<u8>)]) {
    assert!(!host.agent.process().wait(SOON).unwrap().success());
    assert!(host.images.bytes() == before, "{:?}", host.images.files());
    host.replace_agent();
}

#[test]
fn an_agent_that_hangs_in_a_snapshot_is_given_up_and_the_guest_writes_everywhere() {
    let modes = if require::uffd() { vec![background(), paused()] } else { vec![paused()] };
    for options in modes {
        for increment in [false, true] {
            let mut host = Host::new();
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
            // Nobody asks it anything: that it hangs is found all the same.
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
fn an_agent_that_hangs_is_given_up_while_threads_wait_to_write() {
    if !require::uffd() {
        return;
    }
    let mut host = Host::new();
    let guest = Guest::hasty(&host, PAGES, TIMEOUT);
    guest.snapshot(&host.images.path("image"), &endless(background()));
    guest.reaches(Phase::Saving);
    host.agent.process().freeze().unwrap();
    // They wait for the agent until it is given up.
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

#[test]
fn an_agent_that_hangs_in_a_restore_is_given_up_and_the_next_is_complete() {
    let modes = if require::uffd() { vec![eager(), lazy()] } else { vec![eager()] };
    for options in modes {
        let mut host = Host::new();
        let source = Guest::full(&host, PAGES);
        source.saved(
            &host,
            "source",
            &SnapshotOptions { mode: SnapshotMode::Paused, ..background() },
        );
        drop(source);
        let (path, before) = (host.images.path("source"), host.images.bytes());
        let guest = Guest::hasty(&host, PAGES, TIMEOUT);
        let runs = options.mode == RestoreMode::Lazy;
        guest.restore(&path, &slow(options.clone()));
        guest.reaches(if runs { Phase::Prefetching } else { Phase::Restoring });
        host.agent.process().freeze().unwrap();
        if !runs {
            // Nobody waits for it but the VMM, which asks.
            guest.client.status().unwrap_err();
        }
        wait_until("the agent to be lost", SOON, || {
            lock(&guest.vmm.asked).losses.last() == Some(&"agent")
        })
        .unwrap();
        assert_eq!((guest.losses(), guest.vmm.resumes()), if runs { (1, 1) } else { (0, 0) });
        let ownership = if runs { Ownership::Ours } else { Ownership::Awaiting };
        assert_eq!(guest.client.ownership(), ownership);
        replace(&mut host, &before);
        let guest = if runs {
            drop(guest);
            Guest::new(&host, PAGES)
        } else {
            guest.reattach(&host);
            guest
        };
        assert_completed(&guest.restored(&path, &options));
        let same = |page| guest.block().read_page(page).unwrap() == page_content(1, page);
        assert!((0..PAGES).all(same));
    }
}
