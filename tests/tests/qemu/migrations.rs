// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations between unmodified QEMUs, with busy guests.

use crate::busy::{MIB, Stage, goes_on_well};
use crate::moves::{
    FREED_AT_LAST, HYBRID, POSTCOPY, PRECOPY, migrate, migrate_and_compare, proceed,
};
use pageferry_tests::linux_guest::operator::wait_slowly;
use pageferry_tests::linux_guest::{QemuVersion, Status, VirtioMem};
use pageferry_tests::proxy::Proxy;
use pageferry_tests::require;
use serde_json::json;

/// Name of the variable with the number of moves of a guest, for a long run.
const MOVES: &str = "PAGEFERRY_QEMU_MOVES";

/// How often a guest moves.
fn moves(by_default: usize) -> usize {
    std::env::var(MOVES).map_or(by_default, |count| count.parse().unwrap())
}

#[test]
fn busy_guest_of_an_old_qemu_moves_in_every_mode() {
    moves_again_and_again(QemuVersion::V10_0, 5);
}

#[test]
fn busy_guest_of_a_new_qemu_moves_there_and_back() {
    moves_again_and_again(QemuVersion::V11_1, 2);
}

fn moves_again_and_again(version: QemuVersion, moves_by_default: usize) {
    let Some(tools) = crate::soak() else { return };
    let stage = Stage::new(tools, version);
    let guest = stage.guest(512 * MIB);
    let mut here = stage.place().boot("first", &guest).unwrap();
    here.qmp.balloon(384 * MIB).unwrap();
    here.qmp.wait_for_balloon(384 * MIB).unwrap();
    let mut moment = stage.start(&guest, &mut here.console);

    let modes = [HYBRID, POSTCOPY, PRECOPY].into_iter().cycle();
    for (number, mode) in modes.take(moves(moves_by_default)).enumerate() {
        let name = format!("move-{number}");
        // In a postcopy that is compared no page is fetched for the guest, since it is paused.
        here = match number % 5 {
            2..=4 => migrate_and_compare(&stage, &name, &guest, &mut here, mode),
            _ => migrate(&stage, &name, &guest, &mut here, mode).0,
        };
        moment = goes_on_well(&mut here, &moment);
    }
    here.console.command("stop").unwrap();
    here.verify().unwrap();
}

#[test]
fn guest_with_memory_above_the_hole_moves() {
    let Some(tools) = crate::soak() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let mut guest = stage.guest(4096 * MIB);
    (guest.machine, guest.vcpus, guest.balloon) = ("q35".to_owned(), 2, false);
    let mut here = stage.place().boot("source", &guest).unwrap();
    let blocks = here.agent.status().unwrap()["agent"]["blocks"].clone();
    assert_eq!(blocks.as_array().unwrap().len(), 2, "{blocks}");
    assert!(blocks[1]["gpa"].as_u64().unwrap() >= 4096 * MIB, "{blocks}");
    let moment = stage.start(&guest, &mut here.console);
    let mut there = migrate_and_compare(&stage, "destination", &guest, &mut here, HYBRID);
    goes_on_well(&mut there, &moment);
}

/// The kernel writes to the pages of a direct read after they were looked at.
#[test]
fn guest_with_a_direct_disk_moves_without_passes() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V11_1);
    let mut guest = stage.guest(256 * MIB);
    guest.is_disk_direct = true;
    let mut here = stage.place().boot("source", &guest).unwrap();
    let moment = stage.start(&guest, &mut here.console);
    let there = stage.place().receive("refused", &guest).unwrap();
    let to = ["--to", there.address.as_deref().unwrap()];
    let said = here.agent.start("migrate", &to).unwrap().fail().unwrap();
    assert!(said.contains("disk disk0 bypasses the page cache"), "{said}");
    assert!(said.contains("--mode postcopy"), "{said}");
    let moment = goes_on_well(&mut here, &moment);
    drop(there);
    let (mut there, _) = migrate(&stage, "destination", &guest, &mut here, POSTCOPY);
    goes_on_well(&mut there, &moment);
}

