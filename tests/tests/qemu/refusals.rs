// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `pageferry qemu` does not serve, and what it says then. No guest needs to boot for this.

use crate::busy::{MIB, Stage};
use pageferry_tests::linux_guest::{
    GuestMemory, LinuxGuest, Operator, QemuVersion, Qmp, RunningGuest, SideCar, Sockets,
};
use pageferry_tests::require;
use rustix::process::Signal;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;

/// Memory that can be served.
fn good() -> GuestMemory {
    let backend = "memory-backend-file,id=ram0,size=128M,mem-path=/dev/shm,share=on";
    GuestMemory::Backend(backend.to_owned())
}

fn guest(memory: GuestMemory, more: &[&str]) -> LinuxGuest {
    LinuxGuest {
        memory,
        more: more.iter().map(OsString::from).collect(),
        ..LinuxGuest::new(128 * MIB)
    }
}

/// What `pageferry qemu attach` says to a QEMU. It must fail, and QEMU must not notice.
fn attach(stage: &Stage, name: &str, guest: &LinuxGuest, is_monitor_free: bool) -> String {
    let place = stage.place();
    let sockets = Sockets::new(place.folder, name);
    sockets.create().unwrap();
    let monitor = format!("unix:{},server=on,wait=off", stage.file(&format!("{name}/ours")));
    let mut guest = guest.clone();
    guest.more.extend(["-qmp".into(), monitor.into()]);
    let line = guest.command_line(place.tools, place.version, &sockets);
    let mut running = RunningGuest::start(&line, sockets).unwrap();
    let ours = stage.file(&format!("{name}/ours"));
    let _other = (!is_monitor_free).then(|| Qmp::connect(ours.as_ref()).unwrap());
    let said = fails(&[
        "attach".into(),
        "--socket".into(),
        place.agent_socket(name).into(),
        "--qmp".into(),
        ours.into(),
        "--pid".into(),
        running.process.id().to_string().into(),
    ]);
    let status = running.qmp.execute("query-status", serde_json::json!({})).unwrap();
    assert_eq!(status["status"], "running");
    said
}

/// What a command says that fails.
fn fails(arguments: &[OsString]) -> String {
    let mut side_car = SideCar::spawn(arguments).unwrap();
    let status = side_car.wait().unwrap();
    let said = side_car.lines().join("\n");
    assert!(!status.success(), "{said}");
    said
}

#[test]
fn attach_names_what_stands_in_its_way() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let memfd = GuestMemory::Backend("memory-backend-memfd,id=ram0,size=128M,share=on".to_owned());
    let own = GuestMemory::Backend(
        "memory-backend-file,id=ram0,size=128M,mem-path=/dev/shm,share=off".to_owned(),
    );
    for (name, guest, is_monitor_free, named) in [
        ("plain", guest(GuestMemory::Private, &[]), true, "memory backend pc.ram is private"),
        ("memfd", guest(memfd, &[]), true, "memory backend ram0 is a memory-backend-memfd"),
        ("private", guest(own, &[]), true, "memory backend ram0 is private"),
        ("monitor", guest(good(), &[]), false, "another program uses it"),
    ] {
        let said = attach(&stage, name, &guest, is_monitor_free);
        assert!(said.contains(named), "{name}: {said}");
    }
}

#[test]
fn run_names_options_that_it_cannot_use() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    for (action, option, named) in [
        ("run", &["-daemonize"][..], "-daemonize cannot be used"),
        ("run", &["-incoming", "defer"], "-incoming cannot be used"),
        ("receive", &["-incoming", "defer"], "-incoming cannot be used"),
        ("run", &["-numa", "node,mem=128M"], "-numa node,mem=128M cannot be used"),
        ("run", &["-device", "no-such-device"], "QEMU has ended before its monitor answered"),
    ] {
        let guest = guest(GuestMemory::Private, option);
        let arguments = stage.place().arguments(action, "refused", &[], &guest).unwrap();
        let said = fails(&arguments);
        assert!(said.contains(named), "{option:?}: {said}");
    }
}

#[test]
fn huge_pages_of_no_size_of_this_machine_are_refused_with_those_that_there_are() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = guest(GuestMemory::Private, &[]);
    let more = ["--huge-pages", "3M"];
    let arguments = stage.place().arguments("run", "refused", &more, &guest).unwrap();
    let said = fails(&arguments);
    assert!(said.contains("3M is no size of huge pages on this machine; it has"), "{said}");
}

