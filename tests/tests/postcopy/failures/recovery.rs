// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A second failure during a recovery: both sides pause again, and the next attempt succeeds.

use super::scene::{Scene, TIMEOUT, WANTED, postcopy, run, stamp_of};
use pageferry_client::{OutgoingOptions, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::require;
use pageferry_tests::scenario::{Passing, WIRES};

/// A record of the recovery that is not delivered.
type Moment = (&'static str, fn(&Passing) -> bool);

const MOMENTS: [Moment; 9] = [
    ("at the first hello", |record| record.kind == Kind::Hello),
    ("at the second hello", |record| record.kind == Kind::Hello && record.stream == 1),
    ("at the last hello", |record| record.kind == Kind::Hello && record.stream == 2),
    ("at the accept", |record| record.kind == Kind::Accept),
    ("at what was received", |record| record.kind == Kind::Received),
    ("at the request", |record| record.kind == Kind::Request),
    ("at the first page", |record| record.kind == Kind::Data),
    ("at the end", |record| record.kind == Kind::End),
    ("at the last words", |record| record.kind == Kind::Complete && !record.to_destination),
];

#[test]
fn a_recovery_cut_at_any_record_can_be_repeated() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        for (moment, is_there) in MOMENTS {
            for inside in [false, true] {
                eprintln!("{wire:?}: cut {moment}, inside: {inside}");
                let mut scene = Scene::start(wire, &postcopy());
                let touch = scene.until_cut();
                scene.recover();
                if moment == "at the request" {
                    // Before the source knows what it may push, because it would push the page.
                    let _received = scene.relay.until(|record| record.kind == Kind::Received);
                }
                let record = scene.relay.until(is_there);
                scene.relay.cut_in(&record, if inside { record.bytes().len() / 2 } else { 0 });
                if moment == "at the last words" {
                    // All memory is there. The destination only waits until the source knows.
                    scene.source.reaches(Phase::PostcopyPaused);
                } else {
                    scene.assert_paused();
                }
                scene.recover();
                scene.assert_completes();
                assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
            }
        }
    }
}

#[test]
fn an_unreachable_destination_leaves_it_paused() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &postcopy());
        let touch = scene.until_cut();
        for address in ["unix:/nonexistent/stream", "tcp:127.0.0.1:1"] {
            scene.source.client.recover(Some(address), &OutgoingOptions::default()).unwrap();
            let status = scene.source.reaches(Phase::PostcopyPaused);
            assert!(status.error_text().contains(address), "{}", status.error_text());
            // The same by an operator, who gets the error at once.
            let output = run(scene.source.agent.socket(), "recover", &["--address", address]);
            assert_eq!(output.status.code(), Some(3), "{output:?}");
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(said.contains("is paused") && said.contains(address), "{said}");
        }
        assert!(touch.waits());
        // The wrong addresses do not stick: without one, the last that worked is used.
        scene.source.client.recover(None, &OutgoingOptions::default()).unwrap();
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    }
}

#[test]
fn a_silent_destination_leaves_it_paused() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(
        pageferry_tests::scenario::Wire::Unix,
        &OutgoingOptions { peer_timeout: TIMEOUT, ..postcopy() },
    );
    let touch = scene.until_cut();
    scene.recover();
    let _hello = scene.relay.until(|record| record.kind == Kind::Hello);
    let status = scene.source.reaches(Phase::PostcopyPaused);
    assert!(status.error_text().contains("silent for "), "{}", status.error_text());
    scene.relay.cut();
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn only_one_recovery_at_a_time_and_none_of_what_runs() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(pageferry_tests::scenario::Wire::Unix, &postcopy());
    let (request, touch) = scene.until_runs();
    let refused =
        || scene.source.client.recover(None, &OutgoingOptions::default()).unwrap_err().to_string();
    assert!(refused().contains("no job is paused"), "{}", refused());
    drop(request);
    scene.relay.cut();
    scene.assert_paused();
    scene.recover();
    let refused =
        || scene.source.client.recover(None, &OutgoingOptions::default()).unwrap_err().to_string();
    assert!(
        ["is running", "is being recovered"].iter().any(|word| refused().contains(word)),
        "{}",
        refused()
    );
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    let refused =
        scene.source.client.recover(None, &OutgoingOptions::default()).unwrap_err().to_string();
    assert!(refused.contains("Gone"), "{refused}");
}
