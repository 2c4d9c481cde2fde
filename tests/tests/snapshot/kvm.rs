// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real guest is saved repeatedly while it runs: each image shows one moment of it, and it never
//! stops counting.

use super::scene::Scene;
use pageferry_agent::image::Chain;
use pageferry_client::{SnapshotMode, SnapshotOptions};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::kvm::{
    FIRMWARE_PAGES, KvmGuest, Progress, Sweep, check_consistent, counters,
};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::vmm::{PATIENCE, Tracker};

/// Number of pages with the page tables of a guest with these blocks.
const TABLES: u64 = 3;

fn layouts() -> Vec<BlockLayout> {
    let low = BlockLayout { fd_offset: 0x3000, ..BlockLayout::ram(8 << 20) };
    // Added before the first block, and after it in the guest.
    let high =
        BlockLayout { id: 1, name: "high".into(), gpa: 64 << 20, ..BlockLayout::ram(8 << 20) };
    vec![high, low]
}

/// The progress of the guest at the moment of the image.
fn progress(chain: &Chain, sweep: &Sweep) -> Progress {
    let memory = TestMemory::new(layouts()).unwrap();
    for (at, geometry) in chain.table().blocks().iter().enumerate() {
        let mut bytes = vec![0; geometry.length as usize];
        chain.read(at, PageRange::new(0, geometry.pages()), &mut bytes).unwrap();
        memory.block(geometry.id).unwrap().write(0, &bytes).unwrap();
    }
    check_consistent(counters(memory.guest(), sweep).unwrap()).unwrap()
}

fn save_again_and_again(mode: SnapshotMode) {
    let scene = Scene::new(layouts());
    let memory = scene.vmm.memory();
    let sweep = Sweep::all(memory.guest()).spins(200);
    let mut guest = KvmGuest::new(memory.guest().clone(), sweep.clone()).unwrap();
    guest.boot().unwrap();
    scene.vmm.set_tracker(Tracker::Hooks(Box::new(guest.dirty_log().unwrap()))).unwrap();
    scene.vmm.set_guest(guest);
    scene.vmm.start().unwrap();
    let first = || counters(memory.guest(), &sweep).unwrap()[0];
    wait_until("two sweeps", PATIENCE, || first() >= 2).unwrap();

    let mut options = SnapshotOptions { mode, track: true, ..SnapshotOptions::default() };
    let (mut before, mut captured) = (None, 0);
    for number in 0..4 {
        let name = format!("image{number}");
        let (status, chain) = scene.saved(&name, &options);
        let now = progress(&chain, &sweep);
        assert!(before.is_none_or(
            |before: Progress| (before.sweeps, before.pages) <= (now.sweeps, now.pages)
        ));
        assert!(!chain.newest().state().unwrap().is_empty(), "the image has the state of the vCPU");
        captured += status.counters.copied_before_write_pages;
        // The firmware is the same as in the base, except perhaps the page tables, which the vCPU
        // walks. The pages that the guest swept meanwhile are not.
        let unchanged = status.counters.unchanged_pages;
        let expected = if number == 0 { 0..=0 } else { FIRMWARE_PAGES - TABLES..=sweep.pages() };
        assert!(
            expected.contains(&unchanged),
            "image {number}: {unchanged} pages are as before, expected {expected:?}"
        );
        let swept = first();
        wait_until("the guest to count on", PATIENCE, || first() != swept).unwrap();
        before = Some(now);
        scene.path(&name).to_str().unwrap().clone_into(&mut options.base);
    }
    scene.vmm.stop().unwrap();
    check_consistent(counters(memory.guest(), &sweep).unwrap()).unwrap();
    if mode == SnapshotMode::Background {
        assert!(captured > 0, "the guest wrote while it was saved");
    }
}

#[test]
fn a_guest_that_runs_on_is_saved_as_of_one_moment() {
    if require::kvm() && require::uffd() {
        save_again_and_again(SnapshotMode::Background);
    }
}

#[test]
fn a_guest_that_is_paused_for_its_snapshot_continues_after() {
    if require::kvm() {
        save_again_and_again(SnapshotMode::Paused);
    }
}
