// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests of threads, and devices, that write on both sides: with every switch, pattern and
//! tracker.

use crate::scene::{
    HUGE, MIB, Move, Pages, SWITCHES, Switch, check_all_filled, fill_all, guest, memory, side_with,
    small,
};
use pageferry_client::JobStatus;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::device::Device;
use pageferry_tests::guest::threads::{Pattern, ThreadGuestOptions};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::usage::Path;
use pageferry_tests::vmm::{PATIENCE, Tracker};

const SEED: u64 = 7;
const PATTERNS: [Pattern; 3] =
    [Pattern::Uniform, Pattern::Sequential, Pattern::Hot { pages_percent: 10, writes_percent: 90 }];

/// Adds two devices with their own ledgers.
fn add_devices(side: &MockSide) {
    for (name, seed) in [("net", 5), ("disk", 6)] {
        side.vmm.add_device(Device::new(side.vmm.usage(), name, 2000, seed).unwrap());
    }
}

/// Migrates a guest that writes all the time. Checks every word that it and its devices wrote, and
/// all other content.
fn moves(
    source: &MockSide, destination: &MockSide, switch: Switch, options: &ThreadGuestOptions,
) -> [JobStatus; 2] {
    fill_all(source, SEED);
    let wrote = source.threads(options);
    let writes =
        destination.threads(&ThreadGuestOptions { path: Path::MappingAndLog, ..options.clone() });
    [source, destination].iter().for_each(|side| add_devices(side));
    source.vmm.start().unwrap();
    wait_until("writes", PATIENCE, || wrote() > 2000).unwrap();
    let before = source.allocated();
    let migration = Move::start(source, destination, switch.options(120 * MIB));
    if switch == Switch::OnRequest {
        source.client().start_postcopy().unwrap();
    }
    let ended = migration.finish();
    let [outgoing, incoming] = &ended;
    assert!(writes() > 0, "the guest runs at the destination");
    let counted = outgoing.counters;
    match switch {
        Switch::AtOnce => {
            assert_eq!(counted.passes, 0);
            assert!(incoming.counters.faults > 0, "{:?}", incoming.counters);
            let all = source.vmm.memory().blocks().iter().map(|block| block.pages()).sum::<u64>();
            assert_eq!(counted.requested_pages + counted.pushed_pages, all);
        }
        Switch::AfterPasses(passes) => assert_eq!(counted.passes, u64::from(passes)),
        Switch::OnRequest | Switch::OnNonConvergence => assert!(counted.passes > 0),
    }
    assert_eq!(source.allocated(), before, "nothing is allocated at the source");
    destination.vmm.stop().unwrap();
    assert!(destination.vmm.usage().check().unwrap() > 1000);
    check_all_filled(destination, SEED);
    ended
}

#[test]
fn a_guest_counts_on_whenever_it_goes_and_whatever_it_writes() {
    if !require::uffd() {
        return;
    }
    for switch in SWITCHES {
        for pattern in PATTERNS {
            eprintln!("{switch:?} {pattern:?}");
            moves(&small(8), &small(8), switch, &guest(pattern, 20_000));
        }
    }
}

#[test]
fn what_write_protection_finds_is_still_to_come() {
    if !require::uffd() {
        return;
    }
    for switch in SWITCHES {
        eprintln!("{switch:?}");
        let (source, destination) = (small(8), small(8));
        source.vmm.set_tracker(Tracker::WriteProtect).unwrap();
        let options = ThreadGuestOptions { path: Path::Mapping, ..guest(Pattern::Uniform, 20_000) };
        moves(&source, &destination, switch, &options);
    }
}

#[test]
fn a_guest_of_many_threads_that_never_rest() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (small(8), small(8));
    let options = ThreadGuestOptions { threads: 16, rate: None, ..guest(Pattern::Uniform, 0) };
    moves(&source, &destination, Switch::AtOnce, &options);
}

#[test]
fn host_pages_are_placed_whole_from_any_page_size() {
    if !require::uffd() {
        return;
    }
    // Two blocks on each side. One of them begins at the second host page of its file.
    let Some(_pool) = require::hugetlb(2 * (2 * 4 + 1)) else { return };
    for (ours, theirs) in
        [(Pages::Huge, Pages::Huge), (Pages::Small, Pages::Huge), (Pages::Huge, Pages::Small)]
    {
        for switch in [Switch::AtOnce, Switch::AfterPasses(1)] {
            eprintln!("{ours:?} to {theirs:?}, {switch:?}");
            let (source, destination) = (side_with(memory(ours, 8)), side_with(memory(theirs, 8)));
            let [outgoing, incoming] =
                moves(&source, &destination, switch, &guest(Pattern::Uniform, 20_000));
            if theirs == Pages::Huge {
                for counted in [outgoing.counters, incoming.counters] {
                    assert_eq!(
                        (counted.requested_pages + counted.pushed_pages) % HUGE,
                        0,
                        "{counted:?}"
                    );
                }
            }
        }
    }
}
