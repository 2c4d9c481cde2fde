//! The VMM's own hooks wait for memory that is missing, and its agent or the connections are gone.

use crate::common::{At, SOON, WIRES, Wire, lock};
use crate::scene::{SHORT, Scene, Side, WANTED, empty, postcopy, stamp_of, stamped};
use pageferry_client::{HookError, IncomingOptions, OutgoingOptions, Ownership, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Has this hook of the destination touch [`WANTED`] before it returns; what it finds comes out of what is returned.
fn touches(scene: &Scene, at: At) -> Receiver<std::io::Result<u64>> {
    let (ram, (say, found)) = (scene.destination.ram.clone(), channel());
    scene.destination.vmm.on(at, move || {
        let _ = say.send(ram.touch(WANTED).found());
        Ok(())
    });
    found
}

fn short() -> OutgoingOptions {
    OutgoingOptions { hook_timeout: SHORT, ..postcopy() }
}

/// The guest runs at the destination, all of it is there, and nobody was told otherwise.
fn assert_goes_on(scene: &mut Scene) {
    assert!(lock(&scene.destination.vmm.asked).losses.is_empty(), "the memory is not lost");
    scene.recover();
    let there = scene.destination.vmm.clone();
    scene.relay.pump("the memory to be there", || lock(&there.asked).complete == 1);
    scene.assert_completes();
}

#[test]
fn a_resume_that_waits_for_memory_when_the_connections_break_gets_it_by_the_recovery() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &short());
        let found = touches(&scene, At::Resume);
        let _request = scene.relay.until(|record| record.kind == Kind::Request);
        scene.relay.cut();
        let (source, _) = scene.assert_paused();
        assert!(source.error.contains("did not confirm"), "{}", source.error);
        assert!(found.try_recv().is_err(), "it waits");
        assert_goes_on(&mut scene);
        assert_eq!(found.recv().unwrap().unwrap(), stamp_of(WANTED));
    }
}

#[test]
fn a_resume_that_is_late_or_fails_does_not_lose_the_memory() {
    if !require::uffd() {
        return;
    }
    for fails in [false, true] {
        let mut scene = Scene::start(Wire::Unix, &short());
        let there = scene.destination.vmm.clone();
        let hold = if fails {
            there.on(At::Resume, || Err(HookError::new("the vCPUs do not start")));
            None
        } else {
            Some(there.block(At::Resume))
        };
        let (_, destination) = scene.assert_paused();
        assert!(destination.error.contains("hook \"resume\""), "{}", destination.error);
        assert_eq!(scene.destination.client.ownership(), Ownership::Ours, "it is nowhere else");
        there.off(At::Resume);
        drop(hold);
        if fails {
            // The VMM resumes its guest by itself.
            lock(&there.asked).resumes += 1;
        }
        assert_goes_on(&mut scene);
    }
}

#[test]
fn a_load_that_waits_for_memory_of_a_silent_source_is_let_go() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &short());
    let found = touches(&scene, At::LoadState);
    let _request = scene.relay.until(|record| record.kind == Kind::Request);
    let status = scene.destination.reaches(Phase::Failed);
    assert!(status.error.contains("hook \"load state\""), "{}", status.error);
    assert_eq!(found.recv_timeout(SOON).unwrap().unwrap(), 0, "of a guest that never runs here");
    let there = scene.destination.vmm.clone();
    wait_until("what was announced as missing to be taken back", SOON, || {
        let asked = lock(&there.asked);
        (asked.pending, asked.complete) == (1, 1)
    })
    .unwrap();
    assert_eq!(scene.destination.vmm.resumes(), 0);
    let source = &scene.source;
    scene.relay.pump("the guest to run on", || !source.vmm.is_paused() && source.seen().phase.is_final());
    assert_eq!(scene.source.client.ownership(), Ownership::Ours);
}

