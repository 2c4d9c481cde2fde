// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hooks of the VMM that wait for missing memory while the agent or the connections are gone.

use super::scene::{PAGES, Scene, Side, TIMEOUT, WANTED, empty, postcopy, stamp_of, stamped};
use pageferry_client::{HookError, IncomingOptions, OutgoingOptions, Ownership, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{At, SOON, WIRES, Wire, at_once, lock};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Makes this hook of the destination read [`WANTED`] before it returns. The receiver gets what it
/// finds.
fn touches(scene: &Scene, at: At) -> Receiver<std::io::Result<u64>> {
    let (ram, (say, found)) = (scene.destination.ram.clone(), channel());
    scene.destination.vmm.on(at, move || {
        let _ = say.send(ram.touch(WANTED).found());
        Ok(())
    });
    found
}

fn hasty() -> OutgoingOptions {
    OutgoingOptions { hook_timeout: TIMEOUT, ..postcopy() }
}

/// Checks that the guest runs at the destination with all its memory, and that no loss was
/// reported.
fn assert_goes_on(scene: &mut Scene) {
    assert!(lock(&scene.destination.vmm.asked).losses.is_empty(), "the memory is not lost");
    scene.recover();
    let there = scene.destination.vmm.clone();
    scene.relay.pump("the memory to be there", || lock(&there.asked).complete == 1);
    scene.assert_completes();
}

#[test]
fn a_waiting_resume_gets_its_memory_by_the_recovery() {
    if !require::uffd() {
        return;
    }
    at_once(&WIRES, |&wire| {
        let mut scene = Scene::start(wire, &hasty());
        let found = touches(&scene, At::Resume);
        let _request = scene.relay.until(|record| record.kind == Kind::Request);
        scene.relay.cut();
        let (source, _) = scene.assert_paused();
        assert!(source.error_text().contains("did not confirm"), "{}", source.error_text());
        assert!(found.try_recv().is_err(), "it waits");
        assert_goes_on(&mut scene);
        assert_eq!(found.recv().unwrap().unwrap(), stamp_of(WANTED));
    });
}

#[test]
fn a_resume_that_is_late_or_fails_does_not_lose_the_memory() {
    if !require::uffd() {
        return;
    }
    for fails in [false, true] {
        let mut scene = Scene::start(Wire::Unix, &hasty());
        let there = scene.destination.vmm.clone();
        let hold = if fails {
            there.on(At::Resume, || Err(HookError::new("the vCPUs do not start")));
            None
        } else {
            Some(there.block(At::Resume))
        };
        let (_, destination) = scene.assert_paused();
        assert!(
            destination.error_text().contains("resuming it failed: hook \"resume\""),
            "{}",
            destination.error_text()
        );
        assert!(destination.arrived, "{destination:?}");
        assert_eq!(
            scene.destination.client.ownership(),
            Ownership::Ours,
            "the guest is nowhere else"
        );
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
    let mut scene = Scene::start(Wire::Unix, &hasty());
    let found = touches(&scene, At::LoadState);
    let _request = scene.relay.until(|record| record.kind == Kind::Request);
    let status = scene.destination.reaches(Phase::Failed);
    assert!(status.error_text().contains("hook \"load state\""), "{}", status.error_text());
    assert_eq!(found.recv_timeout(SOON).unwrap().unwrap(), 0, "the guest never runs here");
    let there = scene.destination.vmm.clone();
    wait_until("what was announced as missing to be taken back", SOON, || {
        let asked = lock(&there.asked);
        (asked.pending, asked.complete) == (1, 1)
    })
    .unwrap();
    assert_eq!(scene.destination.vmm.resumes(), 0);
    let source = &scene.source;
    scene
        .relay
        .pump("the guest to run on", || !source.vmm.is_paused() && source.seen().phase.is_final());
    assert_eq!(scene.source.client.ownership(), Ownership::Ours);
}

#[test]
fn a_waiting_resume_gets_an_error_when_the_agent_dies() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::between(Wire::Unix, Side::near(stamped()), Side::far(empty()), &postcopy());
    let found = touches(&scene, At::Resume);
    let _request = scene.relay.until(|record| record.kind == Kind::Request);
    scene.destination.agent.kill();
    let error = found.recv_timeout(SOON).unwrap().unwrap_err();
    assert!(error.to_string().contains("Bad address"), "{error}");
    let there = scene.destination.vmm.clone();
    wait_until("the memory and the agent to be lost", SOON, || {
        lock(&there.asked).losses.len() == 2
    })
    .unwrap();
    assert_eq!(lock(&there.asked).losses, ["memory", "agent"]);
}

#[test]
fn a_vmm_that_waits_for_one_who_waits_is_not_waited_for() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::between(Wire::Unix, Side::near(stamped()), Side::far(empty()), &postcopy());
    let (_request, touch) = scene.until_runs();
    let hold = scene.destination.vmm.block(At::MemoryLost);
    scene.destination.agent.kill();
    // The first hook has not returned, and may wait for this one.
    let error = touch.found().unwrap_err();
    assert!(error.to_string().contains("Bad address"), "{error}");
    drop(hold);
    let there = scene.destination.vmm.clone();
    wait_until("the memory and the agent to be lost", SOON, || {
        lock(&there.asked).losses.len() == 2
    })
    .unwrap();
    assert_eq!(lock(&there.asked).losses, ["memory", "agent"]);
}

