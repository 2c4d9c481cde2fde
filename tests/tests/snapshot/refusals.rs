// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests that are refused beside a snapshot or a restore, and the errors.

use super::scene::{Scene, on, paused, tracked};
use pageferry_client::{
    BlockRange, Error, IncomingOptions, MIN_BANDWIDTH, OutgoingOptions, Ownership, Parameters,
    Phase, Punch, RestoreMode, RestoreOptions, SnapshotOptions, Target, Trackers,
};
use pageferry_protocol::control::job::JobKind;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::process::program;
use pageferry_tests::require;
use pageferry_tests::scenario::RawClient;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

const PAGES: u64 = 2048;
/// Pages that are discarded while the job runs, and the part of them that is populated again.
const GIVEN: BlockRange =
    BlockRange { block: 0, offset: (PAGES - 20) * PAGE_SIZE, length: 20 * PAGE_SIZE };
const USED_AGAIN: BlockRange = BlockRange { length: 10 * PAGE_SIZE, ..GIVEN };

/// A job that does not end by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slow {
    Snapshot,
    Eager,
    Lazy,
    Outgoing,
}

impl Slow {
    fn start(self, scene: &Scene, there: &Scene) -> u64 {
        let (image, bandwidth) = (scene.path("image"), MIN_BANDWIDTH);
        let restores = |mode| {
            let options = RestoreOptions { mode, bandwidth, ..RestoreOptions::default() };
            scene.vmm.start_restore(&image, &options).unwrap()
        };
        let (job, phase) = match self {
            Self::Snapshot => {
                let options = SnapshotOptions { bandwidth, ..SnapshotOptions::default() };
                (scene.vmm.start_snapshot(&scene.path("slow"), &options).unwrap(), Phase::Saving)
            }
            Self::Eager => (restores(RestoreMode::Eager), Phase::Restoring),
            Self::Lazy => (restores(RestoreMode::Lazy), Phase::Prefetching),
            Self::Outgoing => {
                let (_, address) = there
                    .vmm
                    .start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default())
                    .unwrap();
                let options = OutgoingOptions { bandwidth, ..OutgoingOptions::default() };
                (scene.vmm.start_outgoing(&address, &options).unwrap(), Phase::Passes)
            }
        };
        assert_eq!(scene.vmm.wait_phase(phase, PATIENCE).unwrap().phase, phase);
        job
    }

    fn kind(self) -> JobKind {
        match self {
            Self::Snapshot => JobKind::Snapshot,
            Self::Eager | Self::Lazy => JobKind::Restore,
            Self::Outgoing => JobKind::Outgoing,
        }
    }
}

/// The error code and the sentence of the agent.
#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, Error>) -> (ErrorCode, String) {
    match outcome.unwrap_err() {
        Error::Refused { code, sentence } => (code, sentence),
        other => panic!("{other:?}"),
    }
}

