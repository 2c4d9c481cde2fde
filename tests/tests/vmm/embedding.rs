// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guarantees for a VMM that embeds the client, at every moment.

use pageferry_client::{
    BlockRange, Client, Config, Error, ErrorCode, IncomingOptions, Mode, OutgoingOptions,
    Ownership, Parameters, Phase, Punch, RestoreMode, RestoreOptions, SnapshotMode,
    SnapshotOptions, Target, Trackers,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::files::Still;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::vmm::{Fault, HookName, PATIENCE};
use std::path::{Path, PathBuf};

const PAGES: u64 = 4096;

/// A VMM without a guest.
fn empty() -> MockSide {
    MockSide::new(vec![BlockLayout::ram(PAGES * PAGE_SIZE)])
}

/// A VMM whose memory is full and whose guest runs.
fn full() -> MockSide {
    let side = empty();
    side.block(0).fill(PageRange::new(0, PAGES), 1).unwrap();
    side.vmm.start().unwrap();
    side
}

/// The error sentence of the agent.
#[track_caller]
fn refused<T: std::fmt::Debug>(code: ErrorCode, outcome: Result<T, Error>) -> String {
    match outcome.unwrap_err() {
        Error::Refused { code: given, sentence } if given == code => sentence,
        other => panic!("{other:?}"),
    }
}

fn nowhere() -> Target {
    Target::Address("unix:/nonexistent/stream".into())
}

#[test]
fn jobs_on_dirty_pages_need_declared_trackers() {
    let (_agent, socket) = InProcessAgent::start().unwrap();
    let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
    channel.spawn(Still).unwrap();
    let memory = TestMemory::new(vec![BlockLayout::ram(PAGES * PAGE_SIZE)]).unwrap();
    memory.add_to(&client).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let of = |mode| OutgoingOptions { mode, ..OutgoingOptions::default() };
    let paused = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    let tracked = SnapshotOptions { track: true, ..paused.clone() };
    let increment = SnapshotOptions { base: image.to_str().unwrap().into(), ..paused.clone() };

    for (what, outcome) in [
        ("mode precopy", client.start_outgoing(nowhere(), &of(Mode::Precopy))),
        ("mode hybrid", client.start_outgoing(nowhere(), &of(Mode::Hybrid))),
        ("track", client.start_snapshot(&image, &tracked)),
        ("base", client.start_snapshot(&image, &increment)),
    ] {
        let sentence = refused(ErrorCode::State, outcome);
        assert!(
            sentence.starts_with(what) && sentence.contains("declared no tracker"),
            "{sentence}"
        );
    }
    assert_eq!(client.status().unwrap().trackers, Trackers::default());

    // These two jobs read no dirty pages.
    let ends = |job: u64| client.wait(job, PATIENCE).unwrap().phase;
    assert_eq!(ends(client.start_snapshot(&image, &paused).unwrap().job), Phase::Completed);
    let postcopy = client.start_outgoing(nowhere(), &of(Mode::Postcopy)).unwrap();
    assert_eq!(ends(postcopy.job), Phase::Failed, "there is no peer");

    client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
    assert_eq!(client.status().unwrap().trackers, Trackers::LOG_IS_COMPLETE);
    let again = SnapshotOptions { replace: true, ..tracked };
    assert_eq!(ends(client.start_snapshot(&image, &again).unwrap().job), Phase::Completed);
    assert_eq!(
        ends(client.start_outgoing(nowhere(), &of(Mode::Precopy)).unwrap().job),
        Phase::Failed
    );
}

#[test]
fn a_hook_that_panics_fails_the_job_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let source = full();
    for (hook, name) in [(HookName::SaveState, "save state"), (HookName::Pause, "pause")] {
        source.vmm.inject(hook, Some(Fault::Panic("vCPU 3 is gone".into())));
        let destination = empty();
        let [migration, _] = source.start_move(&destination, &OutgoingOptions::default());
        let expected = format!("hook \"{name}\" panicked in the VMM: vCPU 3 is gone");
        let status = source.vmm.wait_job(migration, PATIENCE).unwrap();
        assert_eq!((status.phase, status.error_text()), (Phase::Failed, expected.as_str()));
        let image = folder.path().join("image");
        let snapshot = source.vmm.start_snapshot(&image, &SnapshotOptions::default()).unwrap();
        let status = source.vmm.wait_job(snapshot, PATIENCE).unwrap();
        assert_eq!((status.phase, status.error_text()), (Phase::Failed, expected.as_str()));

        let record = source.vmm.record();
        assert!(record.runs && record.calls.last() == Some(&HookName::Resume), "{record:?}");
        assert_eq!(
            record.panics,
            vec![(name.to_owned(), "vCPU 3 is gone".to_owned()); 2],
            "the VMM learns of it"
        );
        source.vmm.inject(hook, None);
        source.vmm.clear_record();
    }
    // The channel and the agent still work.
    let image = folder.path().join("image");
    let job = source.vmm.start_snapshot(&image, &SnapshotOptions::default()).unwrap();
    assert_eq!(source.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
}

#[test]
fn a_guest_resets_while_it_is_moved_and_while_it_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let source = full();
    let slow = 64 << 10;
    // With this bandwidth neither ends by itself.
    let saved = || {
        let options = SnapshotOptions { bandwidth: slow, ..SnapshotOptions::default() };
        let job = source.vmm.start_snapshot(&folder.path().join("image"), &options).unwrap();
        source.vmm.wait_phase(Phase::Saving, PATIENCE).unwrap();
        job
    };
    let destination = empty();
    let moved = || {
        let (_, address) = destination.listen(&IncomingOptions::default());
        let options = OutgoingOptions { bandwidth: slow, ..OutgoingOptions::default() };
        let job = source.vmm.start_outgoing(&address, &options).unwrap();
        source.vmm.wait_phase(Phase::Passes, PATIENCE).unwrap();
        job
    };
    for start in [&saved as &dyn Fn() -> u64, &moved] {
        let job = start();
        source.client().remove_block(0).unwrap();
        let status = source.client().status().unwrap();
        assert_eq!((status.job, status.phase), (job, Phase::Cancelled), "{}", status.error_text());
        source.vmm.memory().block(0).unwrap().add_to(source.client()).unwrap();
    }
    assert!(source.vmm.record().runs);
    assert_eq!(source.client().ownership(), Ownership::Ours);
}

