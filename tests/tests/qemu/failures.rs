// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processes that are killed in each phase of a migration, before the guest has moved: the source
//! goes on.

use crate::busy::{MIB, Moment, Stage, goes_on_well};
use crate::moves::{PRECOPY, migrate};
use pageferry_tests::linux_guest::operator::{Running, wait_slowly};
use pageferry_tests::linux_guest::{AttachedGuest, LinuxGuest, QemuVersion};
use pageferry_tests::{process, require};
use serde_json::json;

struct Scene {
    stage: Stage,
    guest: LinuxGuest,
    here: AttachedGuest,
    moment: Moment,
}

impl Scene {
    fn new(version: QemuVersion) -> Option<Self> {
        let stage = Stage::new(require::qemu()?, version);
        let guest = stage.guest(256 * MIB);
        let mut here = stage.place().boot("source", &guest).unwrap();
        let moment = stage.start(&guest, &mut here.console);
        Some(Self { stage, guest, here, moment })
    }

    /// A migration that takes minutes, and is in its first pass.
    fn slow_migration(&self, name: &str) -> (AttachedGuest, Running) {
        let there = self.stage.place().receive(name, &self.guest).unwrap();
        let to = ["--to", there.address.as_deref().unwrap(), "--bandwidth", "1M"];
        let mut job = self.here.agent.start("migrate", &to).unwrap();
        job.wait_for_pages_sent(100).unwrap();
        (there, job)
    }

    /// A migration that waits for the destination's QEMU, which has stopped. The source is paused,
    /// and its state was saved.
    fn waiting_migration(&self, name: &str) -> (AttachedGuest, Running) {
        let there = self.stage.place().receive(name, &self.guest).unwrap();
        process::freeze(there.qemu.pid()).unwrap();
        let to = ["--to", there.address.as_deref().unwrap()];
        let mut job = self.here.agent.start("migrate", &[&to, PRECOPY].concat()).unwrap();
        job.wait_for_phase("loading").unwrap();
        (there, job)
    }

    /// The guest runs at its source.
    fn goes_on(&mut self) {
        self.here.wait_for_run_state("running").unwrap();
        self.moment = goes_on_well(&mut self.here, &self.moment);
    }

    /// The guest can still move.
    fn moves(mut self) {
        let (mut there, _) = migrate(&self.stage, "last", &self.guest, &mut self.here, PRECOPY);
        goes_on_well(&mut there, &self.moment);
    }
}

#[test]
fn source_goes_on_when_the_passes_end_early() {
    let Some(mut scene) = Scene::new(QemuVersion::V10_0) else { return };

    let (mut there, job) = scene.slow_migration("cancelled");
    scene.here.agent.run("cancel", &[]).unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("cancelled"), "{said}");
    assert!(!there.side_car.wait().unwrap().success(), "a destination without a guest succeeds");
    scene.goes_on();

    let (mut there, job) = scene.slow_migration("qemu-killed");
    there.qemu.kill().unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("the guest is here"), "{said}");
    assert!(!there.side_car.wait().unwrap().success());
    scene.goes_on();

    let (there, job) = scene.slow_migration("agent-killed");
    let agent = scene.here.agent_process().unwrap();
    agent.kill().unwrap();
    job.fail().unwrap();
    let next = scene.here.agent.wait_for_status("the next agent", |status| {
        !status["agent"]["blocks"].as_array().is_none_or(Vec::is_empty)
    });
    assert_ne!(next.unwrap()["agent"]["pid"], agent.pid());
    scene.goes_on();
    drop(there);
    scene.moves();
}

/// True if there is a RARP packet to all (RFC 903) in these captured packets.
fn has_announcement(packets: &[u8]) -> bool {
    packets.windows(14).any(|header| header[..6] == [0xff; 6] && header[12..] == [0x80, 0x35])
}

#[test]
fn source_goes_on_after_its_state_was_saved() {
    let Some(mut scene) = Scene::new(QemuVersion::V11_1) else { return };

    let network = scene.stage.file("network");
    let dump =
        json!({ "qom-type": "filter-dump", "id": "dump0", "netdev": "net0", "file": network });
    scene.here.qmp.execute("object-add", dump).unwrap();
    let (mut there, job) = scene.waiting_migration("qemu-killed");
    assert_eq!(scene.here.run_state().unwrap(), "postmigrate");
    there.qemu.kill().unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("the guest is here"), "{said}");
    assert!(!there.side_car.wait().unwrap().success());
    scene.goes_on();
    // The destination has told the switches that the card is there.
    let is_announced = || Ok(has_announcement(&std::fs::read(&network).unwrap()));
    wait_slowly("an announcement of the card", is_announced).unwrap();

    let (there, job) = scene.waiting_migration("agent-killed");
    there.agent_process().unwrap().kill().unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("the guest is here"), "{said}");
    scene.goes_on();
    drop(there);

    let (there, job) = scene.waiting_migration("side-car-killed");
    there.side_car.kill().unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("the guest is here"), "{said}");
    scene.goes_on();
    drop(there);
    scene.moves();
}

/// The side-car learns of it in several ways, and ends.
#[test]
fn failed_job_promises_no_guest_whose_qemu_has_ended() {
    let Some(scene) = Scene::new(QemuVersion::V11_1) else { return };
    let image = scene.stage.file("image");
    let slow = [&image, "--mode", "paused", "--bandwidth", "1M"];
    let mut job = scene.here.agent.start("snapshot", &slow).unwrap();
    job.wait_for_phase("saving").unwrap();
    scene.here.qemu.kill().unwrap();
    let said = job.fail().unwrap();
    assert!(!said.contains("as it was"), "{said}");
}

#[test]
fn guest_outlives_its_side_car() {
    let Some(mut scene) = Scene::new(QemuVersion::V10_0) else { return };
    let (there, job) = scene.slow_migration("first");
    let agent = scene.here.agent_process().unwrap();
    scene.here.side_car.kill().unwrap();
    job.fail().unwrap();
    agent.wait_for_end().unwrap();
    scene.goes_on();
    drop(there);

    scene.here.attach().unwrap();
    scene.goes_on();
    let stage = &scene.stage;
    let mut there = stage.place().receive("second", &scene.guest).unwrap();
    let to = ["--to", there.address.as_deref().unwrap()];
    let job = scene.here.agent.run("migrate", &[&to, PRECOPY].concat()).unwrap();
    assert_eq!(job["status"], "completed");
    // It has not started this QEMU, so it does not end it.
    assert!(scene.here.side_car.wait().unwrap().success());
    wait_slowly("a paused source", || Ok(scene.here.run_state()? == "postmigrate")).unwrap();
    goes_on_well(&mut there, &scene.moment);
}
