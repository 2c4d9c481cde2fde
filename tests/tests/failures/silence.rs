//! The other side is there, and says nothing.

use crate::common::{WIRES, at_once, migrates_next_time, passes};
use crate::scene::{BOUND, MOMENTS, SHORT, Scene, filled};
use pageferry_client::{OutgoingOptions, Phase, Target};
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
