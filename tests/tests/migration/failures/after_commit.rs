// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! After the commit the source's guest stays paused, whatever fails and whatever is requested.

use super::scene::FarScene;
use crate::scene::{Scene, empty, stamped};
use pageferry_client::{Error, ErrorCode, IncomingOptions, Ownership, Phase, Target};
use pageferry_protocol::control::request::Request;
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{
    Agent, Attached, Listening, Passing, Relay, SOON, Side, WIRES, Wire, moves_to, passes,
};

/// Checks a source that relinquished the guest without a confirmation: the guest is paused, and the
/// VMM does not migrate it again.
pub fn assert_stays_paused(source: &Attached) {
    assert_eq!(source.client.ownership(), Ownership::Relinquished);
    assert!(source.vmm.is_paused());
    assert_eq!(source.vmm.resumes(), 0);
    let again = source.client.start_outgoing(Target::Address("unix:/nowhere".into()), &passes(1));
    assert!(matches!(again, Err(Error::NotOurs { .. })));
}

fn is_commit(record: &Passing) -> bool {
    record.kind == Kind::Commit
}

#[test]
fn a_lost_commit_leaves_the_guest_unconfirmed_and_paused() {
    for wire in WIRES {
        let mut scene = Scene::started(wire, &passes(1));
        let _commit = scene.relay.until(is_commit);
        scene.kill_destination();
        let status = scene.source.wait(scene.outgoing);
        assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error_text());
        assert_stays_paused(&scene.source);
    }
}

#[test]
fn a_link_lost_after_the_commit_takes_force_to_resume() {
    for wire in WIRES {
        let agent = Listening::start();
        let source = Attached::new(&agent.path, stamped());
        let destination = empty();
        let mut relay = Relay::over(wire);
        let incoming = relay.listen(&destination.client, &IncomingOptions::default());
        let outgoing = relay.send(&source.client, &passes(1));

        let _resumed = relay.until(|record| record.kind == Kind::Resumed);
        assert!(source.client.cancel().is_err(), "after the commit point it is too late to cancel");
        relay.cut();
        let status = source.wait(outgoing);
        assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error_text());
        assert!(status.error_text().contains("did not confirm"), "{}", status.error_text());
        assert_eq!(destination.wait(incoming).phase, Phase::Completed);
        assert_eq!(destination.vmm.resumes(), 1, "the guest runs at the destination");

        // Neither the VMM nor an operator can run or migrate the guest here by mistake.
        assert_stays_paused(&source);
        let ask = |request: &Request| agent.connect().ask(request, Vec::new());
        let start = Request::StartOutgoing { target: "unix:/nowhere".into(), options: passes(1) };
        assert_eq!(ask(&start).unwrap_err().code, ErrorCode::State);
        let refused = ask(&Request::Resume { force: false }).unwrap_err();
        assert_eq!(refused.code, ErrorCode::State);
        assert!(refused.sentence.contains("force"), "{refused}");
        assert_stays_paused(&source);

        // An operator who looked at both sides can run it by force.
        ask(&Request::Resume { force: true }).unwrap();
        assert_eq!(source.vmm.resumes(), 1);
        assert!(!source.vmm.is_paused());
        assert_eq!(source.client.ownership(), Ownership::Ours);
        // The next operator reads that the guest was resumed by force.
        let status = source.client.status().unwrap();
        assert_eq!(status.phase, Phase::Failed);
        assert!(
            status.error_text().starts_with("the guest was resumed here by force; before that: "),
            "{}",
            status.error_text()
        );
    }
}

#[test]
fn after_the_commit_nothing_runs_the_guest_at_the_source() {
    let mut scene = Scene::started(Wire::Unix, &passes(1));
    let status = scene.end();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(scene.destination().wait(scene.incoming).phase, Phase::Completed);
    wait_until("the guest to be gone", SOON, || scene.source.client.ownership() == Ownership::Gone)
        .unwrap();
    assert!(matches!(
        scene.source.client.start_outgoing(Target::Address("unix:/nowhere".into()), &passes(1)),
        Err(Error::NotOurs { .. })
    ));
    let Side { attached: Attached { client, vmm, ram: _ram }, agent } = scene.source;
    drop(client);
    drop(agent);
    assert!(vmm.is_paused());
    assert_eq!(vmm.resumes(), 0);
}

#[test]
fn a_confirmed_arrival_is_not_undone_by_force() {
    let agent = Listening::start();
    let source = Attached::new(&agent.path, stamped());
    let destination = empty();
    moves_to(&source, &destination);
    let refused = agent.connect().ask(&Request::Resume { force: true }, Vec::new()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::State);
    assert!(refused.sentence.contains("the destination has confirmed"), "{refused}");
    assert_eq!(source.vmm.resumes(), 0);
}

#[test]
fn a_killed_source_agent_leaves_the_guest_paused() {
    for held in [Kind::Commit, Kind::Resumed] {
        let agent = Agent::spawn();
        let source = Attached::new(agent.socket(), stamped());
        let mut relay = Relay::unix();
        let destination = empty();
        relay.listen(&destination.client, &IncomingOptions::default());
        relay.send(&source.client, &passes(1));
        let _record = relay.until(|record| record.kind == held);
        agent.end();
        wait_until("the agent to be lost", SOON, || source.client.status().is_err()).unwrap();
        // A new agent does not know of the commit. Neither it nor the VMM can run the guest.
        let next = Agent::spawn();
        source.reattach(next.socket());
        assert_stays_paused(&source);
        assert_eq!(destination.vmm.resumes(), u64::from(held == Kind::Resumed));
    }
}

#[test]
fn a_killed_destination_agent_leaves_the_guest_there_or_nowhere() {
    for wire in WIRES {
        for held in [Kind::Commit, Kind::Resumed] {
            let mut scene = FarScene::start(wire, &passes(1));
            let _record = scene.relay.until(|record| record.kind == held);
            scene.agent.kill();
            let status = scene.end();
            assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error_text());
            assert_stays_paused(&scene.source);
            let there = &scene.there;
            wait_until("the agent to be lost", SOON, || there.client.status().is_err()).unwrap();
            assert_eq!(there.vmm.resumes(), u64::from(held == Kind::Resumed));
        }
    }
}
