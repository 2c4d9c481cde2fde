// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A QEMU that runs already is attached, left, and attached again, and then moved over TLS.

use crate::busy::{MIB, Stage, goes_on, goes_on_well};
use crate::moves::PRECOPY;
use pageferry_tests::linux_guest::{
    GuestMemory, LinuxGuest, Operator, QemuVersion, RunningGuest, SideCar, Sockets,
};
use pageferry_tests::require;
use rustix::process::Signal;
use serde_json::json;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

#[test]
fn guest_of_a_qemu_that_runs_is_left_and_moved() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V11_1);
    let (place, sockets) = (stage.place(), Sockets::new(stage.folder.path(), "user"));
    sockets.create().unwrap();
    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = memory.path().display();
    let mut guest = stage.guest(256 * MIB);
    guest.memory = GuestMemory::Backend(format!(
        "memory-backend-file,id=ram0,size=256M,mem-path={path},share=on"
    ));
    let monitor = stage.file("user/for-pageferry");
    let mut users = guest.clone();
    users.more.extend(["-qmp".into(), format!("unix:{monitor},server=on,wait=off").into()]);
    let line = users.command_line(place.tools, place.version, &sockets);
    let mut here = RunningGuest::start(&line, sockets).unwrap();
    here.wait_until_ready().unwrap();
    let moment = stage.start(&guest, &mut here.console);

    let token = stage.file("token");
    std::fs::write(&token, "the token of a test, long enough").unwrap();
    std::fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    let attach = || {
        let mut side_car = SideCar::spawn(&[
            "attach".into(),
            "--socket".into(),
            place.agent_socket("user").into(),
            "--qmp".into(),
            monitor.clone().into(),
            "--pid".into(),
            here.process.id().to_string().into(),
            "--token-file".into(),
            token.clone().into(),
        ])
        .unwrap();
        side_car.wait_for_line("256 MiB of guest memory in 1 block").unwrap();
        side_car
    };
    let mut first = attach();
    first.handle().signal(Signal::TERM).unwrap();
    assert!(first.wait().unwrap().success());
    first.wait_for_line("the agent has ended; QEMU goes on").unwrap();
    let mut second = attach();
    let moment = goes_on(&mut here.console, &moment);

    // With the same options, both ends would have their memory in the same file.
    let backend = "memory-backend-ram,id=ram0,size=256M".to_owned();
    let guest = LinuxGuest { memory: GuestMemory::Backend(backend), ..guest };
    let listen = ["--listen", "tls:127.0.0.1:0", "--token-file", &token];
    let mut there = place.start("receive", "destination", &listen, &guest).unwrap();
    let agent = Operator::new(place.agent_socket("user"));
    let to = ["--to", there.address.as_deref().unwrap()];
    assert_eq!(agent.run("migrate", &[&to, PRECOPY].concat()).unwrap()["status"], "completed");
    assert!(second.wait().unwrap().success());
    second.wait_for_line("its QEMU here is paused, and can be ended").unwrap();
    let state = here.qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(state["status"], "postmigrate");
    goes_on_well(&mut there, &moment);
}
