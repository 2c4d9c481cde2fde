// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real guest under KVM that sweeps through memory that is still missing.

use crate::scene::{MIB, Move, Pages, Switch, TRICKLE, memory, side_with};
use pageferry_client::Phase;
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::kvm::{FIRMWARE_PAGES, KvmGuest, Sweep, check_consistent, counters};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::verify::same_block;
use pageferry_tests::vmm::{PATIENCE, Tracker};

fn sweep(side: &MockSide) -> Sweep {
    Sweep::all(side.vmm.memory().guest()).spins(2000)
}

fn guest(side: &MockSide) -> KvmGuest {
    KvmGuest::new(side.vmm.memory().guest().clone(), sweep(side)).unwrap()
}

fn counters_of(side: &MockSide) -> Vec<u32> {
    counters(side.vmm.memory().guest(), &sweep(side)).unwrap()
}

fn moves(pages: Pages, switch: Switch, tracker: impl FnOnce(&KvmGuest, &TestMemory) -> Tracker) {
    let [source, destination] = [(), ()].map(|()| side_with(memory(pages, 8)));
    let mut booted = guest(&source);
    booted.boot().unwrap();
    source.vmm.set_tracker(tracker(&booted, source.vmm.memory())).unwrap();
    source.vmm.set_guest(booted);
    destination.vmm.set_guest(guest(&destination));
    source.vmm.start().unwrap();
    wait_until("two sweeps", PATIENCE, || *counters_of(&source).last().unwrap() >= 2).unwrap();

    let at_once = switch == Switch::AtOnce;
    let migration = Move::start(
        &source,
        &destination,
        switch.options(if at_once { TRICKLE } else { 30 * MIB }),
    );
    migration.until_gone();
    let stopped = check_consistent(counters_of(&source)).unwrap();
    if at_once {
        // Only the guest touches the memory, and it sweeps in order. So when it waits for the
        // second page, it has counted in the first one.
        wait_until("the guest to count on before its memory is there", PATIENCE, || {
            destination.status().counters.faults >= 2
        })
        .unwrap();
        migration.hurry();
    }
    let [_, incoming] = migration.finish();
    assert!(incoming.counters.faults >= 2 || !at_once, "{:?}", incoming.counters);
    assert_eq!(destination.status().phase, Phase::Completed);

    let sweeps = || counters_of(&destination)[0].wrapping_sub(stopped.sweeps);
    wait_until("two sweeps at the destination", PATIENCE, || sweeps() >= 2).unwrap();
    destination.vmm.stop().unwrap();
    assert!(check_consistent(counters_of(&destination)).unwrap().sweeps >= stopped.sweeps + 2);
    assert_eq!(check_consistent(counters_of(&source)).unwrap(), stopped, "the source is paused");
    // The guest does not write its firmware.
    let discarded = source.client().discarded(0).unwrap();
    let firmware = |page: u64| PageRange::new(0, FIRMWARE_PAGES).end() > page;
    same_block(source.block(0), &discarded, destination.block(0), firmware).unwrap();
}

#[test]
fn a_guest_under_kvm_counts_on_before_its_memory_is_there() {
    if require::kvm() && require::uffd() {
        moves(Pages::Small, Switch::AtOnce, |_, _| Tracker::Log);
    }
}

#[test]
fn a_guest_tracked_by_kvms_dirty_log_goes_after_its_passes() {
    if require::kvm() && require::uffd() {
        for switch in [Switch::AfterPasses(2), Switch::OnNonConvergence] {
            moves(Pages::Small, switch, |guest, _| {
                Tracker::Hooks(Box::new(guest.dirty_log().unwrap()))
            });
        }
    }
}

#[test]
fn a_guest_tracked_by_write_protection_goes_after_its_passes() {
    if require::kvm() && require::uffd() {
        moves(Pages::Small, Switch::AfterPasses(2), |_, _| Tracker::WriteProtect);
    }
}

#[test]
fn a_kvm_guest_on_huge_pages_goes_at_once_or_after_passes() {
    if !(require::kvm() && require::uffd()) {
        return;
    }
    let Some(_pool) = require::hugetlb(2 * (2 * 4 + 1)) else { return };
    moves(Pages::Huge, Switch::AtOnce, |_, _| Tracker::Log);
    moves(Pages::Huge, Switch::AfterPasses(2), |guest, _| {
        Tracker::Hooks(Box::new(guest.dirty_log().unwrap()))
    });
    moves(Pages::Huge, Switch::AfterPasses(2), |_, _| Tracker::WriteProtect);
}
