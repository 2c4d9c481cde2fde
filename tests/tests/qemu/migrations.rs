// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations between unmodified QEMUs, with busy guests.

use crate::busy::{MIB, Stage, goes_on_well};
use pageferry_tests::linux_guest::{AttachedGuest, Difference, LinuxGuest, QemuVersion};
use pageferry_tests::require;
use serde_json::{Value, json};

/// The options of a precopy that ends, whatever the guest writes.
const PRECOPY: &[&str] = &["--max-passes", "4", "--policy", "stop"];
/// One that does not end as a precopy.
const HYBRID: &[&str] = &["--mode", "hybrid", "--switch-after", "1", "--downtime-limit", "1ms"];
const POSTCOPY: &[&str] = &["--mode", "postcopy"];

/// Moves a guest to a new QEMU. Returns it, and how the job ended.
fn migrate(
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
fn migrate_and_compare(
    stage: &Stage, name: &str, guest: &LinuxGuest, source: &mut AttachedGuest, options: &[&str],
) -> AttachedGuest {
    let memory = source.memory().unwrap();
    let options = [options, &["--resume", "never"]].concat();
    let (mut destination, job) = migrate(stage, name, guest, source, &options);
    assert_eq!(destination.run_state().unwrap(), "paused", "{job}");
    let there = destination.memory().unwrap();
    let found = memory.compare(&there).unwrap();
    eprintln!("{name}: {found:?}, allocated {:?} and {:?}", memory.allocated(), there.allocated());
    assert_eq!(found, Difference::default(), "{job}");
    destination.qmp.execute("cont", json!({})).unwrap();
    destination
}

#[test]
fn busy_guest_moves_in_every_mode() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = stage.guest(512 * MIB);
    let mut here = stage.place().boot("a", &guest).unwrap();
    here.qmp.balloon(384 * MIB).unwrap();
    here.qmp.wait_for_balloon(384 * MIB).unwrap();
    let mut moment = stage.start(&mut here.console);

    for (name, options) in [("b", PRECOPY), ("c", HYBRID), ("d", POSTCOPY)] {
        let (mut there, job) = migrate(&stage, name, &guest, &mut here, options);
        eprintln!("{name}: {job}");
        moment = goes_on_well(&mut there, &moment);
        here = there;
    }
    for (name, options) in [("e", PRECOPY), ("f", POSTCOPY)] {
        let mut there = migrate_and_compare(&stage, name, &guest, &mut here, options);
        moment = goes_on_well(&mut there, &moment);
        here = there;
    }
    here.console.command("stop").unwrap();
    here.verify().unwrap();
}
