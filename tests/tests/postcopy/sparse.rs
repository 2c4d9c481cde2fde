// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A large guest that gave most of its memory back.

use crate::scene::{Move, Switch, TRICKLE, side_with};
use pageferry_client::Punch;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange, pages_in};
use pageferry_tests::balloon::byte_range;
use pageferry_tests::guest::IdleGuest;
use pageferry_tests::memory::TestMemory;
use pageferry_tests::random::{Random, page_content};
use pageferry_tests::require;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::VolatileMemory;

const GIB: u64 = 1 << 30;
const SEED: u64 = 3;
/// Pages that the balloon holds: all except the last GiB.
const GIVEN: PageRange = PageRange { first: 0, count: 7 * GIB / PAGE_SIZE };
/// Pages that the balloon holds and that still have stale content.
const STALE: PageRange = PageRange { first: GIB / PAGE_SIZE, count: (32 << 20) / PAGE_SIZE };
/// Pages that the guest uses.
const USED: PageRange =
    PageRange { first: 7 * GIB / PAGE_SIZE + 5000, count: (64 << 20) / PAGE_SIZE };

#[test]
fn seven_of_eight_gibibytes_in_a_balloon_cost_nothing() {
    if !require::uffd() {
        return;
    }
    let [source, destination] =
        [(), ()].map(|()| side_with(Arc::new(TestMemory::ram(8 * GIB).unwrap())));
    let (here, there) = (source.block(0), destination.block(0));
    here.fill(STALE, SEED).unwrap();
    here.fill(USED, SEED).unwrap();
    source.client().discard(&[byte_range(0, GIVEN)], Punch::No).unwrap();
    let allocated = here.allocated().unwrap();
    assert_eq!(allocated, STALE.bytes() + USED.bytes());
    destination.vmm.set_guest(IdleGuest);

    let migration = Move::start(&source, &destination, Switch::AtOnce.options(TRICKLE));
    migration.until_postcopy();
    // The guest touches pages everywhere: pages of the balloon with and without stale content,
    // holes, and used pages.
    let touched: BTreeSet<u64> = std::thread::scope(|scope| {
        let threads = (0..4).map(|thread| {
            scope.spawn(move || {
                let mut random = Random::derive(SEED, thread);
                let mut touched = BTreeSet::new();
                for number in 0..600 {
                    let all = [there.all(), STALE, USED][number % 3];
                    let page = all.first + random.below(all.count);
                    let word = there
                        .mapping()
                        .get_atomic_ref::<AtomicU64>((page * PAGE_SIZE) as usize)
                        .unwrap();
                    let expected = match page {
                        page if USED.first <= page && page < USED.end() => page_content(SEED, page),
                        _ => [0; PAGE_SIZE as usize],
                    };
                    let expected = u64::from_le_bytes(expected[..8].try_into().unwrap());
                    assert_eq!(word.load(Ordering::Relaxed), expected, "page {page:#x}");
                    touched.insert(page);
                }
                touched
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    migration.hurry();
    let [outgoing, incoming] = migration.finish();

    let (ours, theirs) = (outgoing.counters, incoming.counters);
    let asked =
        touched.iter().filter(|page| USED.first <= **page && **page < USED.end()).count() as u64;
    assert!(
        theirs.requested_pages <= asked,
        "{} of {asked} were asked for",
        theirs.requested_pages
    );
    assert_eq!(
        ours.requested_pages + ours.pushed_pages,
        USED.count,
        "only used pages were missing"
    );
    // A page that is requested after it was pushed and before it arrives is sent twice.
    let twice = ours.pages_sent.checked_sub(USED.count).unwrap();
    assert!(twice <= theirs.requested_pages, "{twice} pages were sent twice");
    assert_eq!((ours.zero_pages, ours.stray_pages), (0, 0));
    assert!(ours.wire_bytes < USED.bytes() * 11 / 10, "{ours:?}");
    assert!((USED.count..=ours.pages_sent).contains(&theirs.pages_received), "{theirs:?}");
    // Each page counts once, even if several threads touched it.
    assert!(
        theirs.faults >= touched.len() as u64 - asked && theirs.faults <= touched.len() as u64,
        "{theirs:?}"
    );

    assert_eq!(here.allocated().unwrap(), allocated, "nothing is allocated at the source");
    let beside = touched.len() as u64 - asked;
    assert_eq!(
        pages_in(there.allocated().unwrap()),
        USED.count + beside,
        "what was used, and what the guest touched"
    );
    for page in USED.first..USED.end() {
        assert!(there.read_page(page).unwrap() == page_content(SEED, page), "page {page:#x}");
    }
}