/// Checks that no guest was lost here, because none ran, and that no memory is missing any more.
fn assert_nothing_lost(scene: &Scene, losses: &[&str]) {
    let asked = lock(&scene.destination.vmm.asked);
    assert_eq!((asked.pending, asked.complete), (1, 1));
    assert_eq!(asked.losses, losses);
}

/// Events that end a migration before the guest runs at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Cut,
    CancelAtDestination,
    CancelAtSource,
    SourceKilled,
    DestinationStopped,
}

impl End {
    const ALL: [Self; 5] = [
        Self::Cut,
        Self::CancelAtDestination,
        Self::CancelAtSource,
        Self::SourceKilled,
        Self::DestinationStopped,
    ];

    /// Hooks never time out: every wait ends long before that.
    fn scene(self) -> Scene {
        let patient = OutgoingOptions { hook_timeout: Duration::from_secs(600), ..postcopy() };
        let side = |far, ram| if far { Side::far(ram) } else { Side::near(ram) };
        let source = side(self == Self::SourceKilled, stamped());
        Scene::between(
            Wire::Unix,
            source,
            side(self == Self::DestinationStopped, empty()),
            &patient,
        )
    }

    /// Makes it happen, and waits until both sides know.
    fn happen(self, scene: &mut Scene) {
        match self {
            Self::Cut => scene.relay.cut(),
            Self::CancelAtDestination => scene.destination.client.cancel().unwrap(),
            Self::CancelAtSource => scene.source.client.cancel().unwrap(),
            Self::SourceKilled => scene.source.agent.kill(),
            Self::DestinationStopped => scene.destination.agent.terminate(),
        }
        let Scene { relay, source, destination, outgoing, incoming } = scene;
        if self == Self::DestinationStopped {
            let there = destination.vmm.clone();
            relay.pump("the end of the agent", || !lock(&there.asked).losses.is_empty());
            assert!(destination.agent.ends_well());
        } else {
            relay.pump("the end at the destination", || destination.seen().phase.is_final());
            let phase = destination.wait(*incoming).phase;
            let expected =
                if self == Self::CancelAtDestination { Phase::Cancelled } else { Phase::Failed };
            assert_eq!(phase, expected, "{self:?}");
        }
        if self == Self::SourceKilled {
            let here = source.vmm.clone();
            wait_until("the guest to run on", SOON, || !here.is_paused()).unwrap();
        } else {
            relay.pump("the end at the source", || source.seen().phase.is_final());
            let phase = source.wait(*outgoing).phase;
            let expected =
                if self == Self::CancelAtSource { Phase::Cancelled } else { Phase::Failed };
            assert_eq!(phase, expected, "{self:?}");
        }
        assert!(!scene.source.vmm.is_paused());
    }
}

