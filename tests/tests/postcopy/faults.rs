// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults of many threads at once, and faults of the kernel in system calls of a device.

use crate::scene::{Move, Switch, TRICKLE, small};
use pageferry_client::{IncomingOptions, MIN_BANDWIDTH, Mode, OutgoingOptions, Parameters, Phase};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::IdleGuest;
use pageferry_tests::memory::TestBlock;
use pageferry_tests::random::{Random, page_content};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::vmm::PATIENCE;
use std::io::{Read, Seek, Write};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

const SEED: u64 = 11;

/// A guest whose memory is full, and an empty destination.
fn full(mib: u64) -> (MockSide, MockSide) {
    let (source, destination) = (small(mib), small(mib));
    for block in source.vmm.memory().blocks() {
        block.fill(block.all(), SEED).unwrap();
    }
    destination.vmm.set_guest(IdleGuest);
    (source, destination)
}

/// The first word of a page, as a vCPU reads it.
fn load(block: &TestBlock, page: u64) -> u64 {
    let word = block.mapping().get_atomic_ref::<AtomicU64>((page * PAGE_SIZE) as usize).unwrap();
    word.load(Ordering::Relaxed)
}

fn expected(page: u64) -> u64 {
    u64::from_le_bytes(page_content(SEED, page)[..8].try_into().unwrap())
}

fn assert_arrived(destination: &MockSide) {
    for block in destination.vmm.memory().blocks() {
        for page in 0..block.pages() {
            assert!(block.read_page(page).unwrap() == page_content(SEED, page), "page {page:#x}");
        }
    }
}

#[test]
fn threads_that_touch_a_page_at_once_all_get_its_content() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = full(4);
    let migration = Move::start(&source, &destination, Switch::AtOnce.options(TRICKLE));
    migration.until_postcopy();
    let block = destination.block(1);
    let pages = 800;
    let together = Barrier::new(3);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                // From the end, because the push begins at the start and continues after the last
                // fault.
                for page in (block.pages() - pages..block.pages()).rev() {
                    together.wait();
                    assert_eq!(load(block, page), expected(page), "page {page:#x}");
                }
            });
        }
    });
    migration.hurry();
    let [_, incoming] = migration.finish();
    let counted = incoming.counters;
    assert!(
        counted.faults > 0 && counted.faults <= 2 * block.pages(),
        "each page is one fault: {counted:?}"
    );
    assert_arrived(&destination);
}

#[test]
fn many_threads_that_touch_pages_all_over_are_all_answered() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = full(8);
    let migration = Move::start(&source, &destination, Switch::AtOnce.options(TRICKLE));
    migration.until_postcopy();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let destination = &destination;
            scope.spawn(move || {
                let mut random = Random::derive(SEED, thread);
                for _ in 0..300 {
                    let block = destination.block(random.below(2) as u32);
                    let page = random.below(block.pages());
                    assert_eq!(load(block, page), expected(page), "page {page:#x}");
                }
            });
        }
    });
    migration.hurry();
    migration.finish();
    assert_arrived(&destination);
}

#[test]
fn a_system_call_waits_for_the_memory_that_it_reads_or_writes() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = full(4);
    let migration = Move::start(&source, &destination, Switch::AtOnce.options(TRICKLE));
    migration.until_postcopy();
    let guest = destination.vmm.memory().guest();
    // Whole pages, and parts of the pages before and after. The rest of those two comes from the
    // source.
    let (before, length) = (100, 3 * PAGE_SIZE + 500);
    let mut bytes = vec![0; length as usize];
    Random::new(SEED).fill(&mut bytes);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let block = destination.block(0);

    let places: Vec<u64> = (0..40).map(|at| 900 - at * 20).collect();
    for (number, page) in places.iter().enumerate() {
        let into = GuestAddress(page * PAGE_SIZE + before);
        // From a file and from a pipe, like a disk and a network card of the VMM.
        if number % 2 == 0 {
            file.rewind().unwrap();
            guest.read_exact_volatile_from(into, &mut file, bytes.len()).unwrap();
        } else {
            rustix::io::write(&writer, &bytes).unwrap();
            let mut reader = std::fs::File::from(reader.try_clone().unwrap());
            guest.read_exact_volatile_from(into, &mut reader, bytes.len()).unwrap();
        }
        let from = GuestAddress((page + 8) * PAGE_SIZE + before);
        let mut found = vec![0; bytes.len()];
        if number % 2 == 0 {
            let mut copy = tempfile::tempfile().unwrap();
            guest.write_all_volatile_to(from, &mut copy, found.len()).unwrap();
            copy.rewind().unwrap();
            copy.read_exact(&mut found).unwrap();
        } else {
            let mut writer = std::fs::File::from(writer.try_clone().unwrap());
            guest.write_all_volatile_to(from, &mut writer, found.len()).unwrap();
            std::fs::File::from(reader.try_clone().unwrap()).read_exact(&mut found).unwrap();
        }
        let sent: Vec<u8> =
            (page + 8..page + 12).flat_map(|page| page_content(SEED, page)).collect();
        assert!(
            found == sent[before as usize..][..bytes.len()],
            "what was written from page {page:#x}"
        );
    }
    migration.hurry();
    let [_, incoming] = migration.finish();
    assert!(incoming.counters.faults > 100, "{:?}", incoming.counters);
    for page in places {
        let mut wanted: Vec<u8> =
            (page..page + 5).flat_map(|page| page_content(SEED, page)).collect();
        wanted[before as usize..][..bytes.len()].copy_from_slice(&bytes);
        let mut found = vec![0; wanted.len()];
        block.read(page * PAGE_SIZE, &mut found).unwrap();
        assert!(found == wanted, "page {page:#x}");
    }
}

#[test]
fn a_page_in_a_slow_push_comes_when_it_is_requested() {
    if !require::uffd() {
        return;
    }
    let (source, destination) = (small(8), small(8));
    source.block(0).fill(source.block(0).all(), 7).unwrap();
    let (job, address) =
        destination.vmm.start_incoming("tcp:127.0.0.1:0", &IncomingOptions::default()).unwrap();
    // The push takes a minute for each of the pieces that it claims.
    let options = OutgoingOptions {
        streams: 2,
        mode: Mode::Postcopy,
        bandwidth: MIN_BANDWIDTH,
        ..OutgoingOptions::default()
    };
    let outgoing = source.vmm.start_outgoing(&address, &options).unwrap();
    destination.vmm.wait_phase(Phase::Postcopy, PATIENCE).unwrap();
    let memory = destination.vmm.memory().clone();
    let touches = std::thread::spawn(move || {
        let block = memory.block(0).unwrap();
        (0..block.pages()).for_each(|page| block.store(page * PAGE_SIZE, page).unwrap());
    });
    wait_until("every page", PATIENCE, || touches.is_finished()).unwrap();
    touches.join().unwrap();
    // The pushed pages that wait for bandwidth are sent now.
    source.client().set_parameters(&Parameters::bandwidth(0)).unwrap();
    assert_eq!(source.vmm.wait_job(outgoing, PATIENCE).unwrap().phase, Phase::Completed);
    assert_eq!(destination.vmm.wait_job(job, PATIENCE).unwrap().phase, Phase::Completed);
    for page in 0..source.block(0).pages() {
        let mut expected = source.block(0).read_page(page).unwrap();
        expected[..8].copy_from_slice(&page.to_ne_bytes());
        assert!(
            destination.block(0).read_page(page).unwrap() == expected,
            "page {page} is not what was sent"
        );
    }
}
