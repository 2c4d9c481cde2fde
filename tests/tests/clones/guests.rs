// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clones whose guests write all the time: they move, and are saved, with every tracker.

use pageferry_client::{
    Mode, NonConvergence, OutgoingOptions, Phase, SnapshotMode, SnapshotOptions,
};

use pageferry_tests::balloon::{Balloon, Way};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::guest::kvm::{KvmGuest, Sweep, check_consistent};
use pageferry_tests::guest::threads::ThreadGuestOptions;
use pageferry_tests::memory::{BlockLayout, TestMemory};
use pageferry_tests::require;
use pageferry_tests::scenario::MockSide;
use pageferry_tests::scenario::image_guest::{cloning, eager};
use pageferry_tests::usage::Path as By;
use pageferry_tests::verify::same_memory;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use std::path::Path;

/// Two blocks at odd places.
fn layouts() -> Vec<BlockLayout> {
    let low = BlockLayout { fd_offset: 0x3000, ..BlockLayout::ram(8 << 20) };
    let high =
        BlockLayout { id: 1, name: "high".into(), gpa: 64 << 20, ..BlockLayout::ram(4 << 20) };
    vec![low, high]
}

fn writing(path: By) -> ThreadGuestOptions {
    ThreadGuestOptions { rate: Some(5_000), path, ..ThreadGuestOptions::default() }
}

/// A guest that takes over what was written, and writes nothing.
fn still() -> ThreadGuestOptions {
    ThreadGuestOptions { rate: Some(0), ..ThreadGuestOptions::default() }
}

/// Saves a guest that has written to much of its memory.
fn save(image: &Path) {
    let source = MockSide::new(layouts());
    let writes = source.threads(&ThreadGuestOptions { rate: None, ..writing(By::MappingAndLog) });
    source.vmm.start().unwrap();
    wait_until("some writes", PATIENCE, || writes() > 2000).unwrap();
    completes(&source, source.vmm.start_snapshot(image, &background("")).unwrap());
}

fn background(base: &str) -> SnapshotOptions {
    SnapshotOptions {
        mode: SnapshotMode::Background,
        base: base.to_owned(),
        ..SnapshotOptions::default()
    }
}

#[track_caller]
fn completes(side: &MockSide, job: u64) {
    let status = side.vmm.wait_job(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
}

/// A clone whose guest writes.
fn clone_of(image: &Path, tracker: Tracker, path: By) -> MockSide {
    let clone = MockSide::clone_of(image, layouts(), tracker);
    let writes = clone.threads(&writing(path));
    completes(&clone, clone.vmm.start_restore(image, &cloning()).unwrap());
    wait_until("writes of the clone", PATIENCE, || writes() > 200).unwrap();
    clone
}

/// Moves the guest while it writes and gives memory back, and compares both sides.
fn moves(clone: &MockSide, options: &OutgoingOptions) {
    let destination = MockSide::new(layouts());
    let _ = destination.threads(&still());
    let (client, usage) = (clone.client().clone(), clone.vmm.usage().clone());
    let mut freeing = Balloon::new(client.clone(), usage.clone(), Way::Free, 5);
    let punch = pageferry_client::Punch::Yes;
    let mut discarding = Balloon::new(client, usage, Way::Discard(punch), 6);
    let [outgoing, incoming] = clone.start_move(&destination, options);
    let mut steps = 0;
    while !clone.status().phase.is_final() && steps < 30 {
        for balloon in [&mut freeing, &mut discarding] {
            balloon.inflate(2, 20).unwrap();
            balloon.deflate(2).unwrap();
        }
        steps += 1;
    }
    completes(clone, outgoing);
    completes(&destination, incoming);
    clone.vmm.stop().unwrap();
    same_memory(clone.vmm.memory(), clone.client(), destination.vmm.memory()).unwrap();
    assert_eq!(
        clone.vmm.usage().check().unwrap(),
        destination.vmm.usage().check().unwrap(),
        "words of the ledger"
    );
}

/// Some passes at a bandwidth at which memory changes in them.
fn passes() -> OutgoingOptions {
    let (max_passes, policy) = (5, NonConvergence::StopAnyway);
    OutgoingOptions { bandwidth: 40 << 20, max_passes, policy, ..OutgoingOptions::default() }
}

fn moves_with(tracker: Tracker, path: By, options: &OutgoingOptions) {
    if !require::uffd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&image);
    moves(&clone_of(&image, tracker, path), options);
}

#[test]
fn a_clone_moves_by_the_log() {
    moves_with(Tracker::Log, By::MappingAndLog, &passes());
}

#[test]
fn a_clone_moves_by_write_protection() {
    moves_with(Tracker::WriteProtect, By::Mapping, &passes());
}

#[test]
fn a_clone_moves_before_its_memory() {
    let mode = Mode::Postcopy;
    moves_with(Tracker::Log, By::MappingAndLog, &OutgoingOptions { mode, ..passes() });
}

#[test]
fn a_clone_moves_before_its_memory_after_a_pass_by_write_protection() {
    let (mode, switch_after) = (Mode::Hybrid, 1);
    let options = OutgoingOptions { mode, switch_after, ..passes() };
    moves_with(Tracker::WriteProtect, By::Mapping, &options);
}

