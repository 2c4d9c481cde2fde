// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that end or are killed, before the commit.

use super::scene::{FarScene, MOMENTS, Moment, at_every_moment};
use crate::scene::{empty, stamped};
use pageferry_client::{IncomingOptions, Ownership, Phase, Punch};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{Agent, Attached, Listening, Relay, SOON, Wire, moves_to, passes};

/// The source's agent dies at this moment. The VMM continues without an agent, and then with the
/// next one.
fn lose_the_source_agent(agent: fn() -> Agent, wire: Wire, (moment, is_there): Moment) {
    let first = agent();
    let source = Attached::new(first.socket(), stamped());
    let Attached { client, vmm, ram } = &source;
    let mut relay = Relay::over(wire);
    let destination = empty();
    let incoming = relay.listen(&destination.client, &IncomingOptions::default());
    relay.send(client, &passes(2));
    let _record = relay.until(is_there);
    client.discard(&[ram.range(20, 10)], Punch::Yes).unwrap();

    first.end();
    wait_until("the agent to be lost", SOON, || client.status().is_err()).unwrap();
    wait_until("the guest to run", SOON, || !vmm.is_paused()).unwrap();
    assert_eq!(client.ownership(), Ownership::Ours);
    relay.cut();
    if moment == MOMENTS[0].0 {
        destination.client.cancel().unwrap();
        assert_eq!(destination.wait(incoming).phase, Phase::Cancelled);
    } else {
        assert_eq!(destination.wait(incoming).phase, Phase::Failed);
        assert_eq!(destination.vmm.resumes(), 0);
    }
    // Discards work without an agent.
    assert_eq!(client.discard(&[ram.range(25, 10)], Punch::Yes).unwrap(), 5);
    assert!((20..35).all(|page| ram.is_hole(page)));
    source.write(5, 55);

    let next = agent();
    source.reattach(next.socket());
    moves_to(&source, &destination);
    let bitmap = destination.client.discarded(ram.id).unwrap();
    assert!((20..35).all(|page| destination.ram.is_hole(page) && bitmap.contains(page)));
}

#[test]
fn after_a_stopped_source_agent_the_next_migrates_the_guest() {
    for moment in MOMENTS {
        lose_the_source_agent(|| Agent::Stopped(Listening::start()), Wire::Unix, moment);
    }
}

#[test]
fn after_a_killed_source_agent_the_next_migrates_the_guest() {
    at_every_moment("source agent killed", |wire, moment| {
        lose_the_source_agent(Agent::spawn, wire, moment)
    });
}

#[test]
fn a_killed_destination_agent_leaves_the_guest_at_the_source() {
    at_every_moment("destination agent killed", |wire, (_, is_there)| {
        let mut scene = FarScene::start(wire, &passes(2));
        let _record = scene.relay.until(is_there);
        scene.agent.kill();
        let status = scene.end();
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        let FarScene { source, there, .. } = &scene;
        assert!(!source.vmm.is_paused());
        wait_until("the agent to be lost", SOON, || there.client.status().is_err()).unwrap();
        assert_eq!(there.vmm.resumes(), 0);
        assert_eq!(there.client.ownership(), Ownership::Awaiting);
        // The destination's VMM continues with another agent, too.
        let next = Agent::spawn();
        there.reattach(next.socket());
        moves_to(source, there);
    });
}