#[test]
fn memory_is_plugged_and_unplugged_while_the_guest_moves() {
    let Some(tools) = crate::soak() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let mut guest = stage.guest(256 * MIB);
    guest.virtio_mem = Some(VirtioMem { size: 256 * MIB, requested: 0, backend: None });
    let mut here = stage.place().boot("source", &guest).unwrap();
    let total = here.console.status().unwrap().total;
    let moment = stage.start(&guest, &mut here.console);
    let request = |size: u64| {
        let path = "/machine/peripheral/vm0";
        json!({ "path": path, "property": "requested-size", "value": size })
    };

    let memory = here.memory().unwrap();
    let there = stage.place().receive("destination", &guest).unwrap();
    let to = ["--to", there.address.as_deref().unwrap(), "--bandwidth", "32M", "--max-passes", "0"];
    let never = [&to[..], &["--resume", "never"]].concat();
    let mut job = here.agent.start("migrate", &never).unwrap();
    job.wait_for_pages_sent(1000).unwrap();
    here.qmp.execute("qom-set", request(256 * MIB)).unwrap();
    let plugged = |now: &Status| now.total >= total + 256 * MIB;
    here.console.wait_for_status("plugged memory", plugged).unwrap();
    // The memory of this task is movable, so it begins in what was plugged in.
    here.console.command("stop churn").unwrap();
    here.console.command("churn 64M 0").unwrap();
    let busy = here.console.status().unwrap();
    here.console.wait_for_status("its use", |now| now.churn > busy.churn).unwrap();
    here.qmp.execute("qom-set", request(128 * MIB)).unwrap();
    let smaller = |now: &Status| now.total <= total + 128 * MIB;
    here.console.wait_for_status("unplugged memory", smaller).unwrap();
    assert_eq!(here.agent.status().unwrap()["status"], "passes", "the job has ended before");
    let fast = ["--bandwidth", "0", "--max-passes", "1", "--policy", "stop"];
    here.agent.run("set", &fast).unwrap();
    let job = job.end().unwrap();

    assert_eq!(job["status"], "completed");
    let (mut there, found) = proceed(there, &memory);
    assert_eq!((found.lost, found.changed), (0, 0));
    assert!(found.populated_holes <= FREED_AT_LAST, "{found:?} {job}");
    goes_on_well(&mut there, &moment);
    there.qmp.execute("qom-set", request(0)).unwrap();
    let same = |now: &Status| now.total == total;
    there.console.wait_for_status("no plugged memory", same).unwrap();
    there.verify().unwrap();
}

#[test]
fn postcopy_that_was_cut_is_recovered() {
    let Some(tools) = crate::soak() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = stage.guest(256 * MIB);
    let mut here = stage.place().boot("source", &guest).unwrap();
    let moment = stage.start(&guest, &mut here.console);
    let mut there = stage.place().receive("destination", &guest).unwrap();
    let proxy = Proxy::to(there.address.as_deref().unwrap()).unwrap();
    let slow = ["--to", proxy.address(), "--bandwidth", "4M", "--no-wait"];
    let mut job = here.agent.start("migrate", &[&slow, POSTCOPY].concat()).unwrap();
    job.wait_for_phase("postcopy").unwrap();
    there.wait_for_run_state("running").unwrap();
    proxy.cut();
    let (code, _, said) = job.outcome().unwrap();
    assert_eq!(code, 3, "{said}");
    there.agent.wait_for_phase("postcopy-paused").unwrap();

    let recovered = here.agent.start("recover", &[]).unwrap();
    wait_slowly("the recovery", || Ok(here.agent.status()?["status"] != "postcopy-paused"))
        .unwrap();
    here.agent.run("set", &["--bandwidth", "0"]).unwrap();
    assert_eq!(recovered.end().unwrap()["status"], "completed");
    assert!(here.side_car.wait().unwrap().success());
    goes_on_well(&mut there, &moment);
}
