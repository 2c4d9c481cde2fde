// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests at the wrong moment, which are refused with the reason, and agents that are shut down
//! during a postcopy.

use super::scene::{
    Scene, Side, WANTED, assert_arrived, empty, operator, postcopy, run, stamp_of, stamped,
};
use pageferry_client::{Client, Error, Mode, NonConvergence, OutgoingOptions, Phase, Target};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{Attached, SOON, Wire, lock, passes};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

fn sentence<T: std::fmt::Debug>(refused: Result<T, Error>) -> String {
    match refused {
        Err(Error::Refused { sentence, .. }) => sentence,
        other => panic!("not refused: {other:?}"),
    }
}

/// Checks that neither the VMM nor an operator can cancel either side.
fn assert_too_late_to_cancel(scene: &Scene) {
    for side in [&scene.source, &scene.destination] {
        let refused = sentence(side.client.cancel());
        assert!(refused.contains("too late to cancel"), "{refused}");
        let output = side.run("cancel", &[]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("too late to cancel") && said.contains("recovered"), "{said}");
    }
}

#[test]
fn after_the_switchover_it_is_too_late_to_cancel() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &postcopy());
    let (_request, touch) = scene.until_runs();
    assert_too_late_to_cancel(&scene);
    let refused = scene.source.run("resume", &["--force"]);
    assert_eq!(refused.status.code(), Some(1), "the guest runs at the destination");
    scene.relay.cut();
    scene.assert_paused();
    assert_too_late_to_cancel(&scene);
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn an_agent_told_to_end_finishes_the_postcopy_first() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::between(Wire::Unix, Side::far(stamped()), Side::far(empty()), &postcopy());
    let (request, touch) = scene.until_runs();
    for side in [&mut scene.source, &mut scene.destination] {
        side.agent.terminate();
    }
    for side in [&scene.source, &scene.destination] {
        // The agent refuses new jobs while it waits for its job.
        let stops = || {
            sentence_of(
                side.client
                    .start_incoming(Target::Address("unix:/nowhere".into()), &Default::default()),
            )
        };
        wait_until("the agent to stop", SOON, || stops().contains("is ending")).unwrap();
        side.reaches(Phase::Postcopy);
        assert!(side.client.status().is_ok());
    }
    scene.relay.pass(request);
    let Scene { relay, source, destination, .. } = &mut scene;
    let there = destination.vmm.clone();
    relay.pump("the memory to be there", || lock(&there.asked).complete == 1);
    let ended = || source.client.status().is_err() && destination.client.status().is_err();
    relay.pump("the end of both agents", ended);
    assert!(source.agent.ends_well() && destination.agent.ends_well());
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    wait_until("the agent to be lost", SOON, || !lock(&there.asked).losses.is_empty()).unwrap();
    assert_eq!(lock(&there.asked).losses, ["agent"], "all its memory is there");
    assert_eq!(lock(&there.asked).complete, 1);
}

fn sentence_of<T>(refused: Result<T, Error>) -> String {
    refused.err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn an_agent_that_is_told_to_end_while_it_is_paused_ends() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::between(Wire::Unix, Side::far(stamped()), Side::far(empty()), &postcopy());
    let touch = scene.until_cut();
    scene.destination.agent.terminate();
    assert!(scene.destination.agent.ends_well());
    let there = scene.destination.vmm.clone();
    wait_until("the memory to be lost", SOON, || lock(&there.asked).losses.len() == 2).unwrap();
    assert_eq!(lock(&there.asked).losses, ["memory", "agent"]);
    touch.found().unwrap_err();
    scene.source.agent.terminate();
    assert!(scene.source.agent.ends_well());
    assert!(scene.source.vmm.is_paused(), "only force resumes it");
}

#[test]
fn postcopy_that_cannot_be_is_refused_by_the_field() {
    let source = Side::near(stamped());
    let nowhere = || Target::Address("unix:/nowhere".into());
    let start =
        |target, options: &OutgoingOptions| sentence(source.client.start_outgoing(target, options));
    let refused =
        start(nowhere(), &OutgoingOptions { policy: NonConvergence::Postcopy, ..passes(1) });
    assert!(refused.contains("policy is 0x4") && refused.contains("hybrid"), "{refused}");
    let refused = start(nowhere(), &OutgoingOptions { urgent_streams: 0, ..postcopy() });
    assert!(refused.contains("urgent_streams is 0x0"), "{refused}");
    let refused = start(nowhere(), &OutgoingOptions { switch_after: 3, ..postcopy() });
    assert!(refused.contains("switch_after is 0x3") && refused.contains("hybrid"), "{refused}");
    let refused = start(nowhere(), &OutgoingOptions { release: true, ..passes(1) });
    assert!(refused.contains("release is 0x1") && refused.contains("postcopy"), "{refused}");
    for mode in [Mode::Postcopy, Mode::Hybrid] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let refused =
            start(Target::Socket(ours.into()), &OutgoingOptions { mode, streams: 1, ..postcopy() });
        assert!(
            refused.contains(&format!("mode is {}", mode.name())) && refused.contains("descriptor"),
            "{refused}"
        );
    }
    // No job is paused or running.
    let recover = |client: &Client, address| sentence_of(client.recover(address, &postcopy()));
    for address in [None, Some("unix:/nowhere")] {
        assert!(
            recover(&source.client, address).contains("no job is paused"),
            "{}",
            recover(&source.client, address)
        );
    }
    let refused = recover(&source.client, Some("carrier:pigeon"));
    assert!(refused.contains("carrier:pigeon"), "{refused}");
    for what in ["recover", "postcopy"] {
        let output = run(source.agent.socket(), what, &[]);
        assert_eq!(output.status.code(), Some(1));
    }
    assert!(sentence(source.client.start_postcopy()).contains("no outgoing migration is running"));
    assert_eq!(source.client.status().unwrap().phase, Phase::Idle);
    assert_eq!(lock(&source.vmm.asked).pauses, 0);
}

