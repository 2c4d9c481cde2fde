// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection that is lost after the guest started at the destination: both sides pause with a
//! reason, and continue when they are recovered.

use super::scene::{
    DISCARDED, HOLES, Scene, Side, TIMEOUT, URGENT, WANTED, postcopy, run, stamp_of,
};
use pageferry_client::{OutgoingOptions, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{Passing, Relay, SOON, Touch, WIRES, Wire, at_once, lock};
use serde_json::Value;
use std::process::Output;

/// Where a connection is cut: a name, the kind of record, its stream, and the number of streams
/// that push.
type Moment = (&'static str, Kind, fn(u16) -> bool, u16);

const MOMENTS: [Moment; 5] = [
    ("at a page on the primary", Kind::Data, |stream| stream == 0, 1),
    // The first of these streams may push all pages.
    ("at a page on either stream", Kind::Data, |stream| stream < URGENT, 2),
    ("at the answer", Kind::Data, |stream| stream == URGENT, 2),
    ("at the end of the primary", Kind::End, |stream| stream == 0, 2),
    ("at the end of the other stream", Kind::End, |stream| stream == 1, 2),
];

/// Passes records on until the guest runs and waits for a page, and the record is there.
fn until_there(scene: &mut Scene, (_, kind, on, _): Moment) -> (Touch, Passing) {
    let (loaded, request, touch) = scene.until_asked();
    // The answer comes before the guest runs, because then the push begins and would send the page.
    let is_there =
        |record: &Passing| record.to_destination && record.kind == kind && on(record.stream);
    let answered = on(URGENT).then(|| {
        scene.relay.pass(request);
        scene.relay.until(is_there)
    });
    scene.relay.pass(loaded);
    let resumed = scene.relay.until(|record| record.kind == Kind::Resumed);
    scene.relay.pass(resumed);
    let record = answered.unwrap_or_else(|| scene.relay.until(is_there));
    (touch, record)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    One,
    All,
    Reset,
}

#[test]
fn any_lost_link_pauses_both_sides_until_recovered() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        for moment in MOMENTS {
            for (cut, inside) in
                [(Cut::One, false), (Cut::One, true), (Cut::All, true), (Cut::Reset, false)]
            {
                eprintln!("{wire:?}: {cut:?} {}, inside: {inside}", moment.0);
                let mut scene =
                    Scene::start(wire, &OutgoingOptions { streams: moment.3, ..postcopy() });
                let (touch, record) = until_there(&mut scene, moment);
                let bytes = if inside { record.bytes().len() / 2 } else { 0 };
                match cut {
                    Cut::One => scene.relay.cut_one(&record, bytes),
                    Cut::All => scene.relay.cut_in(&record, bytes),
                    Cut::Reset => scene.relay.reset(),
                }
                let (source, destination) = scene.assert_paused();
                for status in [source, destination] {
                    assert!(
                        ["closed", "cut", "stream", "reset"]
                            .iter()
                            .any(|word| status.error_text().contains(word)),
                        "{}",
                        status.error_text()
                    );
                }
                // These faults are answered without the source.
                for page in [HOLES.start, DISCARDED] {
                    assert_eq!(scene.destination.ram.touch(page).found().unwrap(), 0);
                }
                scene.recover();
                scene.assert_completes();
                assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
            }
        }
    }
}

/// The last line of a command's output, as an object.
fn last_object(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    serde_json::from_str(
        text.lines().last().unwrap_or_else(|| panic!("nothing printed: {output:?}")),
    )
    .unwrap()
}

