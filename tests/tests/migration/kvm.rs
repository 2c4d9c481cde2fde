// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real guest under KVM migrates while it writes, with either tracker, and continues to count at
//! the destination.

use pageferry_client::{IncomingOptions, NonConvergence, OutgoingOptions, Phase};
use pageferry_protocol::memory::PageRange;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::kvm::{FIRMWARE_PAGES, KvmGuest, Sweep, check_consistent, counters};
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::verify::same_block;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use std::sync::Arc;

/// Two blocks. The first one holds the firmware, and the sweep goes through both.
fn memory() -> Arc<TestMemory> {
    let low = BlockLayout { fd_offset: 0x3000, ..BlockLayout::ram(8 << 20) };
    let high =
        BlockLayout { id: 1, name: "high".into(), gpa: 64 << 20, ..BlockLayout::ram(8 << 20) };
    Arc::new(TestMemory::new(vec![low, high]).unwrap())
}

struct Side {
    mock: MockSide,
    sweep: Sweep,
}

impl Side {
    fn new() -> Self {
        let mock = MockSide::over(memory(), Tracker::Log);
        let sweep = Sweep::all(mock.vmm.memory().guest()).spins(2000);
        Self { mock, sweep }
    }

    fn guest(&self) -> KvmGuest {
        KvmGuest::new(self.mock.vmm.memory().guest().clone(), self.sweep.clone()).unwrap()
    }

    fn counters(&self) -> Vec<u32> {
        counters(self.mock.vmm.memory().guest(), &self.sweep).unwrap()
    }
}

fn migrate_with(tracker: impl FnOnce(&KvmGuest, &TestMemory) -> Tracker) {
    let (source, destination) = (Side::new(), Side::new());
    let mut guest = source.guest();
    guest.boot().unwrap();
    source.mock.vmm.set_tracker(tracker(&guest, source.mock.vmm.memory())).unwrap();
    source.mock.vmm.set_guest(guest);
    destination.mock.vmm.set_guest(destination.guest());
    source.mock.vmm.start().unwrap();
    let last = || *source.counters().last().unwrap();
    wait_until("two sweeps", PATIENCE, || last() >= 2).unwrap();

    let (_, address) = destination.mock.listen(&IncomingOptions::default());
    let (max_passes, policy) = (5, NonConvergence::StopAnyway);
    let options = OutgoingOptions {
        streams: 2,
        bandwidth: 100 << 20,
        max_passes,
        policy,
        ..OutgoingOptions::default()
    };
    let job = source.mock.vmm.start_outgoing(&address, &options).unwrap();
    let status = source.mock.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    let sent = status.counters.pages_sent;
    assert!(status.counters.passes > 1 && sent > source.sweep.pages(), "{:?}", status.counters);

    let stopped = check_consistent(source.counters()).unwrap();
    wait_until("two sweeps at the destination", PATIENCE, || {
        destination.counters()[0].wrapping_sub(stopped.sweeps) >= 2
    })
    .unwrap();
    destination.mock.vmm.stop().unwrap();
    let progress = check_consistent(destination.counters()).unwrap();
    assert!(progress.sweeps >= stopped.sweeps + 2);
    assert_eq!(check_consistent(source.counters()).unwrap(), stopped, "the source is paused");
    // The guest does not write its firmware.
    let [here, there] =
        [&source, &destination].map(|side| side.mock.vmm.memory().block(0).unwrap());
    let discarded = source.mock.vmm.client().discarded(0).unwrap();
    same_block(here, &discarded, there, |page| PageRange::new(0, FIRMWARE_PAGES).end() > page)
        .unwrap();
}

#[test]
fn a_guest_tracked_by_kvms_dirty_log_continues() {
    if require::kvm() {
        migrate_with(|guest, _| Tracker::Hooks(Box::new(guest.dirty_log().unwrap())));
    }
}

#[test]
fn a_guest_tracked_by_write_protection_continues() {
    if require::kvm() && require::uffd() {
        migrate_with(|_, _| Tracker::WriteProtect);
    }
}
