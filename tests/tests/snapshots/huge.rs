//! Guests on huge pages: each is captured, and let go, as a whole.

use super::scene::Scene;
use pageferry_client::{BlockRange, Punch, SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::huge_pages::HUGE_PAGE;
use pageferry_tests::memory::{Backing, BlockLayout};
use pageferry_tests::require;

const COUNT: u64 = 6;

fn scene() -> Scene {
    let layout = BlockLayout {
        fd_offset: HUGE_PAGE,
        granularity: HUGE_PAGE,
        backing: Backing::HugePages,
        ..BlockLayout::ram(COUNT * HUGE_PAGE)
    };
    let scene = Scene::new(vec![layout]);
    let touched = (0..COUNT).filter(|huge_page| *huge_page != 4);
    touched.for_each(|huge_page| scene.write(huge_page * HUGE_PAGE / PAGE_SIZE + 3, huge_page + 1));
    scene
}

#[test]
fn a_guest_on_huge_pages_is_saved_while_it_writes() {
    let Some(_pool) = require::hugetlb(COUNT + 1) else { return };
    if !require::uffd() {
        return;
    }
    let scene = scene();
    scene.client().discard(&[BlockRange { block: 0, offset: HUGE_PAGE, length: HUGE_PAGE }], Punch::Yes).unwrap();
    // A page at a time, so that it writes into one that is not captured yet.
    let options = SnapshotOptions { workers: 1, bandwidth: 4 << 20, ..SnapshotOptions::default() };
    let started = scene.client().start_snapshot(&scene.path("image"), &options).unwrap();
    scene.vmm.wait_phase(pageferry_client::Phase::Saving, pageferry_tests::vmm::PATIENCE).unwrap();
    let last = (COUNT - 1) * HUGE_PAGE / PAGE_SIZE + 3;
    scene.write(last, 77);
    let status = scene.client().wait(started.job, pageferry_tests::vmm::PATIENCE).unwrap();
    assert_eq!((status.phase, &*status.error), (pageferry_client::Phase::Completed, ""));
    assert!(status.counters.captured_pages >= HUGE_PAGE / PAGE_SIZE, "{:?}", status.counters);
    // As of the moment before.
    scene.write(last, COUNT);
    scene.check(&pageferry_agent::image::Chain::open(&scene.path("image")).unwrap());
    assert_eq!(status.counters.pages_sent, COUNT - 2);
}

#[test]
fn an_increment_of_huge_pages_is_complete() {
    let Some(_pool) = require::hugetlb(COUNT + 1) else { return };
    let scene = scene();
    let tracked = SnapshotOptions { mode: SnapshotMode::Paused, track: true, ..SnapshotOptions::default() };
    let (_, chain) = scene.saved("full", &tracked.clone());
    scene.check(&chain);
    scene.write(3, 99);
    scene.client().discard(&[BlockRange { block: 0, offset: 2 * HUGE_PAGE, length: HUGE_PAGE }], Punch::Yes).unwrap();
    let (status, chain) = scene.saved("increment", &super::scene::on(&scene.path("full"), tracked));
    scene.check(&chain);
    assert_eq!(status.counters.pages_sent, 1);
}
