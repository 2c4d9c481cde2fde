// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A hundred lost connections: guests and a balloon work while the connections between the agents
//! are cut repeatedly, at any moment, and recovered each time.
//!
//! The test prints its seed. `PAGEFERRY_SEED` sets it.

use crate::seeds;
use pageferry_client::{IncomingOptions, Mode, OutgoingOptions, Parameters, Phase, Punch};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::balloon::{Balloon, Way, is_busy};
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::device::Device;
use pageferry_tests::guest::threads::{Pattern, ThreadGuest, ThreadGuestOptions};
use pageferry_tests::memory::BlockLayout;
use pageferry_tests::proxy::Proxy;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::usage::Path;
use pageferry_tests::vmm::PATIENCE;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Offset in a page of a stamp that the guest does not change.
const STAMP: u64 = 2048;
const CUTS: u64 = 100;
/// Number of cuts in one migration. Then the rest is sent at full speed, and the guest migrates to
/// the next host.
const CUTS_EACH: u64 = 25;

/// A VMM with a guest of threads and a device.
fn side(seed: u64) -> MockSide {
    let low = BlockLayout { fd_offset: 0x3000, ..BlockLayout::ram(16 * MIB) };
    let high =
        BlockLayout { id: 1, name: "high".into(), gpa: 1 << 30, ..BlockLayout::ram(16 * MIB) };
    let mock = MockSide::new(vec![low, high]);
    let vmm = &mock.vmm;
    let options = ThreadGuestOptions {
        threads: 4,
        rate: Some(2000),
        pattern: Pattern::Uniform,
        path: Path::MappingAndLog,
        seed,
        pages: None,
    };
    vmm.set_guest(ThreadGuest::new(vmm.usage(), options).unwrap());
    vmm.add_device(Device::new(vmm.usage(), "disk", 200, seed).unwrap());
    mock
}

/// Discards pages and populates them again until `stop` is set. Adds the discarded pages to
/// `given`.
fn balloon(side: &MockSide, seed: u64, stop: &AtomicBool, given: &mut BTreeSet<(u32, u64)>) {
    let way = if seed.is_multiple_of(2) { Way::Free } else { Way::Discard(Punch::Yes) };
    let mut balloon = Balloon::new(side.vmm.client().clone(), side.vmm.usage().clone(), way, seed);
    while !stop.load(Ordering::Relaxed) {
        balloon.inflate(2, 20).unwrap();
        let held = balloon.held().iter();
        given.extend(
            held.flat_map(|(block, run)| (run.first..run.end()).map(|page| (*block, page))),
        );
        balloon.deflate(1).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(!balloon.held().is_empty());
}

/// Stops the balloon on drop, also if the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Cuts the connections and recovers the migration this many times, or until all memory is there.
/// Returns how often.
fn cut_and_recover(
    source: &MockSide, proxy: &Proxy, options: &OutgoingOptions, random: &mut Random,
) -> u64 {
    let mut cuts = 0;
    while cuts < CUTS_EACH {
        // At any moment of the transfer, or of the recovery from the last cut.
        let longest = if random.one_in(3) { 2000 } else { 30_000 };
        std::thread::sleep(Duration::from_micros(random.below(longest)));
        if random.one_in(2) {
            proxy.cut();
        } else {
            proxy.cut_one(random.next());
        }
        let mut looks = 0;
        let status = wait_for("the pause", PATIENCE, || {
            looks += 1;
            if looks % 20 == 0 {
                // The first cut may hit nothing, because the connections are just being made.
                proxy.cut();
            }
            let status = source.status();
            (status.phase == Phase::PostcopyPaused || status.phase.is_final()).then_some(status)
        });
        if status.unwrap().phase.is_final() {
            break;
        }
        match source.vmm.client().recover(None, options) {
            Ok(_) => cuts += 1,
            // The agent has not begun with the last request yet.
            Err(error) if is_busy(&error) => {}
            Err(error) => panic!("{error}"),
        }
    }
    cuts
}

#[test]
fn a_hundred_cuts_at_any_moment_lose_nothing() {
    if !require::uffd() {
        return;
    }
    let seed = seeds::given();
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("PAGEFERRY_SEED={seed}");
    let mut random = Random::new(seed);
    let mut source = side(seed);
    for block in source.vmm.memory().blocks() {
        (0..block.pages()).for_each(|page| {
            block.write(page * PAGE_SIZE + STAMP, &(page + 1).to_le_bytes()).unwrap()
        });
    }
    source.vmm.start().unwrap();
    let mut cuts = 0;
    let mut given = BTreeSet::new();
    while cuts < CUTS {
        let destination = side(seed + cuts);
        let (incoming, address) = destination.listen(&IncomingOptions::default());
        let proxy = Proxy::to(&address).unwrap();
        let options = OutgoingOptions {
            streams: 2,
            mode: Mode::Postcopy,
            bandwidth: MIB,
            release: random.one_in(2),
            ..OutgoingOptions::default()
        };
        let outgoing = source.vmm.start_outgoing(proxy.address(), &options).unwrap();
        source.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
        wait_until("the guest runs", PATIENCE, || destination.vmm.record().runs).unwrap();
        let stop = AtomicBool::new(false);
        let mut recover = || cut_and_recover(&source, &proxy, &options, &mut random);
        let count = std::thread::scope(|scope| {
            scope.spawn(|| balloon(&destination, seed ^ cuts, &stop, &mut given));
            let _stop = Stop(&stop);
            let count = recover();
            // Sends the rest at full speed. The agent refuses this if all memory is there already,
            // or during a recovery.
            let _ = source.vmm.client().set_parameters(&Parameters::bandwidth(0));
            let both = [(&source, outgoing), (&destination, incoming)];
            let ended = both.map(|(side, job)| side.vmm.wait_job(job, PATIENCE));
            for status in ended {
                let status = status.unwrap_or_else(|error| {
                    panic!("{error}: {:?} {:?}", source.status(), destination.status())
                });
                assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
                assert_eq!(status.counters.remaining_pages, 0);
            }
            count
        });
        assert!(count > 0, "nothing was cut");
        cuts += count;
        eprintln!("{cuts} cuts, {:?}", destination.status().counters);
        destination.vmm.stop().unwrap();
        assert!(destination.vmm.usage().check().unwrap() > 100);
        for block in destination.vmm.memory().blocks() {
            let discarded = destination.vmm.client().discarded(block.id()).unwrap();
            for run in discarded.runs(block.all()) {
                assert!(
                    block.is_hole(run).unwrap(),
                    "block {}: {run:?} was given away",
                    block.id()
                );
            }
            for page in 0..block.pages() {
                let stamp = block.read_word(page * PAGE_SIZE + STAMP).unwrap();
                let zero = stamp == 0 && given.contains(&(block.id(), page));
                assert!(
                    zero || stamp == page + 1,
                    "block {}, page {page:#x} holds {stamp}",
                    block.id()
                );
            }
        }
        destination.vmm.start().unwrap();
        source = destination;
    }
    source.vmm.stop().unwrap();
}
