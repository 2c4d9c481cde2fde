// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moves a guest from one QEMU to the next.

use crate::busy::Stage;
use pageferry_tests::linux_guest::{AttachedGuest, Difference, LinuxGuest, MemoryFiles};
use serde_json::{Value, json};

/// The options of a precopy that ends, whatever the guest writes.
pub const PRECOPY: &[&str] = &["--max-passes", "4", "--policy", "stop"];
/// One that does not end as a precopy.
pub const HYBRID: &[&str] = &["--mode", "hybrid", "--switch-after", "1", "--downtime-limit", "1ms"];
pub const POSTCOPY: &[&str] = &["--mode", "postcopy"];
/// The most pages that QEMU may free in the last pass and the pause. They keep room at the
/// destination.
pub const FREED_AT_LAST: u64 = 4096;

/// Moves a guest to a new QEMU. Returns it, and how the job ended.
pub fn migrate(
    stage: &Stage, name: &str, guest: &LinuxGuest, source: &mut AttachedGuest, options: &[&str],
) -> (AttachedGuest, Value) {
    let destination = stage.place().receive(name, guest).unwrap();
    let to = ["--to", destination.address.as_deref().unwrap()];
    let job = source.agent.run("migrate", &[&to, options].concat()).unwrap();
    assert_eq!(job["status"], "completed");
    // The side-car of a QEMU that it has started ends it, and then itself.
    source.qemu.wait_for_end().unwrap();
    assert!(source.side_car.wait().unwrap().success());
    (destination, job)
}

/// The same, and compares the memory of both ends while the guest is paused. Then it continues.
///
/// A guest must take no more room than before. One with a balloon frees memory until it is paused.
pub fn migrate_and_compare(
    stage: &Stage, name: &str, guest: &LinuxGuest, source: &mut AttachedGuest, options: &[&str],
) -> AttachedGuest {
    let memory = source.memory().unwrap();
    let options = [options, &["--resume", "never"]].concat();
    let (destination, job) = migrate(stage, name, guest, source, &options);
    let (destination, found) = proceed(destination, &memory);
    assert_eq!((found.lost, found.changed), (0, 0), "{job}");
    let limit = if guest.balloon { FREED_AT_LAST } else { 0 };
    assert!(found.populated_holes <= limit, "{found:?} {job}");
    destination
}

/// Compares the memory of both ends of a migration that has left the guest paused. Then it
/// continues.
pub fn proceed(
    mut destination: AttachedGuest, memory: &MemoryFiles,
) -> (AttachedGuest, Difference) {
    assert_eq!(destination.run_state().unwrap(), "paused");
    let there = destination.memory().unwrap();
    let found = memory.compare(&there).unwrap();
    destination.qmp.execute("cont", json!({})).unwrap();
    (destination, found)
}
