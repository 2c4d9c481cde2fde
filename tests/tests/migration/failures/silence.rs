// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A peer that is connected and silent: the link loses its messages, or it hangs.

use super::scene::{FarScene, MOMENTS, Moment};
use crate::scene::{PAGES, Scene, empty, filled, stamped};
use pageferry_client::{
    Client, Config, Error, IncomingOptions, MIN_BANDWIDTH, OutgoingOptions, Ownership, Phase,
    Target,
};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{
    Agent, Attached, Ram, Relay, SOON, Side, TooEarly, WIRES, Wire, assert_same, at_once, config,
    migrates_next_time, moves_to, passes, says, with_more_time,
};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::Duration;

/// Options with which a peer that is silent for `timeout` is an error.
fn patient_for(timeout: Duration, running: u32) -> OutgoingOptions {
    OutgoingOptions { peer_timeout: timeout, hook_timeout: timeout, ..passes(running) }
}

#[test]
fn a_peer_that_falls_silent_is_an_error_within_its_timeout() {
    let cases: Vec<_> =
        WIRES.iter().flat_map(|wire| MOMENTS.map(|moment| (*wire, moment))).collect();
    at_once(&cases, |&(wire, (moment, is_there))| {
        with_more_time(|timeout| {
            let mut scene = Scene::started(wire, &patient_for(timeout, 2));
            // The relay passes nothing on from here, and closes nothing.
            let _record = scene.reach(is_there)?;
            let status = scene.assert_source_failed();
            // The source waits either for an answer or for room to send. On a busy machine the time
            // limit of the hand-over may end first.
            let words =
                ["was silent for ", "did not take what was sent within", "hand-over took longer"];
            says(status.error_text(), &words)?;
            if moment != MOMENTS[0].0 {
                let status = scene.assert_destination_failed();
                says(status.error_text(), &["silent", "closed"])?;
            }
            migrates_next_time(&scene.source);
            Ok(())
        });
    });
}

#[test]
fn a_peer_that_does_not_accept_is_an_error_in_time() {
    let source = filled();
    let folder = tempfile::tempdir().unwrap();
    // No peer ever answers, so this timeout cannot be too short.
    let options = OutgoingOptions { peer_timeout: Duration::from_secs(1), ..passes(1) };
    let fails = |address: &str, words: &str| {
        let outgoing = source
            .client
            .start_outgoing(Target::Address(address.to_owned()), &options)
            .unwrap()
            .job;
        let status = source.wait(outgoing);
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error_text().contains(words), "{}", status.error_text());
        assert!(!source.vmm.is_paused());
    };
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_address = format!("tcp:{}", tcp.local_addr().unwrap());
    // A socket that only listens.
    let path = folder.path().join("deaf");
    let _unix = UnixListener::bind(&path).unwrap();
    fails(&format!("unix:{}", path.display()), "silent");
    fails(&tcp_address, "silent");
    // No process listens.
    fails(&format!("unix:{}", folder.path().join("nobody").display()), "nobody");
    drop(tcp);
    fails(&tcp_address, &tcp_address);
    migrates_next_time(&source);
}

/// The moments in which an agent hangs: in a pass, and while the guest is paused.
fn moments_of_a_hang() -> [(Wire, Moment); 4] {
    [
        (Wire::Unix, MOMENTS[3]),
        (Wire::Tcp, MOMENTS[3]),
        (Wire::Unix, MOMENTS[7]),
        (Wire::Tcp, MOMENTS[7]),
    ]
}

#[test]
fn a_hanging_destination_agent_is_an_error_within_the_timeout() {
    at_once(&moments_of_a_hang(), |&(wire, (_, is_there))| {
        with_more_time(|timeout| {
            let mut scene = FarScene::start(wire, &patient_for(timeout, 2));
            let record = scene.reach(is_there)?;
            scene.agent.freeze();
            scene.relay.pass(record);
            let status = scene.end();
            assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
            // On a busy machine the time limit of the hand-over may end first.
            says(status.error_text(), &["silent", "hand-over took longer"])?;
            assert!(!scene.source.vmm.is_paused());
            migrates_next_time(&scene.source);
            Ok(())
        });
    });
}

