//! The other side is there, and says nothing: the link swallows what it says, or it hangs.

use crate::common::{Agent, Attached, Relay, SOON, WIRES, Wire, at_once, config, migrates_next_time, moves_to, passes};
use crate::scene::{BOUND, FarScene, MOMENTS, Moment, SHORT, Scene, empty, filled, stamped};
use pageferry_client::{Client, Config, Error, IncomingOptions, OutgoingOptions, Ownership, Phase, Target};
use pageferry_tests::deadline::wait_until;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::Instant;

#[test]
fn a_peer_that_falls_silent_is_an_error_within_its_timeout() {
    let cases: Vec<_> = WIRES.iter().flat_map(|wire| MOMENTS.map(|moment| (*wire, moment))).collect();
    at_once(&cases, |&(wire, (moment, is_there))| {
        let options = OutgoingOptions { peer_timeout: SHORT, hook_timeout: SHORT, ..passes(2) };
        let mut scene = Scene::start(wire, &options);
        // From now on nothing is passed on, and nothing is closed.
        let _record = scene.relay.until(is_there);
        let started = Instant::now();
        let status = scene.assert_source_failed();
        // Whichever the source was at: waiting for an answer, or for room to send.
        let words = ["was silent for 400ms", "took nothing for 400ms"];
        assert!(words.iter().any(|words| status.error.contains(words)), "{wire:?}, {moment}: {}", status.error);
        assert!(started.elapsed() < BOUND);
        if moment != MOMENTS[0].0 {
            let status = scene.assert_destination_failed();
            let words = ["silent", "closed"];
            assert!(words.iter().any(|words| status.error.contains(words)), "{wire:?}, {moment}: {}", status.error);
        }
        assert!(started.elapsed() < BOUND);
        migrates_next_time(&scene.source);
    });
}

#[test]
fn a_peer_that_does_not_accept_the_connection_is_an_error_within_its_timeout() {
    let source = filled();
    let folder = tempfile::tempdir().unwrap();
    let options = OutgoingOptions { peer_timeout: SHORT, ..passes(1) };
    let fails = |address: &str, words: &str| {
        let started = Instant::now();
        let outgoing = source.client.start_outgoing(Target::Address(address.to_owned()), &options).unwrap().job;
        let status = source.wait(outgoing);
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error.contains(words), "{}", status.error);
        assert!(started.elapsed() < BOUND);
        assert!(!source.vmm.is_paused());
    };
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_address = format!("tcp:{}", tcp.local_addr().unwrap());
    // One that listens, and does nothing more.
    let path = folder.path().join("deaf");
    let _unix = UnixListener::bind(&path).unwrap();
    fails(&format!("unix:{}", path.display()), "silent");
    fails(&tcp_address, "silent");
    // Nobody is there.
    fails(&format!("unix:{}", folder.path().join("nobody").display()), "nobody");
    drop(tcp);
    fails(&tcp_address, &tcp_address);
    migrates_next_time(&source);
}

/// The moments in which an agent hangs: in a pass, and while the guest stands still.
fn moments_of_a_hang() -> [(Wire, Moment); 4] {
    [(Wire::Unix, MOMENTS[3]), (Wire::Tcp, MOMENTS[3]), (Wire::Unix, MOMENTS[7]), (Wire::Tcp, MOMENTS[7])]
}

#[test]
fn a_destination_agent_that_hangs_is_an_error_within_the_timeout_and_the_guest_runs_on() {
    at_once(&moments_of_a_hang(), |&(wire, (moment, is_there))| {
        let options = OutgoingOptions { peer_timeout: SHORT, hook_timeout: SHORT, ..passes(2) };
        let mut scene = FarScene::start(wire, &options);
        let record = scene.relay.until(is_there);
        scene.agent.freeze();
        scene.relay.pass(record);
        let started = Instant::now();
        let status = scene.finish();
        assert_eq!(status.phase, Phase::Failed, "{moment}: {}", status.error);
        assert!(status.error.contains("silent"), "{moment}: {}", status.error);
        assert!(started.elapsed() < BOUND);
        assert!(!scene.source.vmm.is_paused());
        migrates_next_time(&scene.source);
    });
}

#[test]
fn a_source_agent_that_hangs_is_given_up_by_its_vmm_and_the_guest_runs_on() {
    at_once(&moments_of_a_hang(), |&(wire, (_, is_there))| {
        let mut agent = Agent::spawn();
        let config = Config { request_timeout: 2 * SHORT, ..config() };
        let (client, channel) = Client::connect(agent.socket(), config).unwrap();
        let source = Attached::over(client, channel, stamped());
        let destination = empty();
        let mut relay = Relay::over(wire);
        let options = IncomingOptions { peer_timeout: SHORT, ..IncomingOptions::default() };
        let incoming = relay.listen(&destination.client, &options);
        let outgoing = relay.send(&source.client, &passes(2));
        let _record = relay.until(is_there);
        agent.freeze();
        let started = Instant::now();
        // Whatever it asks of its agent next tells the VMM.
        let lost = source.client.wait(outgoing, SOON).unwrap_err();
        assert!(matches!(lost, Error::AgentLost { .. }), "{lost}");
        wait_until("the guest to run", SOON, || !source.vmm.is_paused()).unwrap();
        assert_eq!(destination.wait(incoming).phase, Phase::Failed);
        assert!(started.elapsed() < BOUND);
        assert_eq!(source.client.ownership(), Ownership::Ours);

        let next = Agent::spawn();
        source.reattach(next.socket());
        moves_to(&source, &destination);
    });
}