/// A bandwidth at which no job here ends by itself.
const SLOW: u64 = 64 << 10;

#[test]
fn a_vmm_resets_while_it_waits_or_is_restored() {
    let folder = tempfile::tempdir().unwrap();
    let image = saved(folder.path());
    let side = empty();
    let waits = || side.listen(&IncomingOptions::default()).0;
    let restored = || {
        let options = RestoreOptions {
            mode: RestoreMode::Eager,
            bandwidth: SLOW,
            ..RestoreOptions::default()
        };
        let job = side.vmm.start_restore(&image, &options).unwrap();
        side.vmm.wait_phase(Phase::Restoring, PATIENCE).unwrap();
        job
    };
    for start in [&waits as &dyn Fn() -> u64, &restored] {
        let job = start();
        side.client().remove_block(0).unwrap();
        let status = side.client().status().unwrap();
        assert_eq!((status.job, status.phase), (job, Phase::Cancelled), "{}", status.error_text());
        assert_eq!(side.client().ownership(), Ownership::Awaiting);
        side.vmm.memory().block(0).unwrap().add_to(side.client()).unwrap();
    }
    // Nothing is left that would disturb the next guest.
    let job = side.vmm.start_restore(&image, &RestoreOptions::default()).unwrap();
    assert_eq!(side.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
}

/// An image of a guest whose memory is full.
fn saved(folder: &Path) -> PathBuf {
    let (image, source) = (folder.join("image"), full());
    let options = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    let job = source.vmm.start_snapshot(&image, &options).unwrap();
    assert_eq!(source.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
    image
}

/// Both sides remove their memory while their job is past its commit point. Then runs `hurry`, and
/// checks that the removals waited for the job.
fn removes_after_the_job(sides: &[&MockSide], phase: Phase, hurry: impl FnOnce()) {
    std::thread::scope(|scope| {
        for side in sides {
            side.vmm.wait_phase(phase, PATIENCE).unwrap();
        }
        let removals: Vec<_> =
            sides.iter().map(|side| scope.spawn(|| side.client().remove_block(0))).collect();
        for (side, removal) in sides.iter().zip(&removals) {
            // The removal's cancel was refused, so the job continues.
            assert_eq!(side.client().status().unwrap().phase, phase);
            assert!(!removal.is_finished());
        }
        hurry();
        for (side, removal) in sides.iter().zip(removals) {
            removal.join().unwrap().unwrap();
            let status = side.client().status().unwrap();
            assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        }
    });
}

#[test]
fn memory_is_removed_after_a_job_that_cannot_be_cancelled() {
    if !require::uffd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = saved(folder.path());
    let lazy = empty();
    let options =
        RestoreOptions { mode: RestoreMode::Lazy, bandwidth: SLOW, ..RestoreOptions::default() };
    lazy.vmm.start_restore(&image, &options).unwrap();
    let hurry = || lazy.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    removes_after_the_job(&[&lazy], Phase::Prefetching, hurry);

    let (source, destination) = (full(), empty());
    let (_, address) = destination.listen(&IncomingOptions::default());
    let options =
        OutgoingOptions { mode: Mode::Postcopy, bandwidth: SLOW, ..OutgoingOptions::default() };
    source.vmm.start_outgoing(&address, &options).unwrap();
    let hurry = || source.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    removes_after_the_job(&[&source, &destination], Phase::Postcopy, hurry);
}

#[test]
fn a_populate_after_the_guest_has_left_says_that_it_is_gone() {
    let (source, destination) = (full(), empty());
    let page = [BlockRange { block: 0, offset: 0, length: PAGE_SIZE }];
    source.client().discard(&page, Punch::Yes).unwrap();
    let (_, address) = destination.listen(&IncomingOptions::default());
    refused(ErrorCode::Busy, destination.client().populate(&page));
    let job = source.vmm.start_outgoing(&address, &OutgoingOptions::default()).unwrap();
    assert_eq!(source.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
    wait_until("the guest to be gone", PATIENCE, || source.client().ownership() == Ownership::Gone)
        .unwrap();
    let gone = source.client().populate_within(&page, PATIENCE).unwrap_err();
    assert!(matches!(gone, Error::GuestGone { .. }), "{gone}");
    // Now a cancel is possible, so the removal does not wait long.
    assert_eq!(destination.client().populate_within(&page, PATIENCE).unwrap(), 1);
}