#[test]
fn watching_tells_of_a_pause_without_a_terminal_too() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &postcopy());
    let mut watch = operator(scene.source.agent.socket(), "watch", &[]);
    let mut watch = watch.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let touch = scene.until_cut();
    let mut line = String::new();
    BufReader::new(watch.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let said = format!(
        "job {} (outgoing) is paused: {}",
        scene.outgoing,
        scene.source.seen().error_text()
    );
    assert!(line.contains(&said), "{line}");
    let socket = scene.source.agent.socket().display().to_string();
    assert!(line.contains(&format!("pageferry recover --socket {socket}")), "{line}");
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    assert!(watch.wait().unwrap().success());
}

#[test]
fn the_switch_to_postcopy_is_refused_in_other_modes() {
    if !require::uffd() {
        return;
    }
    // Precopy, in a pass.
    let mut scene = Scene::start(Wire::Unix, &passes(1));
    let record = scene.relay.until(|record| record.kind == Kind::Data);
    let refused = sentence(scene.source.client.start_postcopy());
    assert!(refused.contains("mode is precopy") && refused.contains("hybrid"), "{refused}");
    let refused = sentence(scene.destination.client.start_postcopy());
    assert!(refused.contains("no outgoing"), "{refused}");
    scene.relay.pass(record);
    assert_eq!(scene.relay.finish(&scene.source.client, scene.outgoing).phase, Phase::Completed);

    // Hybrid, before and after the switch.
    let hybrid = OutgoingOptions {
        mode: Mode::Hybrid,
        max_passes: 0,
        policy: NonConvergence::KeepGoing,
        ..postcopy()
    };
    let mut scene =
        Scene::start(Wire::Unix, &OutgoingOptions { downtime_limit: Duration::ZERO, ..hybrid });
    let record = scene.relay.until(|record| record.kind == Kind::Data);
    let asked = scene.source.run("postcopy", &["--json"]);
    assert!(asked.status.success(), "{asked:?}");
    let said = String::from_utf8(asked.stdout).unwrap();
    assert!(said.contains("switching to postcopy when the current pass ends"), "{said}");
    let status = scene.source.client.status().unwrap();
    assert_eq!(status.error_text(), "postcopy begins when this pass ends");
    scene.source.client.start_postcopy().unwrap();
    // A page that is dirty at the pause is still missing afterwards.
    scene.source.write(WANTED, stamp_of(WANTED));
    scene.relay.pass(record);
    let commit = scene.relay.until(|record| record.kind == Kind::Commit);
    let refused = sentence(scene.source.client.start_postcopy());
    assert!(refused.contains("mode is hybrid and the phase committing"), "{refused}");
    scene.relay.pass(commit);
    scene.assert_completes();
}

#[test]
fn no_other_job_starts_during_a_paused_postcopy() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &postcopy());
    let _touch = scene.until_cut();
    let incoming = |side: &Attached| {
        sentence_of(
            side.client
                .start_incoming(Target::Address("unix:/nowhere".into()), &Default::default()),
        )
    };
    for side in [&scene.source, &scene.destination] {
        let refused = incoming(side);
        assert!(refused.contains("is running"), "{refused}");
    }
    let refused =
        scene.source.client.start_outgoing(Target::Address("unix:/nowhere".into()), &postcopy());
    assert!(matches!(refused, Err(Error::NotOurs { .. })));
    // The guest runs at the destination, and cannot migrate again before all its memory is there.
    let refused = sentence(
        scene
            .destination
            .client
            .start_outgoing(Target::Address("unix:/nowhere".into()), &postcopy()),
    );
    assert!(refused.contains("is running"), "{refused}");
    scene.recover();
    scene.assert_completes();
    // Now it can.
    let next = Side::near(empty());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("next");
    let there = next.listen(&path, &Default::default());
    let outgoing = scene.destination.send(&path, &postcopy());
    assert_eq!(scene.destination.wait(outgoing).phase, Phase::Completed);
    assert_eq!(next.wait(there).phase, Phase::Completed);
    assert_arrived(&next);
}