#[test]
fn a_clone_is_saved_while_it_writes_and_its_increments_are_restored_and_cloned() {
    if !require::uffd() {
        return;
    }
    for (tracker, path) in [(Tracker::Log, By::MappingAndLog), (Tracker::WriteProtect, By::Mapping)]
    {
        let folder = tempfile::tempdir().unwrap();
        let [image, full, next, last] =
            ["image", "full", "next", "last"].map(|name| folder.path().join(name));
        save(&image);
        let clone = clone_of(&image, tracker, path);
        let paused = |base: &str| SnapshotOptions {
            mode: SnapshotMode::Paused,
            track: true,
            ..background(base)
        };
        let on = full.to_str().unwrap();
        completes(&clone, clone.vmm.start_snapshot(&full, &paused("")).unwrap());
        completes(&clone, clone.vmm.start_snapshot(&next, &paused(on)).unwrap());
        let counters = clone.status().counters;
        assert!(counters.unchanged_pages > 0, "{counters:?}");
        completes(&clone, clone.vmm.start_snapshot(&last, &background("")).unwrap());
        drop(clone);
        // Each compares its memory with what was written until the instant.
        for image in [&full, &next, &last] {
            let plain = MockSide::new(layouts());
            let _ = plain.threads(&still());
            completes(&plain, plain.vmm.start_restore(image, &eager()).unwrap());
            let words = plain.vmm.usage().check().unwrap();
            let again = MockSide::clone_of(image, layouts(), Tracker::Log);
            let _ = again.threads(&still());
            completes(&again, again.vmm.start_restore(image, &cloning()).unwrap());
            assert_eq!((words > 0, again.vmm.usage().check().unwrap()), (true, words));
        }
    }
}

/// The counters of a guest under KVM, without making pages.
fn counters(memory: &TestMemory, sweep: &Sweep) -> Vec<u32> {
    let read = |gpa: u64| {
        let mut blocks = memory.blocks().iter();
        let block = blocks.find(|block| {
            let layout = block.layout();
            (layout.gpa..layout.gpa + layout.length).contains(&gpa)
        });
        let block = block.unwrap();
        let mut bytes = [0; 4];
        block.read(gpa - block.layout().gpa, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    };
    sweep.addresses().map(read).collect()
}

struct KvmSide {
    mock: MockSide,
    sweep: Sweep,
}

impl KvmSide {
    fn over(mock: MockSide) -> Self {
        let sweep = Sweep::all(mock.vmm.memory().guest()).spins(2000);
        Self { mock, sweep }
    }

    fn guest(&self) -> KvmGuest {
        KvmGuest::new(self.mock.vmm.memory().guest().clone(), self.sweep.clone()).unwrap()
    }

    fn counters(&self) -> Vec<u32> {
        counters(self.mock.vmm.memory(), &self.sweep)
    }

    fn sweeps(&self) -> u32 {
        self.counters()[0]
    }
}

/// A real guest counts on as a clone, with KVM's dirty log, and moves on from there.
#[test]
fn a_clone_under_kvm_counts_on_and_moves() {
    if !(require::kvm() && require::uffd()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let source = KvmSide::over(MockSide::new(layouts()));
    let mut guest = source.guest();
    guest.boot().unwrap();
    let log = guest.dirty_log().unwrap();
    source.mock.vmm.set_tracker(Tracker::Hooks(Box::new(log))).unwrap();
    source.mock.vmm.set_guest(guest);
    source.mock.vmm.start().unwrap();
    wait_until("two sweeps", PATIENCE, || source.sweeps() >= 2).unwrap();
    let job = source.mock.vmm.start_snapshot(&image, &background("")).unwrap();
    completes(&source.mock, job);
    source.mock.vmm.stop().unwrap();
    let at_least = 2;
    let clones: Vec<_> = (0..2)
        .map(|_| {
            let mock = MockSide::clone_of(&image, layouts(), Tracker::Log);
            let clone = KvmSide::over(mock);
            let guest = clone.guest();
            let log = guest.dirty_log().unwrap();
            clone.mock.vmm.set_tracker(Tracker::Hooks(Box::new(log))).unwrap();
            clone.mock.vmm.set_guest(guest);
            let job = clone.mock.vmm.start_restore(&image, &cloning()).unwrap();
            completes(&clone.mock, job);
            clone
        })
        .collect();
    for clone in clones {
        let before = clone.sweeps();
        assert!(before >= at_least, "{before}");
        wait_until("two sweeps of the clone", PATIENCE, || clone.sweeps() >= before + 2).unwrap();
        let destination = KvmSide::over(MockSide::new(layouts()));
        destination.mock.vmm.set_guest(destination.guest());
        let [job, _] = clone.mock.start_move(&destination.mock, &passes());
        completes(&clone.mock, job);
        let stopped = check_consistent(clone.counters()).unwrap();
        wait_until("two sweeps at the destination", PATIENCE, || {
            destination.sweeps() >= stopped.sweeps + 2
        })
        .unwrap();
        destination.mock.vmm.stop().unwrap();
        check_consistent(destination.counters()).unwrap();
        assert_eq!(check_consistent(clone.counters()).unwrap(), stopped, "it is paused");
    }
}
