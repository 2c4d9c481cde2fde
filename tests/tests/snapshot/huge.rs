// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests on huge pages: each huge page is captured and released as a whole.

use super::scene::{Scene, on, paused, tracked};
use pageferry_agent::image::Chain;
use pageferry_client::{
    BlockRange, MIN_BANDWIDTH, Parameters, Phase, Punch, RestoreMode, RestoreOptions,
    SnapshotOptions,
};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::huge_pages::{HUGE_PAGE, HugePages, hugetlb_memfd};
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;
use rustix::fs::{FallocateFlags, fallocate};

const COUNT: u64 = 6;
/// Pages of a huge page.
const HUGE: u64 = HUGE_PAGE / PAGE_SIZE;

fn scene() -> Scene {
    let layout = BlockLayout {
        fd_offset: HUGE_PAGE,
        granularity: HUGE_PAGE,
        backing: Backing::HugePages,
        ..BlockLayout::ram(COUNT * HUGE_PAGE)
    };
    let scene = Scene::new(vec![layout]);
    let touched = (0..COUNT).filter(|huge_page| *huge_page != 4);
    touched.for_each(|huge_page| scene.write(huge_page * HUGE + 3, huge_page + 1));
    scene
}

#[test]
fn a_guest_on_huge_pages_is_saved_while_it_writes() {
    let Some(_pool) = require::hugetlb(COUNT + 1) else { return };
    if !require::uffd() {
        return;
    }
    let scene = scene();
    scene
        .client()
        .discard(&[BlockRange { block: 0, offset: HUGE_PAGE, length: HUGE_PAGE }], Punch::Yes)
        .unwrap();
    // One worker, so that the guest writes to a page that is not captured yet.
    let options = SnapshotOptions { workers: 1, bandwidth: 4 << 20, ..SnapshotOptions::default() };
    let started = scene.client().start_snapshot(&scene.path("image"), &options).unwrap();
    scene.vmm.wait_phase(Phase::Saving, PATIENCE).unwrap();
    let last = (COUNT - 1) * HUGE + 3;
    scene.write(last, 77);
    let status = scene.client().wait(started.job, PATIENCE).unwrap();
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    assert!(status.counters.copied_before_write_pages >= HUGE, "{:?}", status.counters);
    // The image has the content from before the write.
    scene.write(last, COUNT);
    scene.check(&Chain::open(&scene.path("image")).unwrap());
    assert_eq!(status.counters.pages_saved, COUNT - 2);
}

#[test]
fn an_increment_of_huge_pages_is_complete() {
    let Some(_pool) = require::hugetlb(COUNT + 1) else { return };
    let scene = scene();
    let (_, chain) = scene.saved("full", &tracked(paused()));
    scene.check(&chain);
    scene.write(3, 99);
    scene
        .client()
        .discard(&[BlockRange { block: 0, offset: 2 * HUGE_PAGE, length: HUGE_PAGE }], Punch::Yes)
        .unwrap();
    let (status, chain) = scene.saved("increment", &on(&scene.path("full"), tracked(paused())));
    scene.check(&chain);
    assert_eq!(status.counters.pages_saved, 1);
}

/// A guest with the size of eight huge pages, on this backing.
fn thin(backing: Backing) -> Scene {
    let layout = BlockLayout { fd_offset: HUGE_PAGE, backing, ..BlockLayout::ram(8 * HUGE_PAGE) };
    Scene::new(vec![layout])
}

/// Saves a guest on small pages to `image` in `scene`'s folder. In huge pages 0, 3, 6 and 7, page
/// 77 holds something. Pages 100 to 199 of huge page 0 are discarded. Huge pages 1 and 5 are
/// discarded, 4 is zero, and 2 is full.
fn save_thin(scene: &Scene) -> Chain {
    let guest = thin(Backing::Memfd);
    [0, 3, 6, 7].into_iter().for_each(|huge| guest.write(huge * HUGE + 77, huge + 1));
    guest.block().fill(PageRange::new(2 * HUGE, HUGE), 2).unwrap();
    let whole = |huge: u64| BlockRange { block: 0, offset: huge * HUGE_PAGE, length: HUGE_PAGE };
    let part = BlockRange { block: 0, offset: 100 * PAGE_SIZE, length: 100 * PAGE_SIZE };
    guest.client().discard(&[part, whole(1), whole(5)], Punch::Yes).unwrap();
    let job = guest.client().start_snapshot(&scene.path("image"), &paused()).unwrap().job;
    let status = guest.client().wait(job, PATIENCE).unwrap();
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    Chain::open(&scene.path("image")).unwrap()
}

