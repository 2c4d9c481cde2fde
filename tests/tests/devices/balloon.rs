// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon, with Linux's driver.

use crate::stage::{Device, MIB, Stage};
use pageferry_client::{Client, Config, Target};
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::files::Still;
use pageferry_tests::linux_guest::console::PATIENCE;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use serde_json::Value;

const BALLOON: Device = Device {
    options: &["--balloon"],
    front_end: "virtio-id=5,num_vqs=5,vq_size=128,config_size=16",
    pluggable: 0,
};

fn balloon(stage: &Stage, more: &[&str]) -> Value {
    stage.operator.run("balloon", more).unwrap()
}

fn wait_for_balloon(stage: &Stage, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, PATIENCE, || Some(balloon(stage, &[])).filter(&holds)).unwrap()
}

#[test]
fn linux_gives_memory_back_and_takes_it_again() {
    let Some(tools) = require::qemu() else { return };
    let mut stage = Stage::boot(&tools, &BALLOON, 256 * MIB, &[]);
    wait_for_balloon(&stage, "a driver", |now| now["driver"] == true);

    // Free page reporting: what a task has used goes back to the host.
    stage.guest.console.command("check 64M").unwrap();
    stage.guest.console.wait_for_status("used memory", |now| now.check > 0).unwrap();
    let used = stage.allocated();
    stage.guest.console.command("stop check").unwrap();
    // Linux reports blocks of 4 MiB, and some stay in use.
    let is_given_back = || stage.allocated() + 32 * MIB < used;
    wait_until("free page reporting", PATIENCE, is_given_back).unwrap();

    // Inflation and deflation.
    let total = stage.guest.console.status().unwrap().total;
    balloon(&stage, &["64M"]);
    let full = wait_for_balloon(&stage, "a full balloon", |now| now["actual"] == 64 * MIB);
    assert_eq!(full["outside"], 0);
    assert!(full["freed"].as_u64().unwrap() >= 100 * MIB, "{full}");
    let free = |stats: &Value| stats["stats"]["free_memory"].as_u64().unwrap();
    let free_then = free(&balloon(&stage, &["--stats"]));
    balloon(&stage, &["0"]);
    wait_for_balloon(&stage, "an empty balloon", |now| now["actual"] == 0);

    // Statistics.
    let stats = balloon(&stage, &["--stats"])["stats"].clone();
    assert_eq!(stats["total_memory"], total, "{stats}");
    let free_now = free(&balloon(&stage, &["--stats"]));
    assert!(free_now >= free_then + 60 * MIB, "{free_then} {free_now}");

    // Free page hinting, at the start of a migration of the agent's. QEMU stays where it is.
    ask_for_hints(&stage);

    // The guest goes on without the agent, and without its device. This QEMU cannot connect the
    // device again, and it ends with an assertion if the guest reads the configuration of a device
    // that is gone (`vhost_dev_get_config`). So the guest first does what the end of the hints has
    // given it to do. The next agent has the memory.
    stage.guest.console.command("check 32M").unwrap();
    let checks = |stage: &mut Stage, count: u64| {
        let checked = stage.guest.console.status().unwrap().check;
        stage.guest.console.wait_for_status("checks", |now| now.check > checked + count).unwrap();
    };
    balloon(&stage, &["4M"]);
    wait_for_balloon(&stage, "a balloon", |now| now["actual"] == 4 * MIB);
    balloon(&stage, &["0"]);
    wait_for_balloon(&stage, "no balloon", |now| now["actual"] == 0);
    // Its kernel works on one thing after the other.
    balloon(&stage, &["--stats"]);
    checks(&mut stage, 3);
    stage.replace_agent(&BALLOON);
    checks(&mut stage, 1);
    assert_eq!(balloon(&stage, &[])["driver"], false);
    stage.guest.verify().unwrap();
}

/// Has the agent send the memory to another one, and cancels that when the guest has said what is
/// free.
fn ask_for_hints(stage: &Stage) {
    let folder = tempfile::tempdir().unwrap();
    let agent = AgentProcess::spawn(program(), folder.path(), "destination").unwrap();
    let size = stage.memory.metadata().unwrap().len();
    let (client, channel) = Client::connect(agent.socket(), Config::default()).unwrap();
    let memory = tempfile::tempfile_in("/dev/shm").unwrap();
    memory.set_len(size).unwrap();
    Still::hand_over(&client, channel, &memory, size).unwrap();
    let address = format!("unix:{}", folder.path().join("stream").display());
    client.start_incoming(Target::Address(address.clone()), &Default::default()).unwrap();
    // Slow enough for a driver under TCG to answer.
    let slow = ["--to", &address, "--bandwidth", "8M", "--max-passes", "0"];
    let job = stage.operator.start("migrate", &slow).unwrap();
    wait_for_balloon(stage, "hints", |now| now["hinted"].as_u64().unwrap() > 32 * MIB);
    stage.operator.run("cancel", &[]).unwrap();
    job.fail().unwrap();
}
