// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests themselves: what they can do, without an agent.

use pageferry_tests::deadline::wait_until;
use pageferry_tests::linux_guest::console::PATIENCE;
use pageferry_tests::linux_guest::{
    Echo, GuestMemory, LinuxGuest, QemuVersion, RunningGuest, Sockets, Status, VirtioMem,
};
use pageferry_tests::require;
use serde_json::json;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

const MIB: u64 = 1 << 20;

#[test]
fn guest_of_an_old_qemu_uses_and_frees_memory() {
    uses_and_frees_memory(QemuVersion::V10_0);
}

#[test]
fn guest_of_a_new_qemu_uses_and_frees_memory() {
    uses_and_frees_memory(QemuVersion::V11_1);
}

/// Memory, disk and network at once, while the balloon inflates and deflates and memory is plugged
/// and unplugged.
fn uses_and_frees_memory(version: QemuVersion) {
    let Some(tools) = require::qemu() else { return };
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(16 * MIB).unwrap();
    let echo = Echo::start().unwrap();
    let plug = VirtioMem { size: 256 * MIB, requested: 0, backend: None };
    let guest = LinuxGuest {
        disk: Some(disk.path().to_owned()),
        virtio_mem: Some(plug),
        ..LinuxGuest::new(256 * MIB)
    };

    let started = Instant::now();
    let mut running = RunningGuest::boot(&tools, version, &guest).unwrap();
    eprintln!("QEMU {version}: the guest answers after {:.1?}", started.elapsed());
    let console = &mut running.console;
    let first = console.status().unwrap();
    console.command("check 32M").unwrap();
    console.command("churn 32M 100").unwrap();
    console.command("write 1000 8M").unwrap();
    console.command("disk").unwrap();
    console.command(&format!("net {}", echo.port())).unwrap();
    console.command("tick").unwrap();
    let busy = console
        .wait_for_status("all tasks at work", |now| {
            now.check > 1 && now.churn > 1 && now.written > 1000 && now.disk > 1
        })
        .unwrap();
    assert!(busy.net_echoed > 0 && busy.monotonic > first.monotonic, "{busy:?}");

    running.qmp.balloon(192 * MIB).unwrap();
    running.qmp.wait_for_balloon(192 * MIB).unwrap();
    let small = running.console.status().unwrap();
    assert_eq!(small.total, first.total - 64 * MIB);
    running.qmp.balloon(256 * MIB).unwrap();
    running.qmp.wait_for_balloon(256 * MIB).unwrap();
    let same = |now: &Status| now.total == first.total;
    running.console.wait_for_status("a deflated balloon", same).unwrap();

    let request = |size: u64| json!({ "path": "/machine/peripheral/vm0", "property": "requested-size", "value": size });
    running.qmp.execute("qom-set", request(256 * MIB)).unwrap();
    let large = |now: &Status| now.total >= first.total + 256 * MIB;
    running.console.wait_for_status("plugged memory", large).unwrap();
    running.qmp.execute("qom-set", request(0)).unwrap();
    running.console.wait_for_status("unplugged memory", same).unwrap();

    let before = running.console.ticks().len();
    running.console.wait_for_ticks(before + 2).unwrap();
    running.console.command("stop").unwrap();
    running.verify().unwrap();
    assert!(running.console.bad().is_empty());
    running.power_off().unwrap();
}

#[test]
fn guest_goes_on_after_a_migration_of_an_old_qemu() {
    goes_on_after_a_migration(QemuVersion::V10_0);
}

#[test]
fn guest_goes_on_after_a_migration_of_a_new_qemu() {
    goes_on_after_a_migration(QemuVersion::V11_1);
}

