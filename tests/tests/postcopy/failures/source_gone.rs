// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The source's agent or VMM is killed while the guest waits for its memory.

use super::scene::{Scene, Side, WANTED, assert_arrived, empty, postcopy, run, stamp_of, stamped};
use pageferry_client::{OutgoingOptions, Ownership, Phase, Target};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{Agent, Attached, SOON, WIRES, Wire, lock};

fn far_source(wire: Wire, options: &OutgoingOptions) -> Scene {
    Scene::between(wire, Side::far(stamped()), Side::near(empty()), options)
}

/// Kills the source's agent. Its VMM continues with another one.
fn kill_agent(scene: &mut Scene) {
    scene.source.agent.kill();
    let there = &scene.destination;
    scene.relay.pump("the pause", || there.seen().phase == Phase::PostcopyPaused);
    let source = &scene.source;
    wait_until("the agent to be lost", SOON, || source.client.status().is_err()).unwrap();
    assert_eq!(source.client.ownership(), Ownership::Relinquished);
    assert!(source.vmm.is_paused());
    scene.source.agent = Agent::spawn();
    scene.source.reattach(scene.source.agent.socket());
}

#[test]
fn killed_source_agents_are_followed_by_others_that_go_on() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = far_source(wire, &postcopy());
        let (_request, touch) = scene.until_runs();
        kill_agent(&mut scene);
        let address = scene.relay.address();
        let recover =
            |scene: &Scene| scene.source.client.recover(Some(&address), &postcopy()).unwrap();
        for killed_at in [Kind::Accept, Kind::Received, Kind::Data] {
            recover(&scene);
            let _record = scene.relay.until(|record| record.kind == killed_at);
            kill_agent(&mut scene);
            // A page that was already sent may still arrive.
            assert!(touch.waits() || killed_at == Kind::Data);
        }
        // The new agent does not know the address of the destination.
        let refused = scene.source.client.recover(None, &postcopy()).unwrap_err().to_string();
        assert!(refused.contains("address is empty"), "{refused}");
        // An operator does not know the session.
        let output = run(scene.source.agent.socket(), "recover", &["--address", &address]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("only the VMM can continue"), "{said}");
        recover(&scene);
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
        wait_until("the guest to be gone", SOON, || {
            scene.source.client.ownership() == Ownership::Gone
        })
        .unwrap();
    }
}

#[test]
fn an_agent_that_takes_it_up_pauses_like_the_first() {
    if !require::uffd() {
        return;
    }
    let mut scene = far_source(Wire::Unix, &postcopy());
    let (_request, touch) = scene.until_runs();
    kill_agent(&mut scene);
    let nowhere = "unix:/nonexistent/stream";
    scene.source.client.recover(Some(nowhere), &OutgoingOptions::default()).unwrap();
    let status = scene.source.reaches(Phase::PostcopyPaused);
    assert!(status.error_text().contains(nowhere), "{}", status.error_text());
    let refused = scene.source.client.cancel().unwrap_err().to_string();
    assert!(refused.contains("too late to cancel"), "{refused}");
    // Now this agent has the job, and an operator may give it another address.
    let (socket, address) = (scene.source.agent.socket().to_owned(), scene.relay.address());
    let recover =
        std::thread::spawn(move || run(&socket, "recover", &["--json", "--address", &address]));
    scene.relay.pump("the end of the command", || recover.is_finished());
    let output = recover.join().unwrap();
    assert!(output.status.success(), "{output:?}");
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn the_next_agent_does_not_trust_pages_that_may_be_released() {
    if !require::uffd() {
        return;
    }
    let mut scene = far_source(Wire::Unix, &OutgoingOptions { release: true, ..postcopy() });
    let (_request, touch) = scene.until_runs();
    let _end = scene.relay.until(|record| record.kind == Kind::End && record.stream == 0);
    let source = &scene.source;
    scene.relay.pump("the release", || source.seen().counters.released_pages > 0);
    kill_agent(&mut scene);
    // The options do not matter now.
    scene
        .source
        .client
        .recover(Some("unix:/nonexistent/stream"), &OutgoingOptions::default())
        .unwrap();
    let status = scene.source.reaches(Phase::PostcopyPaused);
    assert_eq!(status.counters.released_pages, 0, "the new agent has released no page");
    let resume = scene.source.run("resume", &["--force"]);
    assert_eq!(resume.status.code(), Some(1));
    let said = String::from_utf8(resume.stderr).unwrap();
    assert!(said.contains("may not be whole"), "{said}");
    assert_eq!(scene.source.vmm.resumes(), 0);
    scene.source.client.recover(Some(&scene.relay.address()), &OutgoingOptions::default()).unwrap();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn a_source_vmm_that_goes_leaves_the_memory_to_its_agent() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        for cut in [false, true] {
            let mut scene = Scene::start(wire, &postcopy());
            let (_request, touch) = scene.until_runs();
            // Its file is gone with it, except for the agent's descriptors.
            drop(scene.source.drop_vmm());
            if cut {
                scene.relay.cut();
                scene.assert_paused();
                let resume = scene.source.run("resume", &["--force"]);
                assert_eq!(resume.status.code(), Some(1));
                let said = String::from_utf8(resume.stderr).unwrap();
                assert!(said.contains("is gone") && said.contains("only be recovered"), "{said}");
                let cancel = scene.source.run("cancel", &[]);
                let said = String::from_utf8(cancel.stderr).unwrap();
                assert!(said.contains("too late to cancel"), "{said}");
                // The next VMM cannot take over the job.
                let next = Attached::new(scene.source.agent.socket(), stamped());
                let nowhere = Target::Address("unix:/nowhere".into());
                let refused =
                    next.client.start_outgoing(nowhere, &postcopy()).unwrap_err().to_string();
                assert!(
                    refused.contains("of the previous VMM is in phase postcopy-paused"),
                    "{refused}"
                );
                drop(next);
                let (socket, there) = (scene.source.agent.socket().to_owned(), &scene.destination);
                assert_eq!(there.seen().phase, Phase::PostcopyPaused);
                let recover = std::thread::spawn(move || run(&socket, "recover", &["--json"]));
                scene.relay.pump("the end of the command", || recover.is_finished());
                let output = recover.join().unwrap();
                assert!(output.status.success(), "{output:?}");
            }
            scene.assert_completes();
            assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
            // The agent serves the next VMM.
            let next = Attached::new(scene.source.agent.socket(), stamped());
            assert_eq!(next.client.ownership(), Ownership::Ours);
            assert_arrived(&scene.destination);
            assert_eq!(lock(&next.vmm.asked).pauses, 0);
        }
    }
}