/// Checks a destination whose job has ended: no hook waits any more, and no memory is missing.
fn assert_free(scene: &Scene, end: End) {
    let losses: &[_] = if end == End::DestinationStopped { &["agent"] } else { &[] };
    assert_nothing_lost(scene, losses);
    assert_eq!(scene.destination.vmm.resumes(), 0);
    assert_eq!(scene.destination.client.ownership(), Ownership::Awaiting);
}

#[test]
fn a_waiting_load_ends_with_its_job_and_the_next_arrives() {
    if !require::uffd() {
        return;
    }
    for end in End::ALL {
        let mut scene = end.scene();
        let (ram, (say, found)) = (scene.destination.ram.clone(), channel());
        scene.destination.vmm.on(At::LoadState, move || {
            // The first touch waits until the job ends. The others must return at once.
            let pages = std::iter::once(WANTED).chain(0..PAGES);
            let stamps =
                pages.map(|page| ram.touch(page).found()).collect::<std::io::Result<Vec<u64>>>();
            let _ = say.send(stamps);
            Ok(())
        });
        let _request = scene.relay.until(|record| record.kind == Kind::Request);
        end.happen(&mut scene);
        assert_free(&scene, end);
        let stamps = found.try_recv().unwrap().unwrap();
        assert!(stamps.iter().all(|stamp| *stamp == 0), "{end:?}: {stamps:?}");
        if matches!(end, End::SourceKilled | End::DestinationStopped) {
            continue;
        }
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = postcopy();
        let incoming = scene.relay.listen(
            &scene.destination.client,
            &IncomingOptions { peer_timeout, hook_timeout, ..IncomingOptions::default() },
        );
        let outgoing = scene.relay.send(&scene.source.client, &postcopy());
        assert_eq!(scene.relay.finish(&scene.source.client, outgoing).phase, Phase::Completed);
        assert_eq!(scene.relay.finish(&scene.destination.client, incoming).phase, Phase::Completed);
        let stamps = found.recv_timeout(SOON).unwrap().unwrap();
        assert!(
            stamps[1..].iter().zip(0..).all(|(stamp, page)| *stamp == stamp_of(page)),
            "{end:?}: {stamps:?}"
        );
        let asked = lock(&scene.destination.vmm.asked);
        assert_eq!((asked.pending, asked.complete), (2, 2));
        assert!(asked.losses.is_empty());
    }
}

#[test]
fn a_hook_waiting_for_a_waiting_thread_ends_with_the_job() {
    if !require::uffd() {
        return;
    }
    for end in End::ALL {
        let mut scene = end.scene();
        // The state is loaded already. The hook itself does not touch memory, but a device does.
        let found = touches(&scene, At::phase(Phase::Committing));
        let mut held = 0;
        let _loaded = scene.relay.until(|record| record.kind == Kind::Loaded);
        let _request = scene.relay.until(|record| {
            held += u32::from(record.kind == Kind::Commit);
            record.kind == Kind::Request
        });
        assert_eq!(held, 0, "the source does not know that the state is loaded");
        end.happen(&mut scene);
        assert_free(&scene, end);
        assert_eq!(found.try_recv().unwrap().unwrap(), 0, "{end:?}");
    }
}

#[test]
fn a_load_that_waits_goes_on_when_the_agent_is_lost() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::between(Wire::Unix, Side::near(stamped()), Side::far(empty()), &postcopy());
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

/// Before the mappings are registered no access waits: a read allocates a zero page, which must not
/// replace the content that is still to come.
#[test]
fn memory_touched_before_it_is_registered_comes_too() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::between(Wire::Unix, Side::near(stamped()), Side::near(empty()), &postcopy());
    let (ram, (say, found)) = (scene.destination.ram.clone(), channel());
    // The last hook before the registration.
    scene.destination.vmm.on(At::MemoryPending, move || {
        for page in [0, WANTED, WANTED + 1] {
            let _ = say.send(ram.touch(page).found());
        }
        Ok(())
    });
    scene.assert_completes();
    assert!(found.try_iter().map(Result::unwrap).eq([0, 0, 0]));
}