#[test]
fn a_resume_that_waits_for_memory_when_the_agent_is_killed_gets_an_error_and_the_vmm_is_told() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::between(Wire::Unix, Side::near(stamped()), Side::far(empty()), &postcopy());
    let found = touches(&scene, At::Resume);
    let _request = scene.relay.until(|record| record.kind == Kind::Request);
    scene.destination.agent.kill();
    let error = found.recv_timeout(SOON).unwrap().unwrap_err();
    assert!(error.to_string().contains("Bad address"), "{error}");
    let there = scene.destination.vmm.clone();
    wait_until("the memory and the agent to be lost", SOON, || lock(&there.asked).losses.len() == 2).unwrap();
    assert_eq!(lock(&there.asked).losses, ["memory", "agent"]);
}

#[test]
fn a_vmm_that_waits_for_one_who_waits_is_not_waited_for() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::between(Wire::Unix, Side::near(stamped()), Side::far(empty()), &postcopy());
    let (_request, touch) = scene.until_runs();
    let hold = scene.destination.vmm.block(At::MemoryLost);
    scene.destination.agent.kill();
    // The hook has not returned, and may be waiting for this one.
    let error = touch.found().unwrap_err();
    assert!(error.to_string().contains("Bad address"), "{error}");
    drop(hold);
    let there = scene.destination.vmm.clone();
    wait_until("the memory and the agent to be lost", SOON, || lock(&there.asked).losses.len() == 2).unwrap();
    assert_eq!(lock(&there.asked).losses, ["memory", "agent"]);
}

/// No guest was lost here, since none ran, and nothing is missing any more.
fn assert_nothing_lost(scene: &Scene, losses: &[&str]) {
    let asked = lock(&scene.destination.vmm.asked);
    assert_eq!((asked.pending, asked.complete), (1, 1));
    assert_eq!(asked.losses, losses);
}

#[test]
fn a_load_that_waits_goes_on_when_the_source_is_lost_and_the_next_migration_arrives() {
    if !require::uffd() {
        return;
    }
    // No hook is late: it goes on long before.
    let patient = OutgoingOptions { hook_timeout: Duration::from_secs(600), ..postcopy() };
    let mut scene = Scene::start(Wire::Unix, &patient);
    let found = touches(&scene, At::LoadState);
    let _request = scene.relay.until(|record| record.kind == Kind::Request);
    scene.relay.cut();
    assert_eq!(scene.destination.wait(scene.incoming).phase, Phase::Failed);
    assert_eq!(scene.source.wait(scene.outgoing).phase, Phase::Failed);
    assert!(!scene.source.vmm.is_paused());
    assert_nothing_lost(&scene, &[]);

    let OutgoingOptions { peer_timeout, hook_timeout, .. } = patient;
    let incoming = scene.relay.listen(&scene.destination.client, &IncomingOptions { peer_timeout, hook_timeout });
    let outgoing = scene.relay.send(&scene.source.client, &patient);
    assert_eq!(scene.relay.finish(&scene.source.client, outgoing).phase, Phase::Completed);
    assert_eq!(scene.relay.finish(&scene.destination.client, incoming).phase, Phase::Completed);
    let found = [(); 2].map(|()| found.recv_timeout(SOON).unwrap().unwrap());
    assert_eq!(found, [0, stamp_of(WANTED)]);
    let asked = lock(&scene.destination.vmm.asked);
    assert_eq!((asked.pending, asked.complete), (2, 2));
    assert!(asked.losses.is_empty());
}

#[test]
fn a_load_that_waits_goes_on_when_the_agent_is_lost() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::between(Wire::Unix, Side::near(stamped()), Side::far(empty()), &postcopy());
    let found = touches(&scene, At::LoadState);
    let _request = scene.relay.until(|record| record.kind == Kind::Request);
    scene.destination.agent.kill();
    let there = scene.destination.vmm.clone();
    wait_until("the end of the agent", SOON, || !lock(&there.asked).losses.is_empty()).unwrap();
    scene.relay.cut();
    assert_eq!(scene.source.wait(scene.outgoing).phase, Phase::Failed);
    assert!(!scene.source.vmm.is_paused());
    assert_nothing_lost(&scene, &["agent"]);
    assert_eq!(found.recv_timeout(SOON).unwrap().unwrap(), 0);
    assert_eq!(scene.destination.client.ownership(), Ownership::Awaiting);
}
