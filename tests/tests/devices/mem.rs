// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-mem, with Linux's driver.

use crate::stage::{Device, MIB, PLUGGABLE, PLUGGABLE_NAME, Stage, allocated};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::linux_guest::Status;
use pageferry_tests::linux_guest::console::PATIENCE;
use pageferry_tests::require;
use serde_json::{Value, json};

const MEM: Device = Device {
    options: &["--mem", "--mem-block", PLUGGABLE_NAME],
    front_end: "virtio-id=24,num_vqs=1,vq_size=128,config_size=56",
    pluggable: 512 * MIB,
};

fn mem(stage: &Stage, more: &[&str]) -> Value {
    stage.operator.run("mem", more).unwrap()
}

fn wait_for_mem(stage: &Stage, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let found = wait_for(what, PATIENCE, || {
        last = mem(stage, &[]);
        Some(last.clone()).filter(&holds)
    });
    found.unwrap_or_else(|error| panic!("{error}: {last}"))
}

#[test]
fn linux_plugs_memory_and_gives_it_back() {
    let Some(tools) = require::qemu() else { return };
    let mut stage = Stage::boot(&tools, &MEM, 256 * MIB, &[]);
    let total = stage.guest.console.status().unwrap().total;
    let empty = wait_for_mem(&stage, "a driver", |now| now["driver"] == true);
    assert_eq!((&empty["addr"], &empty["plugged"]), (&json!(PLUGGABLE), &json!(0)), "{empty}");

    mem(&stage, &["--requested", "384M"]);
    wait_for_mem(&stage, "plugged memory", |now| now["plugged"] == 384 * MIB);
    let plugged = |status: &Status| status.total >= total + 380 * MIB;
    stage.guest.console.wait_for_status("its memory", plugged).unwrap();
    stage.guest.console.command("check 300M").unwrap();
    stage.guest.console.wait_for_status("use of it", |now| now.check > 0).unwrap();
    let used = allocated(&stage.pluggable);
    assert!(used > 64 * MIB, "{used}");

    stage.guest.console.command("stop check").unwrap();
    mem(&stage, &["--requested", "128M"]);
    wait_for_mem(&stage, "unplugged memory", |now| now["plugged"] == 128 * MIB);
    assert!(allocated(&stage.pluggable) <= 128 * MIB);
    mem(&stage, &["--requested", "0"]);
    wait_for_mem(&stage, "all unplugged", |now| now["plugged"] == 0);
    assert_eq!(allocated(&stage.pluggable), 0);
    stage.guest.verify().unwrap();

    // A reset keeps what is plugged. After it, Linux has all unplugged, and then plugs what is
    // requested. It hears of a change from before its driver is there.
    mem(&stage, &["--requested", "64M"]);
    wait_for_mem(&stage, "plugged memory", |now| now["plugged"] == 64 * MIB);
    stage.guest.qmp.execute("set-action", json!({ "reboot": "reset" })).unwrap();
    stage.guest.qmp.execute("stop", json!({})).unwrap();
    stage.guest.qmp.execute("system_reset", json!({})).unwrap();
    mem(&stage, &["--requested", "32M"]);
    assert_eq!(mem(&stage, &[])["plugged"], 64 * MIB);
    stage.guest.qmp.execute("cont", json!({})).unwrap();
    stage.guest.wait_until_ready().unwrap();
    wait_for_mem(&stage, "what is requested now", |now| now["plugged"] == 32 * MIB);
    let is_back = |status: &Status| status.total >= total + 30 * MIB;
    stage.guest.console.wait_for_status("its memory again", is_back).unwrap();
    let refused = stage.operator.run("mem", &["--requested", "3M"]).unwrap_err().to_string();
    assert!(refused.contains("requested_size is 3 MiB"), "{refused}");
}
