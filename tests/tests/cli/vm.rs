// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the agent says of its VM: its name, its VMM and its memory.

use pageferry_client::{Client, Config, Error, Punch};
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::{Attached, Ram, SOON, config};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn status(socket: &Path, more: &[&str]) -> String {
    let mut command = Command::new(program());
    let output = command.args(["status", "--socket"]).arg(socket).args(more).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn status_names_the_vm_its_vmm_and_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let nobody = status(agent.socket(), &[]);
    assert!(nobody.contains("VMM                none is connected\n"), "{nobody}");
    assert!(nobody.contains("memory             0 B in 0 blocks, 0 B discarded\n"), "{nobody}");

    let config = Config { name: "web 1".into(), ..config() };
    let (client, channel) = Client::connect(agent.socket(), config).unwrap();
    let vmm = Attached::over(client, channel, Ram::odd(16));
    vmm.client.discard(&[vmm.ram.range(2, 3)], Punch::Yes).unwrap();
    let pid = std::process::id();
    let table = status(agent.socket(), &[]);
    let version = env!("CARGO_PKG_VERSION");
    assert!(table.starts_with(&format!("agent              pageferry {version}, process ")));
    for line in [
        "VM                 web 1",
        &format!("VMM                process {pid}"),
        "memory             64.0 KiB in 1 block, 12.0 KiB discarded",
    ] {
        assert!(table.lines().any(|found| found == line), "{line:?} is not in {table}");
    }
    let json: Value = serde_json::from_str(&status(agent.socket(), &["--json"])).unwrap();
    let (vm, block) = (&json["agent"], &json["agent"]["blocks"][0]);
    assert_eq!((&vm["name"], &vm["vmm_pid"]), (&"web 1".into(), &pid.into()));
    assert_eq!((&block["length"], &block["discarded_pages"]), (&65536.into(), &3.into()));

    // Another VMM is told whom this agent serves.
    match Client::connect(agent.socket(), Config::default()).unwrap_err() {
        Error::Refused { sentence, .. } => {
            let serves = format!("this agent serves the VMM of web 1, process id {pid}");
            assert!(sentence.contains(&serves), "{sentence}");
            assert!(sentence.contains("start another agent"), "{sentence}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_log_and_the_status_have_the_name_that_the_operator_gave() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("named.sock");
    let mut command = Command::new(program());
    command.args(["agent", "--name", "vm1", "--socket"]).arg(&socket);
    let mut agent = Process::spawn("named", &mut command).unwrap();
    let line = agent.wait_for_line("listening on", SOON).unwrap();
    assert!(line.contains("INFO  vm1 pageferry_agent::cli::run_agent] listening on"), "{line}");
    let config = Config { name: "another".into(), ..config() };
    let (_client, _channel) = Client::connect(&socket, config).unwrap();
    assert!(status(&socket, &[]).contains("VM                 vm1\n"));
    for wrong in ["", "a\nb"] {
        let refused = Command::new(program()).args(["agent", "--name", wrong, "--stdin"]).output();
        let refused = refused.unwrap();
        assert_eq!(refused.status.code(), Some(2));
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(text.contains("write 1 to 128 bytes without control characters"), "{text}");
    }
}
