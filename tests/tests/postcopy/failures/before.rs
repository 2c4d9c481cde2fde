// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Failures before the commit, or while the commit is on its way. Before it the guest keeps running
//! at the source, the destination is unchanged, and the next attempt completes.

use super::scene::{
    PAGES, Scene, Side, TIMEOUT, WANTED, assert_arrived, assert_not_registered, empty, postcopy,
    stamp_of, stamped,
};
use pageferry_client::{
    Error, HookError, IncomingOptions, JobStatus, OutgoingOptions, Ownership, Phase, Target,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_protocol::userfault::{AddressRange, RegisterMode, Userfaultfd, feature};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::require;
use pageferry_tests::scenario::{At, Attached, Passing, Relay, SOON, WIRES, Wire, at_once, lock};

type Moment = (&'static str, fn(&Passing) -> bool);

const MOMENTS: [Moment; 10] = [
    ("at the first hello", |record| record.kind == Kind::Hello),
    ("at the last hello", |record| record.kind == Kind::Hello && record.stream == 2),
    ("at the accept", |record| record.kind == Kind::Accept),
    ("at the state", |record| record.kind == Kind::State),
    ("at a discard", |record| record.kind == Kind::Discard),
    ("at what remains", |record| record.kind == Kind::Remaining),
    ("at the end", |record| record.kind == Kind::End && record.stream == 0),
    ("at the end of the other stream", |record| record.kind == Kind::End && record.stream == 1),
    ("at loaded", |record| record.kind == Kind::Loaded),
    ("at the commit", |record| record.kind == Kind::Commit),
];

fn ended(side: &Side, phase: Phase) -> JobStatus {
    let status = side.reaches(phase);
    assert!(status.error.is_some());
    status
}

/// Checks that the guest keeps running at the source.
fn assert_runs_here(source: &Attached) {
    wait_until("the guest to run", SOON, || !source.vmm.is_paused()).unwrap();
    assert_eq!(source.client.ownership(), Ownership::Ours);
}

/// Checks that nothing ran at the destination, and that no access waits there.
fn assert_nothing_there(destination: &Attached) {
    assert_eq!(destination.vmm.resumes(), 0);
    assert_eq!(destination.client.ownership(), Ownership::Awaiting);
    wait_until("what was announced as missing to be taken back", SOON, || {
        let asked = lock(&destination.vmm.asked);
        asked.pending == asked.complete
    })
    .unwrap();
    assert_not_registered(destination);
}

/// Checks that these two sides can migrate without a relay.
fn assert_next_completes(source: &Side, destination: &Side) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("next");
    *lock(&destination.vmm.asked) = pageferry_tests::scenario::Asked::default();
    let incoming = destination.listen(&path, &IncomingOptions::default());
    let outgoing = source.send(&path, &postcopy());
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let status = destination.wait(incoming);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_arrived(destination);
}

#[test]
fn a_link_cut_before_the_commit_leaves_both_sides_clean() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        for (moment, is_there) in MOMENTS {
            if moment == "at the commit" {
                continue;
            }
            eprintln!("{wire:?}: cut {moment}");
            let mut scene = Scene::start(wire, &postcopy());
            let record = scene.relay.until(is_there);
            // The destination's VMM may touch memory while it loads its state.
            let touch = (moment == "at loaded").then(|| scene.destination.ram.touch(WANTED));
            scene.relay.cut_in(&record, record.bytes().len() / 2);
            ended(&scene.source, Phase::Failed);
            assert_runs_here(&scene.source);
            if record.kind == Kind::Hello {
                // The destination waits for another source.
                assert_eq!(scene.destination.seen().phase, Phase::Connecting);
                scene.destination.client.cancel().unwrap();
                ended(&scene.destination, Phase::Cancelled);
            } else {
                ended(&scene.destination, Phase::Failed);
            }
            assert_nothing_there(&scene.destination);
            if let Some(touch) = touch {
                touch.found().unwrap();
            }
            assert_next_completes(&scene.source, &scene.destination);
        }
    }
}

