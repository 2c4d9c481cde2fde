//! A destination that runs out of huge pages while the guest runs there.

use crate::scene::{MIB, Move, Pages, Side, Switch, check_filled, fill, guest, memory};
use pageferry_client::{OutgoingOptions, Phase};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::Pattern;
use pageferry_tests::huge_pages::{HUGE_PAGE, HugePages, hugetlb_memfd};
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;
use rustix::fs::{FallocateFlags, fallocate};

#[test]
fn without_a_huge_page_left_the_postcopy_pauses_and_nothing_is_lost() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(10) else { return };
    let (source, destination) = (Side::small(8), Side::new(memory(Pages::Huge, 8)));
    source.vmm.memory().blocks().iter().for_each(|block| fill(block, block.all(), 4));
    let options = guest(Pattern::Uniform, 20_000);
    let (wrote, writes) = (source.threads(&options), destination.threads(&options));
    source.vmm.start().unwrap();
    wait_until("writes", PATIENCE, || wrote() > 2000).unwrap();
    // All but three, which are not enough.
    let others = HugePages::free().unwrap() - 3;
    let hog = hugetlb_memfd(others * HUGE_PAGE).unwrap();
    fallocate(&hog, FallocateFlags::empty(), 0, others * HUGE_PAGE).unwrap();

    let migration = Move::start(&source, &destination, Switch::AtOnce.options(60 * MIB));
    for side in [&source, &destination] {
        let paused = || side.status().phase == Phase::PostcopyPaused;
        wait_until("the pause", PATIENCE, paused).unwrap();
    }
    let why = destination.status().error;
    assert!(why.contains("cannot be placed"), "{why}");
    drop(hog);
    source.client().recover(None, &OutgoingOptions::default()).unwrap();
    let [_, incoming] = migration.finish();
    assert!(writes() > 0 && incoming.counters.paused_us > 0);
    destination.vmm.stop().unwrap();
    assert!(destination.vmm.usage().check().unwrap() > 1000);
    destination.vmm.memory().blocks().iter().for_each(|block| check_filled(block, block.all(), 4));
}