#[test]
fn a_hanging_source_agent_is_given_up_and_the_guest_runs() {
    at_once(&moments_of_a_hang(), |&(wire, (_, is_there))| {
        with_more_time(|timeout| {
            let mut agent = Agent::spawn();
            let config = Config { request_timeout: 2 * timeout, ..config() };
            let connected = Client::connect(agent.socket(), config);
            let (client, channel) = connected.map_err(|error| TooEarly(error.to_string()))?;
            let source = Attached::over(client, channel, stamped());
            let destination = empty();
            let mut relay = Relay::over(wire);
            let options = IncomingOptions { peer_timeout: timeout, ..IncomingOptions::default() };
            let incoming = relay.listen(&destination.client, &options);
            let outgoing = relay.send(&source.client, &passes(2));
            let over = || destination.client.status().unwrap().phase.is_final();
            let record = relay.until_unless(over, is_there);
            let _record = record.ok_or_else(|| {
                TooEarly(destination.client.status().unwrap().error_text().to_owned())
            })?;
            agent.freeze();
            // The VMM notices with its next request to the agent.
            let lost = source.client.wait(outgoing, SOON).unwrap_err();
            assert!(matches!(lost, Error::AgentLost { .. }), "{lost}");
            wait_until("the guest to run", SOON, || !source.vmm.is_paused()).unwrap();
            assert_eq!(destination.wait(incoming).phase, Phase::Failed);
            assert_eq!(source.client.ownership(), Ownership::Ours);

            let next = Agent::spawn();
            source.reattach(next.socket());
            moves_to(&source, &destination);
            Ok(())
        });
    });
}

#[test]
fn a_peer_answering_byte_by_byte_keeps_no_guest_paused() {
    at_once(&WIRES, |&wire| {
        with_more_time(|timeout| {
            let mut scene = Scene::started(wire, &patient_for(timeout, 1));
            let record = scene.reach(|record| record.kind == Kind::Loaded)?;
            // Each byte comes long before the timeout, and the last one long after it.
            scene.relay.trickle(&record, timeout / 8, || {
                scene.source.client.status().unwrap().phase.is_final()
            });
            let status = scene.assert_source_failed();
            // On a busy machine the time limit of the hand-over may end first.
            says(
                status.error_text(),
                &["did not send a whole record within ", "hand-over took longer"],
            )?;
            scene.assert_destination_failed();
            migrates_next_time(&scene.source);
            Ok(())
        });
    });
}

#[test]
fn a_destination_killed_under_a_low_bandwidth_is_noticed() {
    let mut agent = Agent::spawn();
    let there = Attached::new(agent.socket(), Ram::odd(PAGES));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("direct");
    there.listen(&path, &IncomingOptions::default());
    let source = filled();
    let outgoing = source.send(&path, &OutgoingOptions { bandwidth: MIN_BANDWIDTH, ..passes(1) });
    wait_until("pages", SOON, || source.client.status().unwrap().counters.pages_sent > 2).unwrap();
    agent.kill();
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
    assert!(status.counters.pages_sent < PAGES, "the job did not stop: {:?}", status.counters);
    migrates_next_time(&source);
}

#[test]
fn a_low_bandwidth_does_not_make_the_source_look_dead() {
    const PAGES: u64 = 256;
    let (source, destination) = (Side::new(Ram::odd(PAGES)), Side::new(Ram::odd(PAGES)));
    (0..PAGES).for_each(|page| source.ram.write(page, page + 1));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("direct");
    // 1 MiB takes 16 s.
    let options =
        IncomingOptions { peer_timeout: Duration::from_secs(6), ..IncomingOptions::default() };
    let incoming = destination.listen(&path, &options);
    let outgoing = source.send(&path, &OutgoingOptions { bandwidth: MIN_BANDWIDTH, ..passes(1) });
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(destination.wait(incoming).phase, Phase::Completed);
    assert_same(&source.ram, &destination.ram);
}
