// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots that do not complete leave no file and no protection, and the guest runs.

use super::scene::Scene;
use pageferry_client::{
    BlockRange, JobStatus, MIN_BANDWIDTH, Parameters, Phase, Punch, SnapshotOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::require;
use pageferry_tests::vmm::{Fault, HookName, PATIENCE};

const PAGES: u64 = 4096;

/// A snapshot that does not end by itself.
fn endless() -> SnapshotOptions {
    SnapshotOptions { bandwidth: MIN_BANDWIDTH, ..SnapshotOptions::default() }
}

/// Checks that the guest runs, and that every page can be written without a fault for the agent.
#[track_caller]
fn check_free(scene: &Scene) {
    assert!(scene.vmm.record().runs, "the guest runs");
    assert_eq!(scene.files(), Vec::<String>::new());
    scene
        .as_guest(|block| (0..PAGES).for_each(|page| block.store(page * PAGE_SIZE, page).unwrap()));
    let (_, chain) = scene.saved("again", &SnapshotOptions::default());
    scene.check(&chain);
}

fn begin(scene: &Scene, options: &SnapshotOptions) -> u64 {
    scene.vmm.start().unwrap();
    let job = scene.client().start_snapshot(&scene.path("image"), options).unwrap().job;
    scene.vmm.wait_phase(Phase::Saving, PATIENCE).unwrap();
    job
}

fn end(scene: &Scene, job: u64) -> JobStatus {
    scene.client().wait(job, PATIENCE).unwrap()
}

#[test]
fn a_snapshot_that_is_cancelled_leaves_nothing_behind() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(PAGES);
    let job = begin(&scene, &endless());
    scene.write(PAGES - 1, 9);
    scene.client().cancel().unwrap();
    let status = end(&scene, job);
    assert_eq!(status.phase, Phase::Cancelled);
    assert!(status.counters.copied_before_write_pages > 0, "{:?}", status.counters);
    check_free(&scene);
}

#[test]
fn a_limit_that_is_lifted_lets_the_rest_go_at_once() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(PAGES);
    let job = begin(&scene, &endless());
    scene.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    assert_eq!(end(&scene, job).phase, Phase::Completed);
}

#[test]
fn hooks_that_fail_fail_the_snapshot_and_nothing_else() {
    if !require::uffd() {
        return;
    }
    for hook in [HookName::Pause, HookName::SaveState] {
        let scene = Scene::full(PAGES);
        scene.vmm.start().unwrap();
        scene.vmm.inject(hook, Some(Fault::Fail("it is raining".into())));
        let status = scene.save("image", &SnapshotOptions::default());
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.error_text().contains("it is raining"), "{}", status.error_text());
        scene.vmm.inject(hook, None);
        check_free(&scene);
    }
}

#[test]
fn what_is_discarded_while_it_is_saved_is_saved_first() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(PAGES);
    let before: Vec<_> = (0..PAGES).map(|page| scene.block().read_page(page).unwrap()).collect();
    let job = begin(&scene, &endless());
    let half =
        BlockRange { block: 0, offset: PAGES / 2 * PAGE_SIZE, length: PAGES / 2 * PAGE_SIZE };
    scene.client().discard(&[half], Punch::Yes).unwrap();
    assert!(
        scene.block().is_hole(PageRange::new(PAGES / 2, PAGES / 2)).unwrap(),
        "acknowledged is freed"
    );
    // Pages that were discarded and populated again have new content, which is not in the image.
    let part = BlockRange { length: 10 * PAGE_SIZE, ..half };
    scene.client().populate(&[part]).unwrap();
    (0..10).for_each(|page| scene.write(PAGES / 2 + page, 5));
    scene.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    let status = end(&scene, job);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert!(status.counters.copied_before_discard_pages >= PAGES / 2 - 64, "{:?}", status.counters);
    let chain = pageferry_agent::image::Chain::open(&scene.path("image")).unwrap();
    let mut saved = vec![0; PAGE_SIZE as usize];
    for page in 0..PAGES {
        chain.read(0, PageRange::new(page, 1), &mut saved).unwrap();
        assert!(saved == before[page as usize], "page {page:#x}");
        assert!(!chain.discarded(0).contains(page));
    }
}
