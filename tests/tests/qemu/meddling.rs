// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A user who commands QEMU by a monitor of his own while a job runs, and settings of his that a
//! job meets.

use crate::busy::{MIB, Stage, goes_on_well};
use crate::moves::PRECOPY;
use pageferry_tests::linux_guest::operator::wait_slowly;
use pageferry_tests::linux_guest::{LinuxGuest, QemuVersion, Qmp};
use pageferry_tests::require;
use serde_json::{Value, json};

/// True if QEMU's migration settings are those of a user who has set nothing.
fn are_settings_untouched(qmp: &mut Qmp) -> bool {
    let capabilities = qmp.execute("query-migrate-capabilities", json!({})).unwrap();
    let is_on = |name: &str| {
        let all = capabilities.as_array().unwrap();
        all.iter().any(|one| one["capability"] == name && one["state"] == true)
    };
    let parameters = qmp.execute("query-migrate-parameters", json!({})).unwrap();
    !is_on("x-ignore-shared")
        && !is_on("pause-before-switchover")
        && parameters["max-bandwidth"] == 128 * MIB
}

/// The source must not give up a guest that has run since its state was saved, and the destination
/// must not run one that was not given up.
#[test]
fn guest_that_someone_resumes_stays_in_one_place() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V11_1);
    let guest = stage.guest(256 * MIB);
    let mut here = stage.place().boot("source", &guest).unwrap();
    let moment = stage.start(&guest, &mut here.console);

    let there = stage.place().receive("refused", &guest).unwrap();
    let to = ["--to", there.address.as_deref().unwrap(), "--bandwidth", "8M"];
    let slow = [&to[..], &["--max-passes", "1", "--policy", "stop"]].concat();
    let mut job = here.agent.start("migrate", &slow).unwrap();
    job.wait_for_phase("stopping").unwrap();
    wait_slowly("a pause", || Ok(here.run_state()? == "postmigrate")).unwrap();
    here.qmp.execute("cont", json!({})).unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("someone has resumed the guest"), "{said}");
    let moment = goes_on_well(&mut here, &moment);
    assert!(are_settings_untouched(&mut here.qmp));
    drop(there);

    let image = stage.file("image");
    let slow = [&image, "--mode", "paused", "--bandwidth", "8M"];
    let mut job = here.agent.start("snapshot", &slow).unwrap();
    job.wait_for_phase("saving").unwrap();
    here.qmp.execute("cont", json!({})).unwrap();
    let said = job.fail().unwrap();
    assert!(said.contains("someone has resumed the guest"), "{said}");
    assert!(!std::path::Path::new(&image).exists(), "an image of a guest that ran");

    // QEMU keeps this in mind until the guest is there.
    let mut there = stage.place().receive("destination", &guest).unwrap();
    there.qmp.execute("cont", json!({})).unwrap();
    let to = ["--to", there.address.as_deref().unwrap()];
    let never = [&to, PRECOPY, &["--resume", "never"]].concat();
    here.agent.run("migrate", &never).unwrap();
    assert_eq!(there.run_state().unwrap(), "paused");
    there.agent.run("resume", &[]).unwrap();
    goes_on_well(&mut there, &moment);
}

/// QEMU lives, and its connection to the side-car ends: in a pause, and while no job runs.
#[test]
fn guest_goes_on_when_the_monitor_breaks() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V11_1);
    let guest = LinuxGuest::new(256 * MIB);
    let mut here = stage.place().boot("source", &guest).unwrap();
    let moment = stage.start(&guest, &mut here.console);
    let image = stage.file("image");
    let slow = [&image, "--mode", "paused", "--bandwidth", "8M"];
    let mut job = here.agent.start("snapshot", &slow).unwrap();
    job.wait_for_phase("saving").unwrap();
    here.break_monitor().unwrap();
    here.agent.run("set", &["--bandwidth", "0"]).unwrap();
    assert_eq!(job.end().unwrap()["status"], "completed");
    let moment = goes_on_well(&mut here, &moment);
    assert!(are_settings_untouched(&mut here.qmp));

    here.break_monitor().unwrap();
    let image = stage.file("next");
    here.agent.run("snapshot", &[&image, "--mode", "paused"]).unwrap();
    goes_on_well(&mut here, &moment);
}

#[test]
fn settings_of_the_user_hinder_no_job_and_come_back() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = LinuxGuest::new(256 * MIB);
    let mut here = stage.place().boot("source", &guest).unwrap();
    let moment = stage.start(&guest, &mut here.console);
    let tls = json!({ "qom-type": "tls-creds-anon", "id": "t0", "endpoint": "client" });
    here.qmp.execute("object-add", tls).unwrap();
    here.qmp.execute("migrate-set-parameters", json!({ "tls-creds": "t0" })).unwrap();
    let image = stage.file("image");
    here.agent.run("snapshot", &[&image, "--mode", "paused"]).unwrap();
    let tls = |qmp: &mut Qmp| -> Value {
        qmp.execute("query-migrate-parameters", json!({})).unwrap()["tls-creds"].clone()
    };
    assert_eq!(tls(&mut here.qmp), "t0");
    let moment = goes_on_well(&mut here, &moment);

    // The side-car dies while it has the guest paused: its guard puts all in order.
    let image = stage.file("slow");
    let slow = [&image, "--mode", "paused", "--bandwidth", "8M"];
    let mut job = here.agent.start("snapshot", &slow).unwrap();
    job.wait_for_phase("saving").unwrap();
    here.side_car.kill().unwrap();
    job.fail().unwrap();
    here.wait_for_run_state("running").unwrap();
    let is_back = || Ok(are_settings_untouched(&mut here.qmp) && tls(&mut here.qmp) == "t0");
    wait_slowly("the settings of before", is_back).unwrap();
    here.attach().unwrap();
    let mut there = stage.place().receive("destination", &guest).unwrap();
    let to = ["--to", there.address.as_deref().unwrap()];
    here.agent.run("migrate", &[&to, PRECOPY].concat()).unwrap();
    goes_on_well(&mut there, &moment);
}