#[test]
fn a_cancel_before_the_commit_leaves_both_sides_clean() {
    if !require::uffd() {
        return;
    }
    for (moment, is_there) in MOMENTS {
        for here in [true, false] {
            let too_late = moment == "at the commit";
            eprintln!("cancelled {moment}, at the source: {here}");
            let mut scene = Scene::start(Wire::Unix, &postcopy());
            let record = scene.relay.until(is_there);
            let side = if here { &scene.source } else { &scene.destination };
            let cancelled = side.client.cancel();
            if too_late && here {
                let error = cancelled.unwrap_err().to_string();
                assert!(error.contains("too late to cancel"), "{error}");
                scene.relay.pass(record);
                scene.assert_completes();
                continue;
            }
            cancelled.unwrap();
            if too_late {
                // The source has sent the commit, and cannot know whether it arrived.
                scene.destination.reaches(Phase::Cancelled);
                let source = &scene.source;
                scene.relay.pump("the pause", || source.seen().phase == Phase::PostcopyPaused);
                assert!(source.vmm.is_paused());
                assert_nothing_there(&scene.destination);
                continue;
            }
            if moment == "at loaded" && !here {
                // If this record arrived, the source would commit.
                scene.relay.cut();
            } else {
                scene.relay.pass(record);
            }
            let (source, destination) = (&scene.source, &scene.destination);
            let over = |side: &Side| side.seen().phase.is_final();
            if here && moment.contains("hello") {
                scene.relay.pump("the end", || over(source));
                // The destination waits for another source, unless all hellos had arrived.
                let _ = destination.client.cancel();
            }
            scene.relay.pump("the end", || over(source) && over(destination));
            assert_eq!(side.seen().phase, Phase::Cancelled, "{}", side.seen().error_text());
            assert_runs_here(source);
            assert_nothing_there(destination);
            assert_next_completes(source, destination);
        }
    }
}

#[test]
fn a_bad_hook_before_the_commit_leaves_both_sides_clean() {
    if !require::uffd() {
        return;
    }
    // Hooks of the source (true) and of the destination (false).
    let hooks = [
        ("pause", At::Pause, true),
        ("save state", At::SaveState, true),
        ("register faults", At::MemoryPending, false),
        ("load state", At::LoadState, false),
        // The client library itself answers this hook, so it can only be late.
        ("relinquish", At::phase(Phase::Committing), true),
    ];
    let cases: Vec<_> = hooks.iter().flat_map(|hook| [(*hook, false), (*hook, true)]).collect();
    at_once(&cases, |&((name, at, here), never)| {
        if !never && name == "relinquish" {
            return;
        }
        let (source, destination) = (Side::near(stamped()), Side::near(empty()));
        let vmm = if here { source.vmm.clone() } else { destination.vmm.clone() };
        let hold = never.then(|| vmm.block(at));
        if !never {
            vmm.on(at, || Err(HookError::new("the fan is on fire")));
        }
        let options =
            OutgoingOptions { hook_timeout: if never { TIMEOUT } else { SOON }, ..postcopy() };
        let mut scene = Scene::between(Wire::Unix, source, destination, &options);
        let (source, there) = (&scene.source, &scene.destination);
        scene
            .relay
            .pump("the end", || source.seen().phase.is_final() && there.seen().phase.is_final());
        let words = if never { format!("\"{name}\"") } else { "the fan is on fire".to_owned() };
        for side in [source, there] {
            let status = ended(side, Phase::Failed);
            assert!(
                status.error_text().contains(&words),
                "{name}, never: {never}: {}",
                status.error_text()
            );
        }
        vmm.off(at);
        drop(hold);
        if never && at == At::MemoryPending {
            // The VMM registers too late, and then undoes that.
            wait_until("the late registration", SOON, || lock(&vmm.asked).complete == 1).unwrap();
        }
        assert_runs_here(source);
        assert_nothing_there(there);
        assert_next_completes(source, there);
    });
}

#[test]
fn a_mapping_of_another_userfaultfd_fails_by_its_address() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &postcopy());
    let other = Userfaultfd::open(feature::WP_HUGETLBFS_SHMEM).unwrap();
    let range = AddressRange { start: scene.destination.ram.address(), length: PAGES * PAGE_SIZE };
    other.register(range, RegisterMode::WriteProtect).unwrap();
    let (source, there) = (&scene.source, &scene.destination);
    scene.relay.pump("the end", || source.seen().phase.is_final() && there.seen().error.is_some());
    for status in [ended(source, Phase::Failed), there.seen()] {
        let address = format!("{:#x}", range.start);
        for words in [&address, "block 3", "missing pages", "busy"] {
            assert!(status.error_text().contains(words), "{words}: {}", status.error_text());
        }
    }
    // Nothing was moved, and the destination waits for another source.
    assert!(
        scene.relay.seen.iter().all(|record| matches!(record.kind, Kind::Hello | Kind::Reject))
    );
    assert_eq!(there.seen().phase, Phase::Connecting);
    assert_runs_here(source);
    other.unregister(range).unwrap();
    there.client.cancel().unwrap();
    ended(there, Phase::Cancelled);
    assert_nothing_there(there);
    assert_next_completes(source, there);
}