#[test]
fn an_operator_sees_the_pause_and_recovers() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &postcopy());
        let touch = scene.until_cut();
        for (side, kind) in [(&scene.source, "outgoing"), (&scene.destination, "incoming")] {
            let seen = last_object(&side.run("status", &["--json"]));
            assert_eq!(
                (&seen["status"], &seen["kind"]),
                (&"postcopy-paused".into(), &kind.into()),
                "{seen}"
            );
            assert!(!seen["error"].as_str().unwrap().is_empty(), "{seen}");
            assert!(seen["disconnected_us"].as_u64().unwrap() > 0, "{seen}");
            let table = String::from_utf8(side.run("status", &[]).stdout).unwrap();
            assert!(table.contains("postcopy-paused") && table.contains("error"), "{table}");
        }
        assert!(touch.waits());
        let socket = scene.source.agent.socket().to_owned();
        let recover = std::thread::spawn(move || run(&socket, "recover", &["--json"]));
        scene.relay.pump("the end of the command", || recover.is_finished());
        let output = recover.join().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(last_object(&output)["status"], "completed");
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    }
}

#[test]
fn a_migration_is_recovered_over_another_address() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &postcopy());
        let touch = scene.until_cut();
        let mut other = Relay::over(wire);
        let place = other.place();
        // The destination does not connect to a source. It gets an address to listen at, and
        // continues when the source connects.
        let refused = scene
            .destination
            .client
            .recover(None, &OutgoingOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("which still listens") && refused.contains("give an address"),
            "{refused}"
        );
        let listening =
            scene.destination.client.recover(Some(&place), &OutgoingOptions::default()).unwrap();
        assert_eq!(listening.job, scene.incoming);
        other.leads_to(&listening.address);
        assert_eq!(scene.destination.seen().phase, Phase::PostcopyPaused);
        assert!(touch.waits());
        scene.source.client.recover(Some(&other.address()), &OutgoingOptions::default()).unwrap();
        scene.relay = other;
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    }
}

#[test]
fn a_destination_does_not_listen_at_a_path_with_a_file() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &postcopy());
    let touch = scene.until_cut();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    let (address, says) =
        (format!("unix:{}", path.display()), format!("{} is a regular file", path.display()));
    let refused =
        scene.destination.client.recover(Some(&address), &OutgoingOptions::default()).unwrap_err();
    assert!(refused.to_string().contains(&says), "{refused}");
    let output = scene.destination.run("recover", &["--address", &address]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains(&says));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    assert_eq!(scene.destination.seen().phase, Phase::PostcopyPaused);
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn operators_recover_over_another_address() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Tcp, &postcopy());
    let touch = scene.until_cut();
    let mut other = Relay::over(Wire::Unix);
    let command = |side: &Side, address: &str| {
        let (socket, address) = (side.agent.socket().to_owned(), address.to_owned());
        std::thread::spawn(move || run(&socket, "recover", &["--json", "--address", &address]))
    };
    let place = other.place();
    let there = command(&scene.destination, &place);
    let path = place.strip_prefix("unix:").unwrap().to_owned();
    wait_until("the destination to listen", SOON, || std::path::Path::new(&path).exists()).unwrap();
    other.leads_to(&place);
    let here = command(&scene.source, &other.address());
    other.pump("the end of both commands", || there.is_finished() && here.is_finished());
    for command in [there, here] {
        let output = command.join().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(last_object(&output)["status"], "completed");
    }
    scene.relay = other;
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn a_link_that_is_lost_at_the_last_words_costs_nothing() {
    if !require::uffd() {
        return;
    }
    at_once(&WIRES, |&wire| {
        // The source does not know that all memory is there, and connects again.
        let mut scene = Scene::start(wire, &postcopy());
        let complete =
            scene.relay.until(|record| record.kind == Kind::Complete && !record.to_destination);
        scene.relay.cut_in(&complete, 0);
        scene.source.reaches(Phase::PostcopyPaused);
        // The destination waits for it: another agent would have to, if this one were lost.
        assert_eq!(lock(&scene.destination.vmm.asked).complete, 0);
        scene.recover();
        scene.assert_completes();
        assert_eq!(lock(&scene.destination.vmm.asked).complete, 1);
        // The destination does not know that the source knows, and does not wait forever.
        let options = OutgoingOptions { peer_timeout: TIMEOUT, ..postcopy() };
        let mut scene = Scene::start(wire, &options);
        let complete =
            scene.relay.until(|record| record.kind == Kind::Complete && record.to_destination);
        scene.relay.cut_in(&complete, 0);
        scene.assert_completes();
    });
}