/// The table in `docs/snapshots.md` of requests that are possible during a job.
#[track_caller]
fn check_beside(slow: Slow) {
    eprintln!("{slow:?}");
    let (scene, there) =
        (Scene::full(PAGES), Scene::new(vec![BlockLayout::ram(PAGES * PAGE_SIZE)]));
    scene.saved("base", &tracked(paused()));
    scene.write(5, 5);
    let (_, chain) = scene.saved("image", &on(&scene.path("base"), tracked(paused())));
    scene.vmm.start().unwrap();
    let job = slow.start(&scene, &there);
    let client = scene.client();

    // Another job, from the VMM or from an operator.
    let busy = |what: &str| {
        let kind = slow.kind().name();
        (ErrorCode::Busy, format!("{what}: job {job} ({kind}) is running; wait or cancel it"))
    };
    let text = |name: &str| scene.path(name).to_str().unwrap().to_owned();
    let target = || Target::Address("unix:/nowhere".into());
    let requests = [
        Request::StartSnapshot { path: text("other"), options: paused() },
        Request::StartRestore { path: text("image"), options: RestoreOptions::default() },
        Request::StartOutgoing {
            target: "unix:/nowhere".into(),
            options: OutgoingOptions::default(),
        },
    ];
    let mut operator = RawClient::connect(scene.socket());
    for request in requests {
        let error = operator.ask(&request, Vec::new()).unwrap_err();
        assert_eq!((error.code, error.sentence), busy("a job cannot be started"), "{request:?}");
    }
    let starts = [
        client.start_snapshot(&scene.path("other"), &paused()),
        client.start_outgoing(target(), &OutgoingOptions::default()),
    ];
    for started in starts {
        // The client itself knows that there is no guest to save or to send.
        if slow == Slow::Eager {
            assert!(
                matches!(started, Err(Error::NotOurs { ownership: Ownership::Awaiting })),
                "{started:?}"
            );
        } else {
            assert_eq!(refused(started), busy("a job cannot be started"));
        }
    }
    let before = client.ownership();
    let restore = client.start_restore(&scene.path("image"), &RestoreOptions::default());
    assert_eq!(refused(restore), busy("a job cannot be started"));
    assert_eq!(
        refused(client.start_incoming(target(), &IncomingOptions::default())),
        busy("a job cannot be started")
    );
    assert_eq!(client.ownership(), before, "a refused request changes nothing");

    // Memory and trackers.
    let more =
        BlockLayout { id: 1, name: "more".into(), gpa: 1 << 30, ..BlockLayout::ram(PAGE_SIZE) };
    let more = TestMemory::new(vec![more]).unwrap();
    let added = more.block(1).unwrap().add_to(client).unwrap_err().sentence();
    assert!(added.contains(&busy("memory cannot be added").1), "{added}");
    assert_eq!(
        refused(client.set_trackers(Trackers::LOG_IS_COMPLETE)),
        busy("the trackers cannot be changed")
    );

    // Discards and populates.
    assert_eq!(client.discard(&[GIVEN], Punch::Yes).unwrap(), 20);
    assert!(
        scene.block().is_hole(PageRange::new(PAGES - 20, 20)).unwrap(),
        "acknowledged is freed"
    );
    if slow == Slow::Eager {
        let (code, sentence) = refused(client.populate(&[USED_AGAIN]));
        assert_eq!(code, ErrorCode::Busy);
        assert!(
            sentence.contains("restores the memory: populate again once the guest runs"),
            "{sentence}"
        );
    } else {
        assert_eq!(client.populate(&[USED_AGAIN]).unwrap(), 10);
    }

    // Images, including the one that is being read.
    let tool = |arguments: &[&str]| {
        let output = Command::new(program())
            .arg("image")
            .args(arguments)
            .current_dir(scene.folder.path())
            .output();
        let output = output.unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    tool(&["info", "image"]);
    tool(&["verify", "image"]);
    tool(&["merge", "image", "--into", "merged"]);
    tool(&["merge", "image", "--into", "image", "--replace"]);

    let status = client.status().unwrap();
    assert_eq!(
        (status.job, status.kind, status.phase.is_final()),
        (job, slow.kind(), false),
        "it goes on"
    );
    match slow {
        Slow::Lazy => {
            let late = (
                ErrorCode::State,
                "too late to cancel: the guest that is restored runs".to_owned(),
            );
            assert_eq!(refused(client.cancel()), late);
            client.set_parameters(&Parameters::bandwidth(0)).unwrap();
            assert_eq!(client.wait(job, PATIENCE).unwrap().phase, Phase::Completed);
            let mut saved = vec![0; PAGE_SIZE as usize];
            for page in 0..PAGES - 20 {
                chain.read(0, PageRange::new(page, 1), &mut saved).unwrap();
                assert!(saved == scene.block().read_page(page).unwrap(), "page {page:#x}");
            }
        }
        _ => {
            client.cancel().unwrap();
            assert_eq!(client.wait(job, PATIENCE).unwrap().phase, Phase::Cancelled);
        }
    }
    // The agent is free, and the discarded pages are discarded.
    let next = scene.vmm.start_restore(&scene.path("merged"), &RestoreOptions::default()).unwrap();
    assert_eq!(client.wait(next, PATIENCE).unwrap().phase, Phase::Completed);
    scene.saved("next", &paused());
}

#[test]
fn requests_during_a_background_snapshot_run_or_are_refused() {
    if require::uffd() {
        check_beside(Slow::Snapshot);
    }
}

#[test]
fn requests_during_a_restore_run_or_are_refused() {
    check_beside(Slow::Eager);
    if require::uffd() {
        check_beside(Slow::Lazy);
    }
}

#[test]
fn requests_during_a_migration_run_or_are_refused() {
    check_beside(Slow::Outgoing);
}

#[test]
fn an_image_that_is_there_is_replaced_only_on_request() {
    let scene = Scene::full(100);
    scene.saved("image", &paused());
    let status = scene.save("image", &paused());
    assert!(
        status
            .error_text()
            .contains("the file exists: choose another name, or replace it (--replace)"),
        "{}",
        status.error_text()
    );
    scene.write(1, 1);
    let (_, chain) = scene.saved("image", &SnapshotOptions { replace: true, ..paused() });
    scene.check(&chain);
    assert_eq!(scene.files(), ["image"]);
    let status = scene.save("image/below", &paused());
    assert!(
        status.error_text().contains("cannot create a file in its folder: Not a directory"),
        "{}",
        status.error_text()
    );
    let status = scene.client().start_snapshot(Path::new("/"), &paused()).unwrap();
    let status = scene.client().wait(status.job, PATIENCE).unwrap();
    assert!(
        status.error_text().contains("path is not an absolute path of a file"),
        "{}",
        status.error_text()
    );
}

#[test]
fn what_is_no_image_and_the_guests_memory_are_never_replaced() {
    let scene = Scene::full(100);
    let replace = SnapshotOptions { replace: true, ..paused() };
    std::fs::write(scene.path("letter"), "precious").unwrap();
    let status = scene.save("letter", &replace);
    assert!(
        status.error_text().contains("the file is not an image, and so it is not replaced"),
        "{}",
        status.error_text()
    );
    assert_eq!(
        (scene.files(), std::fs::read(scene.path("letter")).unwrap()),
        (vec!["letter".into()], b"precious".to_vec())
    );
    // Also if the guest's memory begins like an image.
    scene.saved("image", &paused());
    let memory = format!("/proc/self/fd/{}", scene.block().file().as_raw_fd());
    let started = scene.client().start_snapshot(Path::new(&memory), &replace).unwrap();
    let status = scene.client().wait(started.job, PATIENCE).unwrap();
    assert!(
        status.error_text().contains("the file is the memory of block 0: choose another name"),
        "{}",
        status.error_text()
    );
}

#[test]
fn a_write_protect_tracked_guest_runs_on_while_saved() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(100);
    scene.vmm.set_tracker(Tracker::WriteProtect).unwrap();
    // The tracker is on for the second one. The third one borrows the mappings from it.
    scene.saved("untracked", &SnapshotOptions::default());
    scene.saved("full", &tracked(paused()));
    let (_, chain) = scene.saved("image", &SnapshotOptions::default());
    scene.check(&chain);
}