#[test]
fn a_block_mapped_nowhere_is_refused_before_anything_moves() {
    if !require::uffd() {
        return;
    }
    let unmapped = Side::near(pageferry_tests::scenario::Ram::odd(PAGES));
    let mut scene = Scene::between(Wire::Unix, Side::near(stamped()), unmapped, &postcopy());
    let (source, there) = (&scene.source, &scene.destination);
    scene.relay.pump("the end", || source.seen().phase.is_final() && there.seen().error.is_some());
    for status in [ended(source, Phase::Failed), there.seen()] {
        assert!(
            status.error_text().contains("block 3 has no vmm_address"),
            "{}",
            status.error_text()
        );
    }
    assert!(
        scene.relay.seen.iter().all(|record| matches!(record.kind, Kind::Hello | Kind::Reject))
    );
    assert_eq!(lock(&source.vmm.asked).pauses, 0);
    assert_next_completes(source, &Side::near(empty()));
}

#[test]
fn after_a_lost_commit_only_force_resumes_the_guest() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &postcopy());
        let commit = scene.relay.until(|record| record.kind == Kind::Commit);
        scene.relay.cut_in(&commit, 10);
        ended(&scene.destination, Phase::Failed);
        assert_nothing_there(&scene.destination);
        let status = scene.source.reaches(Phase::PostcopyPaused);
        assert!(status.error_text().contains("did not confirm"), "{}", status.error_text());
        assert!(scene.source.vmm.is_paused());
        assert_eq!(scene.source.client.ownership(), Ownership::Relinquished);
        let again = scene
            .source
            .client
            .start_outgoing(Target::Address("unix:/nowhere".into()), &postcopy());
        assert!(matches!(again, Err(Error::NotOurs { .. })));
        // No process listens there any more.
        let nowhere = scene.relay.place();
        let nowhere = if wire == Wire::Unix { nowhere } else { "tcp:127.0.0.1:1".to_owned() };
        scene.source.client.recover(Some(&nowhere), &OutgoingOptions::default()).unwrap();
        let status = scene.source.reaches(Phase::PostcopyPaused);
        assert!(status.error_text().contains(&nowhere), "{}", status.error_text());
        assert!(scene.source.run("resume", &["--force"]).status.success());
        assert_runs_here(&scene.source);
        assert_eq!(scene.source.vmm.resumes(), 1);
        assert_next_completes(&scene.source, &scene.destination);
    }
}

#[test]
fn a_destination_waiting_for_another_guest_is_not_recovered() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &postcopy());
    let commit = scene.relay.until(|record| record.kind == Kind::Commit);
    scene.relay.cut_in(&commit, 0);
    ended(&scene.destination, Phase::Failed);
    scene.source.reaches(Phase::PostcopyPaused);
    let mut next = Relay::unix();
    next.listen(&scene.destination.client, &IncomingOptions::default());
    scene.source.client.recover(Some(&next.address()), &OutgoingOptions::default()).unwrap();
    let source = &scene.source;
    next.pump("the pause", || source.seen().phase == Phase::PostcopyPaused);
    let error = source.seen().error.unwrap();
    assert!(error.contains("no migration is paused here"), "{error}");
    assert_eq!(scene.destination.seen().phase, Phase::Connecting);
}

#[test]
fn a_commit_that_arrived_without_an_answer_is_recovered_from() {
    if !require::uffd() {
        return;
    }
    for wire in WIRES {
        let mut scene = Scene::start(wire, &postcopy());
        let (loaded, _request, touch) = scene.until_asked();
        scene.relay.pass(loaded);
        let resumed = scene.relay.until(|record| record.kind == Kind::Resumed);
        scene.relay.cut_in(&resumed, 7);
        let (source, _) = scene.assert_paused();
        assert!(source.error_text().contains("did not confirm"), "{}", source.error_text());
        assert_eq!(scene.destination.vmm.resumes(), 1);
        scene.recover();
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    }
}
