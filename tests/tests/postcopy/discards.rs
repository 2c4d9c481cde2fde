// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Discards and populates during a postcopy.

use crate::scene::{MIB, Move, SWITCHES, Switch, fill_all, guest, side_with, small};
use pageferry_client::{Parameters, Punch};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::balloon::{Balloon, Way, byte_range};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::threads::Pattern;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::plug::Plug;
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::vmm::PATIENCE;
use std::sync::Arc;

const PLUGGED: u32 = 2;
const UNIT: u64 = MIB / 2;

/// Two ordinary blocks, and one whose memory is plugged.
fn side() -> MockSide {
    let ram = |id: u32, name: &str| BlockLayout {
        id,
        name: name.into(),
        gpa: u64::from(id) << 30,
        fd_offset: u64::from(id) * 0x3000,
        ..BlockLayout::ram(8 * MIB)
    };
    let plugged =
        BlockLayout { discarded: true, granularity: UNIT, fd_offset: 0, ..ram(PLUGGED, "plugged") };
    side_with(Arc::new(TestMemory::new(vec![ram(0, "low"), ram(1, "high"), plugged]).unwrap()))
}

fn balloon(side: &MockSide, way: Way, seed: u64) -> Balloon {
    Balloon::new(side.client().clone(), side.vmm.usage().clone(), way, seed)
}

fn plug(side: &MockSide) -> Plug {
    Plug::new(side.client().clone(), side.vmm.usage().clone(), PLUGGED, UNIT).unwrap()
}

#[test]
fn discarded_pages_need_not_come_and_are_zero_when_populated() {
    if !require::uffd() {
        return;
    }
    for (seed, switch) in (1..).zip(SWITCHES) {
        eprintln!("{switch:?}, seed {seed}");
        let (source, destination) = (side(), side());
        let options = guest(Pattern::Uniform, 20_000);
        let (wrote, writes) = (source.threads(&options), destination.threads(&options));
        // With a punch a discarded page is a hole, and without one it has stale content. Neither
        // may be sent.
        let mut taken = [(Punch::Yes, seed), (Punch::No, seed + 100)]
            .map(|(punch, seed)| balloon(&source, Way::Discard(punch), seed));
        let mut freed = balloon(&source, Way::Free, seed + 300);
        let mut plugged = plug(&source);
        fill_all(&source, seed);
        for unit in 0..8 {
            assert!(plugged.plug(unit).unwrap());
        }
        source.vmm.start().unwrap();
        wait_until("writes", PATIENCE, || wrote() > 2000).unwrap();
        taken.iter_mut().for_each(|balloon| assert!(balloon.inflate(10, 100).unwrap() > 0));
        assert!(plugged.unplug(3).unwrap() && freed.inflate(10, 100).unwrap() > 0);

        // The passes are fast. Then the postcopy is slow, so that the balloon has time.
        let (client, slow) = (source.client().clone(), Parameters::bandwidth(4 * MIB));
        source.vmm.before_pause(move || Ok(client.set_parameters(&slow)?));
        let migration = Move::start(&source, &destination, switch.options(100 * MIB));
        if switch == Switch::OnRequest {
            source.client().start_postcopy().unwrap();
        } else {
            // During the passes, or when all pages remain.
            taken[0].inflate(3, 50).unwrap();
            freed.inflate(3, 50).unwrap();
            freed.deflate(5).unwrap();
        }
        migration.until_postcopy();
        let mut there = balloon(&destination, Way::Discard(Punch::Yes), seed + 200);
        let mut freeing = balloon(&destination, Way::Free, seed + 400);
        let mut plugged = plug(&destination);
        let client = destination.client();
        let mut held =
            taken.iter().flat_map(|balloon| balloon.held().iter().copied()).collect::<Vec<_>>();
        for round in 0..16 {
            there.inflate(6, 60).unwrap();
            there.deflate(2).unwrap();
            freeing.inflate(6, 60).unwrap();
            freeing.deflate(2).unwrap();
            if round % 2 == 0 {
                assert!(plugged.unplug(round / 2).unwrap());
            } else {
                assert!(plugged.plug(round).unwrap());
            }
            // The pages that the source's balloon holds are part of the usage's state.
            if let Some((block, run)) = held.pop() {
                client.populate(&[byte_range(block, run)]).unwrap();
                destination.vmm.usage().take_back(block, run).unwrap();
            }
        }
        migration.hurry();
        let [outgoing, incoming] = migration.finish();
        let (ours, theirs) = (outgoing.counters, incoming.counters);
        assert!(theirs.dropped_pages > 0, "{theirs:?}");
        assert!(ours.dropped_pages <= theirs.dropped_pages, "{ours:?} {theirs:?}");
        let before = writes();
        wait_until("writes into what was taken back", PATIENCE, || writes() > before + 2000)
            .unwrap();
        destination.vmm.stop().unwrap();
        destination.vmm.usage().check().unwrap();
        for (block, run) in freeing.held() {
            assert!(
                destination.vmm.memory().block(*block).unwrap().is_hole(*run).unwrap(),
                "block {block}: {run:?} was freed"
            );
        }
        for block in destination.vmm.memory().blocks() {
            let discarded = client.discarded(block.id()).unwrap();
            let runs: Vec<_> = discarded.runs(block.all()).collect();
            assert!(!runs.is_empty());
            for run in runs {
                assert!(
                    block.is_hole(run).unwrap(),
                    "block {}: {run:?} was given away, and is no hole",
                    block.id()
                );
            }
            let given = discarded.next_set(block.all()).unwrap();
            assert_eq!(block.read_word(given * PAGE_SIZE).unwrap(), 0);
        }
    }
}

#[test]
fn all_that_remains_may_be_given_away() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (small(8), small(8));
    fill_all(&source, 1);
    let migration = Move::start(&source, &destination, Switch::AtOnce.options(MIB));
    migration.until_postcopy();
    for block in destination.vmm.memory().blocks() {
        destination.client().discard(&[byte_range(block.id(), block.all())], Punch::Yes).unwrap();
    }
    // The bandwidth stays low, because no page is missing.
    let [outgoing, incoming] = migration.finish();
    assert!(incoming.counters.dropped_pages > 0 && outgoing.counters.dropped_pages > 0);
    assert_eq!(destination.allocated(), 0);
}
