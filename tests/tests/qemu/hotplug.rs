// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is plugged in and out while a QEMU is attached.

use crate::busy::{MIB, Stage, goes_on_well};
use crate::moves::{PRECOPY, migrate_and_compare};
use pageferry_tests::linux_guest::{AttachedGuest, GuestMemory, QemuVersion};
use serde_json::json;

fn wait_for_blocks(guest: &AttachedGuest, count: usize) {
    let what = format!("{count} blocks");
    let has = |status: &serde_json::Value| {
        status["agent"]["blocks"].as_array().is_some_and(|blocks| blocks.len() == count)
    };
    guest.agent.wait_for_status(&what, has).unwrap();
}

#[test]
fn plugged_memory_is_served_until_it_is_unplugged() {
    let Some(tools) = crate::soak() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let mut guest = stage.guest(256 * MIB);
    guest.memory = GuestMemory::LeftOut;
    guest.more = ["-m", "256M,slots=2,maxmem=1G"].map(Into::into).into();
    let mut here = stage.place().boot("source", &guest).unwrap();
    let total = here.console.status().unwrap().total;
    wait_for_blocks(&here, 1);

    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let backend = json!({
        "qom-type": "memory-backend-file", "id": "dimm", "size": 128 * MIB, "share": true,
        "mem-path": memory.path(),
    });
    here.qmp.execute("object-add", backend).unwrap();
    let device = json!({ "driver": "pc-dimm", "id": "slot", "memdev": "dimm" });
    here.qmp.execute("device_add", device).unwrap();
    wait_for_blocks(&here, 2);
    let larger = |now: &pageferry_tests::linux_guest::Status| now.total >= total + 128 * MIB;
    here.console.wait_for_status("plugged memory", larger).unwrap();
    let moment = stage.start(&guest, &mut here.console);

    let mut same = guest.clone();
    same.more.extend(
        [
            "-object",
            "memory-backend-ram,id=dimm,size=128M",
            "-device",
            "pc-dimm,id=slot,memdev=dimm",
        ]
        .map(Into::into),
    );
    let mut there = stage.place().receive("destination", &same).unwrap();
    let to = ["--to", there.address.as_deref().unwrap()];
    let job = here.agent.run("migrate", &[&to, PRECOPY].concat()).unwrap();
    assert_eq!(job["status"], "completed");
    let moment = goes_on_well(&mut there, &moment);

    there.qmp.execute("device_del", json!({ "id": "slot" })).unwrap();
    there.qmp.wait_for_event("DEVICE_DELETED").unwrap();
    there.qmp.execute("object-del", json!({ "id": "dimm" })).unwrap();
    wait_for_blocks(&there, 1);
    let moment = goes_on_well(&mut there, &moment);
    let mut last = migrate_and_compare(&stage, "last", &guest, &mut there, PRECOPY);
    goes_on_well(&mut last, &moment);
}
