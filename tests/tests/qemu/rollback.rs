// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration that fails late: the guest goes on at its source, and QEMU has the settings of its
//! user.

use pageferry_tests::linux_guest::console::{BOOT_PATIENCE, PATIENCE};
use pageferry_tests::linux_guest::{LinuxGuest, QemuTools, QemuVersion, RunningGuest, Sockets};
use pageferry_tests::process::{Process, program};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitStatus};

const MIB: u64 = 1 << 20;

/// A QEMU that `pageferry qemu` has started.
struct Beside {
    running: RunningGuest,
    agent: OsString,
}

impl Beside {
    fn start(folder: &Path, name: &str, options: &[&str], line: Line<'_>) -> Self {
        let sockets = Sockets::new(folder, name);
        sockets.create().unwrap();
        let agent = folder.join(format!("{name}.agent")).into_os_string();
        let mut command = vec![program().into(), "qemu".into(), options[0].into()];
        command.extend(["--socket".into(), agent.clone()]);
        command.extend(options[1..].iter().map(OsString::from));
        command.push("--".into());
        command.extend(line.guest.command_line(line.tools, line.version, &sockets));
        let mut running = RunningGuest::start(&command, sockets).unwrap();
        running.process.wait_for_line("agent at", BOOT_PATIENCE).unwrap();
        Self { running, agent }
    }

    /// `pageferry COMMAND --socket AGENT OPTIONS`
    fn command(&self, command: &str, options: &[&str]) -> (ExitStatus, String) {
        let mut line = Command::new(program());
        line.arg(command).arg("--socket").arg(&self.agent).args(options);
        let mut process = Process::spawn(command, &mut line).unwrap();
        (process.wait(PATIENCE).unwrap(), process.lines().join("\n"))
    }

    fn ask(&mut self, command: &str) -> Value {
        self.running.qmp.execute(command, json!({})).unwrap()
    }

    /// What a migration changes in QEMU.
    fn settings(&mut self) -> [Value; 2] {
        ["query-migrate-capabilities", "query-migrate-parameters"].map(|query| self.ask(query))
    }

    /// The guest runs, and its memory is intact.
    fn assert_runs(&mut self) {
        assert_eq!(self.ask("query-status")["status"], "running");
        let console = &self.running.console;
        console.wait_for_ticks(console.ticks().len() + 5).unwrap();
        self.running.verify().unwrap();
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // A killed `pageferry qemu` would leave QEMU behind.
        if self.running.process.terminate().is_ok() {
            let _ = self.running.process.wait(PATIENCE);
        }
    }
}

/// What QEMU is started with.
#[derive(Clone, Copy)]
struct Line<'a> {
    tools: &'a QemuTools,
    version: QemuVersion,
    guest: &'a LinuxGuest,
}

#[test]
fn guest_of_an_old_qemu_goes_on_after_failures() {
    goes_on_after_failures(QemuVersion::V10_0);
}

#[test]
fn guest_of_a_new_qemu_goes_on_after_failures() {
    goes_on_after_failures(QemuVersion::V11_1);
}

fn goes_on_after_failures(version: QemuVersion) {
    let Some(tools) = crate::soak() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Room for memory that is plugged in. The last -m counts.
    let more = ["-m", "192M,slots=1,maxmem=512M"].map(OsString::from).to_vec();
    let guest = LinuxGuest { more, ..LinuxGuest::new(192 * MIB) };
    let line = Line { tools: &tools, version, guest: &guest };
    let mut source = Beside::start(folder.path(), "source", &["run"], line);
    source.running.wait_until_ready().unwrap();
    for task in ["check 32M 200", "tick"] {
        source.running.console.command(task).unwrap();
    }
    let on = json!({ "capabilities": [{ "capability": "auto-converge", "state": true }] });
    source.running.qmp.execute("migrate-set-capabilities", on).unwrap();
    let limits = json!({ "max-bandwidth": 12_345_678, "downtime-limit": 77 });
    source.running.qmp.execute("migrate-set-parameters", limits).unwrap();
    let settings = source.settings();

    // The state was saved, and cannot be loaded: the destination has no balloon.
    let address = address();
    let other = LinuxGuest { balloon: false, ..guest.clone() };
    let receive = ["receive", "--listen", &address];
    let destination =
        Beside::start(folder.path(), "other", &receive, Line { guest: &other, ..line });
    let (exit, said) = source.command("migrate", &["--to", &address]);
    // A QEMU that cannot load ends, and may take its agent with it before that says why.
    assert!(!exit.success() && said.contains("loading") && said.contains("failed"), "{said}");
    source.assert_runs();
    assert_eq!(source.settings(), settings);
    drop(destination);

    // QEMU has begun to save, and is not to go on: memory was plugged in.
    let destination = Beside::start(folder.path(), "same", &receive, line);
    let slowly = ["--to", &address, "--bandwidth", "10M", "--detach"];
    let (exit, said) = source.command("migrate", &slowly);
    assert!(exit.success(), "{said}");
    let memory = json!({ "qom-type": "memory-backend-file", "id": "plugged", "size": 128 * MIB,
        "share": true, "mem-path": "/dev/shm" });
    source.running.qmp.execute("object-add", memory).unwrap();
    let device = json!({ "driver": "pc-dimm", "memdev": "plugged" });
    source.running.qmp.execute("device_add", device).unwrap();
    assert!(source.command("set", &["--bandwidth", "0"]).0.success());
    let (exit, said) = source.command("watch", &[]);
    assert!(!exit.success() && said.contains("memory was plugged in or out"), "{said}");
    source.assert_runs();
    assert_eq!(source.settings(), settings);
    drop(destination);

    // A snapshot saves the state, and the guest goes on here.
    let image = folder.path().join("image");
    let (exit, said) = source.command("snapshot", &["--mode", "paused", image.to_str().unwrap()]);
    assert!(exit.success(), "{said}");
    source.assert_runs();
    assert_eq!(source.settings(), settings);
}

/// A free port. If another process takes it first, the test fails with an error.
fn address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("tcp:{}", listener.local_addr().unwrap())
}
