// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The destination's agent or VMM is killed or hangs while the guest runs there and waits for its
//! memory.

use super::scene::{PAGES, Scene, Side, TIMEOUT, WANTED_TOO, empty, postcopy, stamped};
use pageferry_client::{Mode, OutgoingOptions, Ownership, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{Agent, SOON, WIRES, Wire, lock, moves_to};

/// The kernel gets EFAULT if a guest would get SIGBUS.
fn assert_lost(found: std::io::Result<u64>) {
    let error = found.unwrap_err();
    assert!(error.to_string().contains("Bad address"), "{error}");
}

fn assert_memory_lost(scene: &Scene) {
    let vmm = &scene.destination.vmm;
    wait_until("the memory and the agent to be lost", SOON, || lock(&vmm.asked).losses.len() == 2)
        .unwrap();
    assert_eq!(lock(&vmm.asked).losses, ["memory", "agent"]);
    assert_eq!(lock(&vmm.asked).complete, 0);
    assert_eq!(
        scene.destination.client.ownership(),
        Ownership::Ours,
        "the guest was resumed there"
    );
}

#[test]
fn a_killed_destination_agent_loses_the_memory_and_waiters_err() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene =
            Scene::between(wire, Side::near(stamped()), Side::far(empty()), &postcopy());
        let (_request, touch) = scene.until_runs();
        // No access fails before the VMM has stopped its guest.
        let hold = scene.destination.vmm.block(pageferry_tests::scenario::At::MemoryLost);
        scene.destination.agent.kill();
        let vmm = scene.destination.vmm.clone();
        wait_until("the memory to be lost", SOON, || !lock(&vmm.asked).losses.is_empty()).unwrap();
        assert!(touch.waits());
        drop(hold);
        assert_memory_lost(&scene);
        assert_lost(touch.found());
        assert_lost(scene.destination.ram.touch(WANTED_TOO).found());
        let source = &scene.source;
        scene.relay.pump("the pause", || source.seen().phase == Phase::PostcopyPaused);
        assert!(scene.source.vmm.is_paused());

        // No page was released, so an operator who looked at both sides can resume the guest at the
        // source.
        let unforced = scene.source.run("resume", &[]);
        assert_eq!(unforced.status.code(), Some(1));
        let resumed = scene.source.run("resume", &["--force"]);
        assert!(resumed.status.success(), "{resumed:?}");
        assert_eq!(scene.source.vmm.resumes(), 1);
        assert_eq!(scene.source.client.ownership(), Ownership::Ours);
        moves_to(&scene.source, &Side::near(empty()));
    }
}

#[test]
fn a_hanging_destination_agent_loses_the_memory_in_time() {
    if !require::uffd() {
        return;
    }
    let destination = Side::hasty(Agent::spawn(), empty(), TIMEOUT);
    let mut scene = Scene::between(Wire::Unix, Side::near(stamped()), destination, &postcopy());
    let (_request, touch) = scene.until_runs();
    scene.destination.agent.freeze();
    // The hang is found without a request, by the agent's silence.
    assert_memory_lost(&scene);
    assert_lost(touch.found());
}

#[test]
fn after_a_dead_destination_vmm_force_takes_the_guest_back() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &postcopy());
        let (_request, touch) = scene.until_runs();
        drop(scene.destination.attached.take());
        let (source, there) = (&scene.source, &scene.destination);
        scene.relay.pump("the pause", || {
            source.seen().phase == Phase::PostcopyPaused && there.seen().phase.is_final()
        });
        assert_eq!(there.seen().phase, Phase::Cancelled, "{}", there.seen().error_text());
        drop(touch);
        let resumed = source.run("resume", &["--force"]);
        assert!(resumed.status.success(), "{resumed:?}");
        assert_eq!(source.vmm.resumes(), 1);
        assert_eq!(source.client.ownership(), Ownership::Ours);
        // The agent serves the next VMM.
        let next = pageferry_tests::scenario::Attached::new(there.agent.socket(), empty());
        moves_to(source, &next);
    }
}

#[test]
fn a_guest_with_released_pages_is_not_resumed_by_force() {
    if !require::uffd() {
        return;
    }
    let options = OutgoingOptions { release: true, mode: Mode::Postcopy, ..postcopy() };
    let mut scene = Scene::start(Wire::Unix, &options);
    let (_request, touch) = scene.until_runs();
    // The job must not end, and the source learns which pages have arrived.
    let _end = scene.relay.until(|record| record.kind == Kind::End && record.stream == 0);
    let source = &scene.source;
    scene.relay.pump("the release", || source.seen().counters.released_pages > 0);
    scene.relay.cut();
    scene.assert_paused();
    let refused = scene.source.run("resume", &["--force"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("were released here"), "{said}");
    assert_eq!(scene.source.vmm.resumes(), 0);
    // The source is still paused, and continues.
    assert_eq!(scene.source.seen().phase, Phase::PostcopyPaused);
    scene.recover();
    scene.assert_completes();
    touch.found().unwrap();
    let gone = (0..PAGES).filter(|page| scene.source.ram.is_hole(*page)).count();
    assert!(gone > 4, "released pages are freed");
}
