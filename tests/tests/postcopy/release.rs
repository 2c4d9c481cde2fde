// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that the source frees while the destination receives it.

use crate::scene::{MIB, Move, Switch, check_all_filled, fill_all, guest, small};
use pageferry_client::OutgoingOptions;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::Pattern;
use pageferry_tests::require;
use pageferry_tests::vmm::PATIENCE;

#[test]
fn what_the_destination_has_is_freed_at_the_source() {
    if !require::uffd() {
        return;
    }
    for switch in [Switch::AtOnce, Switch::AfterPasses(1)] {
        eprintln!("{switch:?}");
        let (source, destination) = (small(8), small(8));
        fill_all(&source, 5);
        let options = guest(Pattern::Uniform, 5000);
        let wrote = source.threads(&options);
        let writes = destination.threads(&options);
        source.vmm.start().unwrap();
        wait_until("writes", PATIENCE, || wrote() > 100).unwrap();
        let options = OutgoingOptions { release: true, ..switch.options(12 * MIB) };
        let migration = Move::start(&source, &destination, options);
        migration.until_postcopy();
        let mut last = [source.allocated(), destination.allocated()];
        let mut steps = 0;
        let mut smaller = || {
            let now = [source.allocated(), destination.allocated()];
            assert!(now[0] <= last[0], "the source grew from {} to {}", last[0], now[0]);
            steps += u64::from(now[0] < last[0]);
            last = now;
            destination.status().phase.is_final() && source.status().phase.is_final()
        };
        wait_until("completion", PATIENCE, &mut smaller).unwrap();
        smaller();
        assert!(steps > 1 || switch != Switch::AtOnce, "the source frees step by step");
        let [outgoing, _] = migration.finish();
        assert!(writes() > 0);
        let counted = outgoing.counters;
        let all: u64 = source.vmm.memory().blocks().iter().map(|block| block.pages()).sum();
        assert_eq!(counted.released_pages, counted.requested_pages + counted.pushed_pages);
        assert_eq!(source.allocated(), (all - counted.released_pages) * PAGE_SIZE);
        if switch == Switch::AtOnce {
            assert_eq!(source.allocated(), 0);
        }
        destination.vmm.stop().unwrap();
        assert!(destination.vmm.usage().check().unwrap() > 0);
        check_all_filled(&destination, 5);
    }
}

#[test]
fn without_that_the_source_keeps_everything() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (small(4), small(4));
    source.block(0).fill(PageRange::new(3, 600), 1).unwrap();
    let before = source.allocated();
    let [outgoing, _] = Move::start(&source, &destination, Switch::AtOnce.options(0)).finish();
    assert_eq!((outgoing.counters.released_pages, source.allocated()), (0, before));
    assert_eq!(destination.allocated(), before);
}