/// QEMU's own migration. If a guest survives this one but not one by an agent, the agent is to
/// blame.
fn goes_on_after_a_migration(version: QemuVersion) {
    let Some(tools) = require::qemu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(4 * MIB).unwrap();
    let echo = Echo::start().unwrap();
    let guest = LinuxGuest { disk: Some(disk.path().to_owned()), ..LinuxGuest::new(192 * MIB) };
    let mut source = RunningGuest::boot(&tools, version, &guest).unwrap();
    for task in ["check 32M 200", "churn 16M 200", "disk", "tick"] {
        source.console.command(task).unwrap();
    }
    source.console.command(&format!("net {}", echo.port())).unwrap();
    source.console.wait_for_ticks(3).unwrap();

    let sockets = Sockets::new(folder.path(), "destination");
    sockets.create().unwrap();
    let guest = LinuxGuest { incoming: Some("defer".to_owned()), ..guest };
    let line = guest.command_line(&tools, version, &sockets);
    let mut destination = RunningGuest::start(&line, sockets).unwrap();
    let uri = json!({ "uri": format!("unix:{}", folder.path().join("stream").display()) });
    destination.qmp.execute("migrate-incoming", uri.clone()).unwrap();
    let before = source.console.status().unwrap();
    source.qmp.execute("migrate", uri).unwrap();
    destination.qmp.wait_for_event("RESUME").unwrap();
    drop(source);

    destination.console.wait_for_ticks(3).unwrap();
    let after = destination.console.wait_for_status("all tasks at work", |now| {
        now.check > before.check + 2
            && now.churn > before.churn + 2
            && now.disk > before.disk + 2
            && now.net_echoed > before.net_echoed
    });
    assert!(after.unwrap().monotonic > before.monotonic);
    destination.console.command("stop").unwrap();
    destination.verify().unwrap();
    destination.power_off().unwrap();
}

#[test]
fn guest_that_frees_memory_reports_it() {
    let Some(tools) = require::qemu() else { return };
    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = memory.path().display();
    let backend = format!("memory-backend-file,id=ram0,size=256M,mem-path={path},share=on");
    let guest = LinuxGuest { memory: GuestMemory::Backend(backend), ..LinuxGuest::new(256 * MIB) };
    let mut running = RunningGuest::boot(&tools, QemuVersion::V10_0, &guest).unwrap();
    // One task alone: two that first touch their memory at the same time get alternate pages, and
    // one of them then frees no block that is large enough to be reported.
    let used = || memory.as_file().metadata().unwrap().blocks() * 512;
    let before = used();
    running.console.command("check 64M").unwrap();
    running.console.wait_for_status("a generation", |now| now.check > 0).unwrap();
    let busy = used();
    assert!(busy > before + 16 * MIB, "{before} {busy}");
    running.console.command("stop check").unwrap();
    wait_until("free page reporting", PATIENCE, || used() + 32 * MIB < busy).unwrap();
    running.verify().unwrap();
}

/// What every other test with such a guest relies on.
#[test]
fn guest_reports_a_page_that_was_lost() {
    const PAGE: usize = 4096;
    let Some(tools) = require::qemu() else { return };
    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = memory.path().display();
    let backend = format!("memory-backend-file,id=ram0,size=192M,mem-path={path},share=on");
    let guest = LinuxGuest { memory: GuestMemory::Backend(backend), ..LinuxGuest::new(192 * MIB) };
    let mut running = RunningGuest::boot(&tools, QemuVersion::V10_0, &guest).unwrap();
    running.console.command("check 32M").unwrap();
    running.console.wait_for_status("a generation", |now| now.check > 0).unwrap();
    running.verify().unwrap();

    // A page of the workload begins with its number and its generation, and is not the remains of
    // an older process: there is none.
    running.qmp.execute("stop", json!({})).unwrap();
    let word =
        |page: &[u8], at: usize| u64::from_le_bytes(page[8 * at..8 * at + 8].try_into().unwrap());
    let mut page = [0; PAGE];
    let at = (0..192 * MIB).step_by(PAGE).find(|at| {
        memory.as_file().read_exact_at(&mut page, *at).unwrap();
        word(&page, 0) == 1234
            && (1..10_000).contains(&word(&page, 1))
            && word(&page, 3).wrapping_sub(word(&page, 2)) == 0x9e37_79b9_7f4a_7c15
    });
    memory.as_file().write_all_at(&[0; PAGE], at.unwrap()).unwrap();
    running.qmp.execute("cont", json!({})).unwrap();

    let status = running.console.wait_for_status("a complaint", |now| now.bad > 0).unwrap();
    status.verify().unwrap_err();
    let bad = running.console.text("bad").unwrap();
    assert!(bad[0].contains("page 1234 of check") && bad[0].ends_with("holds zeros"), "{bad:?}");
    assert_eq!(running.console.bad(), [bad[0].strip_prefix("BAD ").unwrap()]);
    assert!(running.verify().unwrap_err().sentence().contains(&bad[0]));
}
