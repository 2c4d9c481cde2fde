// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! VMMs with a hook that hangs or fails.

use super::after_commit::assert_stays_paused;
use crate::scene::{Scene, empty, filled};
use pageferry_client::{
    HookError, NonConvergence, OutgoingOptions, Ownership, Parameters, Phase, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{
    At, SOON, ScriptedVmm, Side, TooEarly, WIRES, Wire, at_once, lock, migrates_next_time, passes,
    says, with_more_time,
};
use std::time::Duration;

/// A hook of the source that hangs: its name, its place, and how often it answers before.
type Hang = (&'static str, At, u32);

const BEFORE_THE_PAUSE: [Hang; 6] = [
    ("start tracking", At::StartTracking, 0),
    ("sync tracker", At::Sync, 0),
    ("clear tracker", At::Clear, 0),
    ("sync tracker", At::Sync, 1),
    // The first one comes before the job has begun anything.
    ("throttle", At::Throttle, 1),
    ("throttle", At::Throttle, 2),
];

fn after_the_pause() -> [Hang; 5] {
    [
        ("pause", At::Pause, 0),
        ("save state", At::SaveState, 0),
        ("sync tracker", At::Sync, 2),
        ("clear tracker", At::Clear, 1),
        ("relinquish", At::phase(Phase::Committing), 0),
    ]
}

fn hasty(hook_timeout: Duration) -> OutgoingOptions {
    OutgoingOptions { hook_timeout, ..passes(1) }
}

/// A source with a hook tracker in which a page is dirty at every sync.
fn tracked() -> Side {
    let source = filled();
    source.client.set_trackers(Trackers::HOOKS).unwrap();
    let busy = source.ram.gpa / PAGE_SIZE + 9;
    lock(&source.vmm.kvm).dirty.insert(busy);
    *lock(&source.vmm.on_clear) = Some(Box::new(move |kvm, given| {
        kvm.dirty.retain(|page| !given.contains(page));
        kvm.dirty.insert(busy);
    }));
    source
}

/// Waits until the VMM has answered its hooks, too late, and is then in the state from before the
/// migration.
fn wait_until_undone(vmm: &ScriptedVmm, pauses: bool) {
    wait_until("the VMM to be as before", SOON, || {
        let asked = lock(&vmm.asked);
        let runs = !asked.paused && (!pauses || asked.resumes > 0);
        runs && !asked.tracking && asked.stops_of_tracking > 0 && asked.throttle == 0
    })
    .unwrap();
}

#[test]
fn a_silent_hook_fails_the_job_and_the_guest_runs() {
    let before = BEFORE_THE_PAUSE.map(|hang| (hang, false));
    let cases = [before.as_slice(), &after_the_pause().map(|hang| (hang, true))].concat();
    at_once(&cases, |&((name, at, answered), pauses)| {
        with_more_time(|timeout| {
            let source = tracked();
            let hold = source.vmm.block_after(at, answered);
            let policy = if at == At::Throttle {
                NonConvergence::Throttle
            } else {
                NonConvergence::StopAnyway
            };
            let mut scene = Scene::started_between(
                Wire::Unix,
                source,
                empty(),
                &OutgoingOptions { policy, ..hasty(timeout) },
            );
            let status = scene.end();
            assert_eq!(status.phase, Phase::Failed, "{name} {answered}: {}", status.error_text());
            says(status.error_text(), &[&format!("\"{name}\"")])?;
            assert_eq!(
                scene.source.vmm.is_paused(),
                pauses && at != At::Pause,
                "{name} {answered}"
            );
            scene.assert_destination_failed();
            scene.source.vmm.off(at);
            drop(hold);
            wait_until_undone(&scene.source.vmm, pauses);
            assert_eq!(scene.source.client.ownership(), Ownership::Ours);
            migrates_next_time(&scene.source);
            Ok(())
        });
    });
}

#[test]
fn a_silent_resume_here_fails_the_job_and_resumes_late() {
    with_more_time(|timeout| {
        let source = filled();
        let hold = source.vmm.block(At::Resume);
        let mut scene = Scene::started_between(Wire::Unix, source, empty(), &hasty(timeout));
        let _state = scene.reach(|record| record.kind == Kind::State)?;
        scene.relay.cut();
        let status = scene.source.wait(scene.outgoing);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        // The status has the first error.
        says(status.error_text(), &["closed"])?;
        assert_eq!(scene.source.client.ownership(), Ownership::Ours);
        scene.assert_destination_failed();
        drop(hold);
        wait_until("the guest to run", SOON, || !scene.source.vmm.is_paused()).unwrap();
        migrates_next_time(&scene.source);
        Ok(())
    });
}

#[test]
fn a_silent_resume_there_leaves_the_guest_to_the_destination() {
    at_once(&WIRES, |wire| {
        with_more_time(|timeout| {
            let destination = empty();
            let hold = destination.vmm.block(At::Resume);
            let mut scene = Scene::started_between(*wire, filled(), destination, &hasty(timeout));
            let status = scene.end();
            // The source says why.
            says(status.error_text(), &["\"resume\""])?;
            assert_eq!(status.phase, Phase::Unconfirmed, "{}", status.error_text());
            let there = scene.destination().wait(scene.incoming);
            assert_eq!(there.phase, Phase::Failed);
            // An operator must be able to see at the destination that the guest has arrived.
            assert!(there.arrived, "{there:?}");
            for words in ["the guest is here", "resuming it failed", "\"resume\""] {
                assert!(there.error_text().contains(words), "{}", there.error_text());
            }
            assert_stays_paused(&scene.source);
            drop(hold);
            wait_until("the guest to run", SOON, || scene.destination().vmm.resumes() == 1)
                .unwrap();
            assert_eq!(scene.destination().client.ownership(), Ownership::Ours);
            assert_stays_paused(&scene.source);
            Ok(())
        });
    });
}

#[test]
fn a_silent_stop_of_tracking_does_not_change_the_outcome() {
    at_once(&[false, true], |&fails| {
        with_more_time(|timeout| {
            let source = tracked();
            let hold = source.vmm.block(At::StopTracking);
            let mut scene = Scene::started_between(Wire::Unix, source, empty(), &hasty(timeout));
            if fails {
                let _state = scene.reach(|record| record.kind == Kind::State)?;
                scene.relay.cut();
                let status = scene.assert_source_failed();
                says(status.error_text(), &["closed"])?;
            } else {
                let status = scene.end();
                if status.phase != Phase::Completed {
                    return Err(TooEarly(status.error_text().to_owned()));
                }
                assert_eq!(scene.destination().wait(scene.incoming).phase, Phase::Completed);
            }
            drop(hold);
            if fails {
                wait_until_undone(&scene.source.vmm, true);
                migrates_next_time(&scene.source);
            }
            Ok(())
        });
    });
}

#[test]
fn a_failed_hook_fails_the_job_and_the_guest_runs() {
    for at in [At::StartTracking, At::Sync, At::Clear, At::Pause, At::SaveState] {
        let source = tracked();
        source.vmm.on(at, || Err(HookError::new("the vCPU is stuck")));
        let mut scene = Scene::started_between(Wire::Unix, source, empty(), &passes(1));
        let status = scene.end();
        assert!(status.error_text().contains("the vCPU is stuck"), "{}", status.error_text());
        scene.assert_source_failed();
        let there = scene.assert_destination_failed();
        assert!(there.error_text().contains("the vCPU is stuck"), "{}", there.error_text());
        assert!(!lock(&scene.source.vmm.asked).tracking, "the tracker stays on");
        scene.source.vmm.off(at);
        migrates_next_time(&scene.source);
    }
}

#[test]
fn a_throttle_that_fails_leaves_the_migration_going_on() {
    let source = tracked();
    // A VMM that says so at the first question, a throttle of 0, gets no such job.
    let mut asked = 0;
    source.vmm.on(At::Throttle, move || {
        asked += 1;
        if asked == 1 { Ok(()) } else { Err(HookError::new("no such thing")) }
    });
    let options = OutgoingOptions { policy: NonConvergence::Throttle, ..passes(1) };
    let mut scene = Scene::started_between(Wire::Unix, source, empty(), &options);
    // With a throttle that is an error, the job would have ended before.
    let record = scene.relay.until(|record| record.is(Kind::PassDone, 5));
    assert_eq!(
        scene.source.client.status().unwrap().counters.throttle_percent,
        0,
        "the guest is not throttled"
    );
    scene.relay.pass(record);
    let downtime_limit = Some(Duration::from_secs(3600));
    let reached = Parameters { downtime_limit, ..Parameters::default() };
    scene.source.client.set_parameters(&reached).unwrap();
    let status = scene.end();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert!(status.error_text().contains("cannot: no such thing"), "{}", status.error_text());
}

#[test]
fn a_failed_load_fails_both_sides_and_the_guest_runs() {
    for (never, words) in [(false, "no such device"), (true, "\"load state\"")] {
        with_more_time(|timeout| {
            let destination = empty();
            let hold = never.then(|| destination.vmm.block(At::LoadState));
            if !never {
                destination.vmm.on(At::LoadState, || Err(HookError::new("no such device")));
            }
            let mut scene =
                Scene::started_between(Wire::Unix, filled(), destination, &hasty(timeout));
            let status = scene.end();
            // The source's error has the reason, too.
            says(status.error_text(), &[words])?;
            scene.assert_source_failed();
            let there = scene.assert_destination_failed();
            assert!(there.error_text().contains(words), "{}", there.error_text());
            drop(hold);
            scene.destination().vmm.off(At::LoadState);
            scene.assert_both_migrate_next_time();
            Ok(())
        });
    }
}