/// A guest of eight huge pages and the image from [`save_thin`]. Huge pages 4 and 5 hold something
/// that must not be there after a restore.
fn thin_with_image() -> (Scene, Chain) {
    let scene = thin(Backing::HugePages);
    let chain = save_thin(&scene);
    scene.block().fill(PageRange::new(4 * HUGE, 2 * HUGE), 9).unwrap();
    (scene, chain)
}

/// Checks that all saved content is there, that discarded parts of a huge page are zero, and that
/// only the necessary huge pages are allocated.
#[track_caller]
fn check_restored(scene: &Scene, chain: &Chain, allocated: u64) {
    scene.check(chain);
    assert!(
        (100..200).all(|page| scene.block().read_page(page).unwrap() == [0; PAGE_SIZE as usize])
    );
    assert_eq!(scene.block().allocated().unwrap(), allocated * HUGE_PAGE);
    assert!(scene.vmm.record().runs);
}

#[test]
fn a_restore_allocates_only_huge_pages_with_content() {
    let Some(_pool) = require::hugetlb(8) else { return };
    let (scene, chain) = thin_with_image();
    for workers in [1, 3] {
        let options = RestoreOptions { workers, ..RestoreOptions::default() };
        let job = scene.vmm.start_restore(&scene.path("image"), &options).unwrap();
        let status = scene.vmm.wait_job(job, PATIENCE).unwrap();
        assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
        assert_eq!(status.counters.pages_restored, 4 + HUGE);
        check_restored(&scene, &chain, 5);
    }
}

#[test]
fn a_lazy_restore_places_whole_huge_pages() {
    let Some(_pool) = require::hugetlb(8) else { return };
    if !require::uffd() {
        return;
    }
    let (scene, chain) = thin_with_image();
    // Pages that the guest does not touch are hardly loaded.
    let options = RestoreOptions {
        mode: RestoreMode::Lazy,
        workers: 1,
        bandwidth: MIN_BANDWIDTH,
        ..RestoreOptions::default()
    };
    let job = scene.vmm.start_restore(&scene.path("image"), &options).unwrap();
    scene.vmm.wait_phase(Phase::Prefetching, PATIENCE).unwrap();
    let found = scene.as_guest(|block| {
        let pages = [7 * HUGE + 77, 7 * HUGE + 78, 77, 78, 4 * HUGE + 5];
        pages.map(|page| block.load(page * PAGE_SIZE).unwrap())
    });
    assert_eq!(found, [8, 0, 1, 0, 0]);
    // The full huge page and the others.
    scene.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    let status = scene.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    assert!(status.counters.faults >= 2, "{:?}", status.counters);
    // One more huge page than before, because the guest touched a zero one.
    check_restored(&scene, &chain, 6);
}

#[test]
fn a_lazy_restore_to_too_few_huge_pages_is_refused() {
    let Some(_pool) = require::hugetlb(8) else { return };
    if !require::uffd() {
        return;
    }
    let (scene, chain) = thin_with_image();
    // The restore needs five huge pages. This memory holds two, and two are free.
    let others = HugePages::free().unwrap() - 2;
    let hog = hugetlb_memfd(others * HUGE_PAGE).unwrap();
    fallocate(&hog, FallocateFlags::empty(), 0, others * HUGE_PAGE).unwrap();
    let options = RestoreOptions { mode: RestoreMode::Lazy, ..RestoreOptions::default() };
    let job = scene.vmm.start_restore(&scene.path("image"), &options).unwrap();
    let status = scene.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("nr_hugepages"), "{}", status.error_text());
    assert_eq!(scene.block().allocated().unwrap(), 2 * HUGE_PAGE, "the memory keeps what it held");
    drop(hog);
    // With three free ones it fits, because the memory's own two are freed first.
    let others = HugePages::free().unwrap() - 3;
    let _hog = hugetlb_memfd(others * HUGE_PAGE).unwrap();
    fallocate(&_hog, FallocateFlags::empty(), 0, others * HUGE_PAGE).unwrap();
    let job = scene.vmm.start_restore(&scene.path("image"), &options).unwrap();
    let status = scene.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
    check_restored(&scene, &chain, 5);
}