/// Before anybody waits, and before a destination is used up.
#[test]
fn operator_hears_at_once_what_a_qemu_cannot_do() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = guest(GuestMemory::Private, &[]);
    let run = stage.place().arguments("run", "here", &[], &guest).unwrap();
    let mut here = SideCar::spawn(&run).unwrap();
    here.wait_for_line("agent at").unwrap();
    let operator = Operator::new(stage.place().agent_socket("here"));
    for (command, options, named) in [
        ("listen", &["tcp:127.0.0.1:0"][..], "start one for it with `pageferry qemu receive`"),
        ("migrate", &["--to", "tcp:127.0.0.1:9", "--policy", "throttle"], "use --mode hybrid"),
        ("resume", &[], "no job of this agent has left it paused"),
    ] {
        let said = operator.run(command, options).unwrap_err().sentence();
        assert!(said.contains(named), "{command}: {said}");
    }
    here.handle().signal(Signal::TERM).unwrap();
    here.wait().unwrap();

    let there = stage.place().receive_image("there", &guest).unwrap();
    let image = stage.file("image");
    for (command, options) in [
        ("migrate", &["--to", "tcp:127.0.0.1:9"][..]),
        ("migrate", &["--to", "tcp:127.0.0.1:9", "--mode", "postcopy"]),
        ("snapshot", &[&image, "--mode", "paused"]),
        ("snapshot", &[&image]),
    ] {
        let said = there.agent.run(command, options).unwrap_err().sentence();
        assert!(said.contains("this QEMU waits for a guest: listen or restore first"), "{said}");
    }
    assert_eq!(there.agent.status().unwrap()["status"], "idle");
    assert!(!std::path::Path::new(&image).exists());
}

/// A QEMU takes the path of its monitor from whoever has it: a second start must not get so far.
#[test]
fn socket_of_another_guest_is_refused_before_a_qemu_starts() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let (place, guest) = (stage.place(), guest(GuestMemory::Private, &[]));
    let mut here = place.start("run", "here", &[], &guest).unwrap();
    let socket = place.agent_socket("here");
    let monitor = format!("{}.qmp", socket.display());
    let inode = || std::fs::metadata(&monitor).unwrap().ino();
    let before = inode();
    let line = |action| {
        let mut words = place.arguments(action, "another", &[], &guest).unwrap();
        let at = words.iter().position(|word| word == "--socket").unwrap();
        words[at + 1] = socket.clone().into();
        words
    };
    let attach = ["attach", "--socket", socket.to_str().unwrap(), "--qmp", "/no-such-monitor"];
    for words in [line("run"), line("receive"), attach.map(OsString::from).to_vec()] {
        let said = fails(&words);
        let expected = format!("{} is in use: another process listens there", socket.display());
        assert!(said.contains(&expected), "{words:?}: {said}");
        assert!(!said.contains("QEMU"), "{said}");
    }
    // Its agent ends with it, and QEMU goes on with its monitor.
    here.side_car.kill().unwrap();
    let said = fails(&line("run"));
    assert!(said.contains(&format!("{monitor} is in use")), "{said}");
    assert_eq!(inode(), before);
    here.attach().unwrap();
    here.agent.status().unwrap();
}

/// All processes of a terminal get what Ctrl-C sends, and QEMU may be the first to end.
#[test]
fn qemu_that_is_ended_is_no_reason_for_a_warning() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let guest = guest(GuestMemory::Private, &[]);
    let mut here = stage.place().start("run", "here", &[], &guest).unwrap();
    here.qemu.signal(Signal::TERM).unwrap();
    here.side_car.wait().unwrap();
    let said = here.side_car.lines().join("\n");
    assert!(!said.contains("WARN"), "{said}");
}

/// A destination begins with making holes of its memory.
#[test]
fn memory_file_of_another_guest_is_refused() {
    let Some(tools) = require::qemu() else { return };
    let stage = Stage::new(tools, QemuVersion::V10_0);
    let backend =
        format!("memory-backend-file,id=ram0,size=128M,mem-path={},share=on", stage.file("ram"));
    let guest = guest(GuestMemory::Backend(backend), &["-machine", "memory-backend=ram0"]);
    let first = stage.place().arguments("run", "first", &[], &guest).unwrap();
    let mut first = SideCar::spawn(&first).unwrap();
    first.wait_for_line("agent at").unwrap();
    let arguments = ["--listen", "tcp:127.0.0.1:0"];
    let second = stage.place().arguments("receive", "second", &arguments, &guest).unwrap();
    let said = fails(&second);
    assert!(said.contains("is the memory of a guest that pageferry serves already"), "{said}");
    // Ends its QEMU, too.
    first.handle().signal(Signal::TERM).unwrap();
    first.wait().unwrap();
}
