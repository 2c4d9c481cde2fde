// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bandwidth limit of snapshots and restores.

use super::scene::{Scene, paused};
use pageferry_client::{Phase, RestoreMode, RestoreOptions, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;
use std::time::{Duration, Instant};

/// So many pages that those in progress on one thread do not matter.
const PAGES: u64 = 8192;
/// Bytes per second. All pages take half a second.
const RATE: u64 = PAGES * PAGE_SIZE * 2;
/// The shortest time, without the pages that may go at once and those in progress at the end.
const LEAST: Duration = Duration::from_millis(350);

/// Runs the job, and checks that it takes as long as the limit requires. This holds on every slow
/// machine.
#[track_caller]
fn takes_its_time(scene: &Scene, what: &str, start: impl FnOnce() -> u64) {
    let begun = Instant::now();
    let job = start();
    let status = scene.vmm.wait_job(job, PATIENCE).unwrap();
    let taken = begun.elapsed();
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""), "{what}");
    let moved = status.counters.pages_saved + status.counters.pages_restored;
    assert!(moved >= PAGES, "{what}: {:?}", status.counters);
    eprintln!("{what}: {taken:?}");
    assert!(taken >= LEAST, "{what}: {taken:?}");
}

#[test]
fn a_snapshot_is_no_faster_than_its_limit() {
    let modes =
        if require::uffd() { vec![SnapshotOptions::default(), paused()] } else { vec![paused()] };
    let scene = Scene::full(PAGES);
    for (number, options) in modes.into_iter().enumerate() {
        let options = SnapshotOptions { bandwidth: RATE, workers: 1, ..options };
        let path = scene.path(&format!("image{number}"));
        takes_its_time(&scene, &format!("{:?}", options.mode), || {
            scene.vmm.start_snapshot(&path, &options).unwrap()
        });
    }
}

#[test]
fn a_restore_is_no_faster_than_its_limit() {
    let modes = if require::uffd() {
        vec![RestoreMode::Eager, RestoreMode::Lazy]
    } else {
        vec![RestoreMode::Eager]
    };
    let scene = Scene::full(PAGES);
    scene.saved("image", &paused());
    for mode in modes {
        let options =
            RestoreOptions { mode, bandwidth: RATE, workers: 1, ..RestoreOptions::default() };
        let start = || scene.vmm.start_restore(&scene.path("image"), &options).unwrap();
        takes_its_time(&scene, &format!("{mode:?}"), start);
    }
}
