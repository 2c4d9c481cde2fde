// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! After a postcopy the memory is like any other, and the guest can migrate to the next host.

use crate::scene::{
    MIB, Move, Pages, Switch, check_all_filled, fill_all, guest, memory, side_with, small,
};
use pageferry_client::{Mode, OutgoingOptions, Phase};
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::Pattern;
use pageferry_tests::memory::TestBlock;
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::VolatileMemory;

/// True if the mapping of a block is registered for missing pages.
fn is_registered(block: &TestBlock) -> bool {
    let start = format!("{:x}-", block.address());
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let of_block = maps.lines().skip_while(|line| !line.starts_with(&start));
    let flags = of_block.into_iter().find(|line| line.starts_with("VmFlags:")).unwrap();
    flags.split_whitespace().any(|flag| flag == "um")
}

#[test]
fn holes_are_plain_holes_again_when_all_is_here() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (small(4), small(4));
    let here = source.block(0);
    here.fill(PageRange::new(0, 500), 1).unwrap();
    let migration = Move::start(&source, &destination, Switch::AtOnce.options(MIB));
    migration.until_postcopy();
    let blocks = destination.vmm.memory().blocks();
    assert!(blocks.iter().all(is_registered));
    migration.hurry();
    let [_, incoming] = migration.finish();
    assert!(!blocks.iter().any(is_registered));
    assert!(source.vmm.memory().blocks().iter().all(|block| !is_registered(block)));
    // No agent answers faults any more.
    let word = destination
        .block(0)
        .mapping()
        .get_atomic_ref::<AtomicU64>((700 * PAGE_SIZE) as usize)
        .unwrap();
    assert_eq!(word.load(Ordering::Relaxed), 0);
    assert_eq!(destination.status().counters.faults, incoming.counters.faults);
}

#[test]
fn a_guest_goes_from_host_to_host_in_every_mode() {
    if !require::uffd() {
        return;
    }
    let Some(_pool) = require::hugetlb(2 * (2 * 2 + 1)) else { return };
    let precopy = OutgoingOptions { bandwidth: 60 * MIB, ..OutgoingOptions::default() };
    let hosts = [
        (Pages::Small, Switch::AtOnce.options(40 * MIB)),
        (Pages::Huge, Switch::AfterPasses(1).options(40 * MIB)),
        (Pages::Small, OutgoingOptions { streams: 3, ..precopy.clone() }),
        (Pages::Small, Switch::AtOnce.options(40 * MIB)),
        (Pages::Huge, precopy),
        (Pages::Small, Switch::AtOnce.options(0)),
    ];
    let options = guest(Pattern::Uniform, 10_000);
    let mut source = side_with(memory(Pages::Small, 4));
    fill_all(&source, 9);
    let mut writes = Box::new(source.threads(&options)) as Box<dyn Fn() -> u64>;
    source.vmm.start().unwrap();
    for (pages, how) in hosts {
        wait_until("writes", PATIENCE, || writes() > 500).unwrap();
        eprintln!("{:?} to {pages:?} pages", how.mode);
        let destination = side_with(memory(pages, 4));
        writes = Box::new(destination.threads(&options));
        let migration = Move::start(&source, &destination, how.clone());
        if how.mode == Mode::Precopy {
            for status in migration.end() {
                assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
            }
        } else {
            migration.finish();
        }
        source = destination;
    }
    source.vmm.stop().unwrap();
    assert!(source.vmm.usage().check().unwrap() > 1000);
    check_all_filled(&source, 9);
}
