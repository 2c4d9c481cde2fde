//! The other side is there, and says nothing: the link swallows what it says, or it hangs.

use crate::common::{
    Agent, At, Attached, Ram, Relay, SOON, Side, WIRES, Wire, assert_same, at_once, config, migrates_next_time,
    moves_to, passes,
};
use crate::scene::{BOUND, FarScene, MOMENTS, Moment, PAGES, SHORT, Scene, empty, filled, stamped};
use pageferry_client::{
    Client, Config, Error, IncomingOptions, MIN_BANDWIDTH, OutgoingOptions, Ownership, Phase, Target, Trackers,
};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

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
        // On a busy machine the time for the whole stop may be over first.
        let words = ["was silent for ", "did not take what was sent within", "hand-over was not done"];
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
        // On a busy machine the time for the whole stop may be over first.
        let words = ["silent", "hand-over was not done"];
        assert!(words.iter().any(|words| status.error.contains(words)), "{moment}: {}", status.error);
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

#[test]
fn a_peer_that_answers_byte_by_byte_does_not_keep_the_guest_paused() {
    at_once(&WIRES, |&wire| {
        let options = OutgoingOptions { peer_timeout: SHORT, hook_timeout: SHORT, ..passes(1) };
        let mut scene = Scene::start(wire, &options);
        let record = scene.relay.until(|record| record.kind == Kind::Loaded);
        // Each byte comes long before the timeout, and all of them long after it.
        scene.relay.trickle(&record, SHORT / 8, || scene.source.client.status().unwrap().phase.is_final());
        let status = scene.assert_source_failed();
        // On a busy machine the time for the whole stop may be over first.
        let words = ["did not send a whole record within 1", "hand-over was not done"];
        assert!(words.iter().any(|words| status.error.contains(words)), "{}", status.error);
        scene.assert_destination_failed();
        migrates_next_time(&scene.source);
    });
}

#[test]
fn hooks_that_are_slow_one_after_another_have_one_deadline_for_the_whole_stop() {
    let source = filled();
    source.client.set_trackers(Trackers::HOOKS).unwrap();
    let slow = || {
        std::thread::sleep(Duration::from_secs(3));
        Ok(())
    };
    source.vmm.on(At::Pause, slow);
    source.vmm.on(At::SaveState, slow);
    let destination = empty();
    destination.vmm.on(At::LoadState, slow);
    // Each of the three is within its own timeout; the stop may take 8 s and a little.
    let options =
        OutgoingOptions { peer_timeout: Duration::from_millis(400), hook_timeout: Duration::from_secs(4), ..passes(1) };
    let mut relay = Relay::new();
    // The destination waits for the slow source.
    let incoming = relay.listen(&destination.client, &IncomingOptions::default());
    let outgoing = relay.send(&source.client, &options);
    let status = relay.finish(&source.client, outgoing);
    assert_eq!(status.phase, Phase::Failed, "{}", status.error);
    assert!(status.error.contains("hand-over was not done within 8.4"), "{}", status.error);
    assert!(!source.vmm.is_paused(), "the guest stands still");
    assert_eq!(destination.wait(incoming).phase, Phase::Failed);
    for at in [At::Pause, At::SaveState] {
        source.vmm.off(at);
    }
    migrates_next_time(&source);
}

#[test]
fn a_destination_that_is_killed_under_a_low_bandwidth_is_noticed() {
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
    assert_eq!(status.phase, Phase::Failed, "{}", status.error);
    assert!(status.counters.pages_sent < PAGES, "it went on: {:?}", status.counters);
    migrates_next_time(&source);
}

#[test]
fn a_low_bandwidth_does_not_make_the_source_look_dead() {
    let (source, destination) = (Side::new(Ram::odd(128)), Side::new(Ram::odd(128)));
    (0..128).for_each(|page| source.ram.write(page, page + 1));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("direct");
    // 256 KiB take 4 s.
    let options = IncomingOptions { peer_timeout: Duration::from_secs(3), ..IncomingOptions::default() };
    let incoming = destination.listen(&path, &options);
    let outgoing = source.send(&path, &OutgoingOptions { bandwidth: MIN_BANDWIDTH, ..passes(1) });
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    assert_eq!(destination.wait(incoming).phase, Phase::Completed);
    assert_same(&source.ram, &destination.ram);
}
