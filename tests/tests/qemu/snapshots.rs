// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots of Linux guests, and guests that are restored from them.
//!
//! An image has no disk, so these guests have none, except one whose disk is saved beside it.

use crate::busy::{MIB, Stage, goes_on_well};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::linux_guest::console::PATIENCE;
use pageferry_tests::linux_guest::{AttachedGuest, LinuxGuest, Operator, QemuVersion};
use pageferry_tests::require;
use serde_json::json;

/// A new QEMU with the guest of an image.
fn restore(
    stage: &Stage, name: &str, guest: &LinuxGuest, image: &str, options: &[&str],
) -> AttachedGuest {
    let restored = stage.place().receive_image(name, guest).unwrap();
    let job = restored.agent.run("restore", &[&[image], options].concat()).unwrap();
    assert_eq!(job["status"], "completed");
    restored
}

#[test]
fn guest_that_runs_is_saved_and_restored() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let mut guest = LinuxGuest::new(256 * MIB);
    guest.balloon = false;
    let mut running = stage.place().boot("first", &guest).unwrap();
    let moment = stage.start(&guest, &mut running.console);
    let [background, full, increment] =
        ["background", "full", "increment"].map(|name| stage.file(name));
    let save = |agent: &Operator, image: &str, options: &[&str]| {
        let saved = agent.run("snapshot", &[&[image], options].concat()).unwrap();
        assert_eq!(saved["status"], "completed");
        saved
    };
    let saved = save(&running.agent, &background, &[]);
    assert!(saved["copied_before_write_pages"].as_u64().unwrap() > 0, "{saved}");
    // Background snapshots take the tracker away, so increments come after paused ones.
    save(&running.agent, &full, &["--mode", "paused", "--track"]);
    let later = goes_on_well(&mut running, &moment);
    let saved = save(&running.agent, &increment, &["--mode", "paused", "--base", &full]);
    assert!(saved["unchanged_pages"].as_u64().unwrap() > 0, "{saved}");
    goes_on_well(&mut running, &later);
    drop(running);

    let mut eager = restore(&stage, "eager", &guest, &background, &[]);
    goes_on_well(&mut eager, &moment);
    drop(eager);
    let mut lazy = restore(&stage, "lazy", &guest, &increment, &["--lazy"]);
    goes_on_well(&mut lazy, &later);
}

/// As docs/qemu.md says under "Disks".
#[test]
fn guest_is_restored_with_the_disk_of_the_same_instant() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = stage.guest(256 * MIB);
    let mut running = stage.place().boot("first", &guest).unwrap();
    let moment = stage.start(&guest, &mut running.console);
    let [overlay, image] = ["overlay.qcow2", "image"].map(|name| stage.file(name));
    running.qmp.execute("stop", json!({})).unwrap();
    let disk = json!({ "device": "disk0", "snapshot-file": overlay, "format": "qcow2" });
    let actions = json!([{ "type": "blockdev-snapshot-sync", "data": disk }]);
    running.qmp.execute("transaction", json!({ "actions": actions })).unwrap();
    running.agent.run("snapshot", &[&image]).unwrap();
    // It was not resumed: QEMU's word for a guest that was saved.
    assert_eq!(running.run_state().unwrap(), "postmigrate");
    running.qmp.execute("cont", json!({})).unwrap();
    // It writes to its disk, which is the overlay now.
    goes_on_well(&mut running, &moment);
    drop(running);

    let mut restored = restore(&stage, "second", &guest, &image, &["--lazy"]);
    assert_eq!(restored.run_state().unwrap(), "paused", "as it was saved");
    restored.agent.run("resume", &[]).unwrap();
    goes_on_well(&mut restored, &moment);
}

#[test]
fn guest_that_gives_memory_back_is_saved_while_it_is_paused() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V11_1);
    let guest = LinuxGuest::new(256 * MIB);
    let mut running = stage.place().boot("first", &guest).unwrap();
    let moment = stage.start(&guest, &mut running.console);
    let image = stage.file("image");
    let saved = running.agent.run("snapshot", &[&image, "--mode", "paused"]).unwrap();
    assert_eq!(saved["status"], "completed");
    let allocated = running.memory().unwrap().allocated().unwrap();
    goes_on_well(&mut running, &moment);
    drop(running);
    let mut restored = restore(&stage, "second", &guest, &image, &["--lazy"]);
    let restored_memory = restored.memory().unwrap().allocated().unwrap();
    assert!(restored_memory < allocated + 32 * MIB, "{restored_memory} {allocated}");
    goes_on_well(&mut restored, &moment);
}

/// QEMU frees memory that the image still needs, and tells nobody.
#[test]
fn background_snapshot_fails_when_unsaved_memory_is_freed() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = LinuxGuest::new(256 * MIB);
    let mut running = stage.place().boot("first", &guest).unwrap();
    // One task alone: what it frees is in large blocks, which a guest reports.
    running.console.command("check 48M 600000").unwrap();
    running.console.wait_for_status("idle memory", |now| now.check > 0).unwrap();
    let image = stage.file("image");
    let mut job = running.agent.start("snapshot", &[&image, "--bandwidth", "1M"]).unwrap();
    job.wait_for_phase("saving").unwrap();
    let memory = running.memory().unwrap();
    let before = memory.allocated().unwrap();
    running.console.command("stop check").unwrap();
    let is_freed = || memory.allocated().unwrap() + 8 * MIB < before;
    wait_until("free page reporting", PATIENCE, is_freed).unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("the guest gave memory back while it was saved"), "{said}");
    let moment = stage.start(&guest, &mut running.console);
    goes_on_well(&mut running, &moment);
}
