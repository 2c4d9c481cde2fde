// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults on a page that is just being placed.

use pageferry_agent::memory::host_page_set::HostPageSet;
use pageferry_agent::memory::missing_pages::{FaultOutcome, MissingPages};
use pageferry_agent::memory::{Backing, Block, GuestMemory};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE};
use pageferry_protocol::userfault::{AddressRange, Events, RegisterMode, Userfaultfd, feature};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::require;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};
use std::time::Instant;
use vm_memory::VolatileMemory;

const PAGES: u64 = 64;

#[test]
fn a_fault_on_a_page_being_placed_gets_its_content() {
    if !require::uffd() {
        return;
    }
    let ram = TestMemory::ram(PAGES * PAGE_SIZE).unwrap();
    let mapped = ram.block(0).unwrap();
    let range = AddressRange { start: mapped.address(), length: PAGES * PAGE_SIZE };
    let uffd = Userfaultfd::open(feature::MISSING_SHMEM).unwrap();
    uffd.register(range, RegisterMode::Missing).unwrap();

    let geometry = BlockGeometry {
        id: 0,
        name: "ram".into(),
        gpa: 0,
        length: range.length,
        granularity: PAGE_SIZE,
    };
    let backing =
        Backing::new(mapped.file().as_fd().try_clone_to_owned().unwrap(), 0, range.length).unwrap();
    let block = Arc::new(Block::new(geometry, backing, range.start, None).unwrap());
    let memory = GuestMemory::new(vec![block], BlockTable::new(), None);
    let missing = Arc::new(HostPageSet::empty(memory.blocks(), &[PAGE_SIZE]).unwrap());
    missing.add_pages(0, 0, u64::MAX);
    let for_agent = uffd.as_fd().try_clone_to_owned().unwrap();
    let missing_pages =
        MissingPages::new(memory.blocks(), missing.clone(), for_agent, false, Arc::default())
            .unwrap();
    let (memory, missing_pages) = (&memory, &missing_pages);

    for page in 0..PAGES {
        let stamp = 1000 + page;
        let mut content = [0; PAGE_SIZE as usize];
        content[..8].copy_from_slice(&stamp.to_le_bytes());
        let taken = Barrier::new(2);
        std::thread::scope(|scope| {
            let touch = scope.spawn(move || {
                let word = mapped
                    .mapping()
                    .get_atomic_ref::<std::sync::atomic::AtomicU64>((page * PAGE_SIZE) as usize);
                word.unwrap().load(Ordering::Relaxed)
            });
            let mut events = Events::default();
            while events.faults().is_empty() {
                uffd.read_events(&mut events).unwrap();
                std::thread::yield_now();
            }
            assert_eq!(missing_pages.locate(events.faults()[0]), Some((0, page)));
            // Like an arriving page: it takes the page, and then places it.
            let fault = scope.spawn(|| {
                taken.wait();
                missing_pages.fault(&memory.readers, (0, page), Instant::now()).unwrap()
            });
            let reading = memory.readers.reading(0, 0, 0);
            assert_eq!(missing.take(0, 0, 1 << page), 1 << page);
            taken.wait();
            (0..100).for_each(|_| std::thread::yield_now());
            let placed = uffd.copy(range.start + page * PAGE_SIZE, &content);
            drop(reading);
            assert!(placed.is_ok(), "page {page} was there before its content");
            assert_eq!(fault.join().unwrap(), FaultOutcome::Resolved);
            assert_eq!(touch.join().unwrap(), stamp);
        });
    }
    uffd.unregister(range).unwrap();
}
