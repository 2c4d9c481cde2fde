// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that are upgraded: the process executes its program again, and the guest does not notice.

use super::supervisor::{PAGES, SLOW, Supervised, pid};
use pageferry_client::{IncomingOptions, OutgoingOptions, Phase, Punch, Supervisor};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::{Ram, SOON, ScriptedHooks, ScriptedVmm, Side, config, moves_to};
use rustix::process::{Signal, kill_process};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};
use std::time::Duration;

fn agent(folder: &tempfile::TempDir) -> AgentProcess {
    AgentProcess::spawn(program(), folder.path(), "agent").unwrap()
}

fn request(agent: &mut AgentProcess) {
    kill_process(pid(agent.process().id()), Signal::USR2).unwrap();
}

fn upgrade(agent: &AgentProcess) -> Command {
    let mut command = Command::new(program());
    command.args(["upgrade", "--json", "--socket"]).arg(agent.socket());
    command
}

#[track_caller]
fn done(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_process_and_the_socket_stay_and_the_guest_moves_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut service = agent(&folder);
    let (process, socket) = (service.process().id(), std::fs::metadata(service.socket()).unwrap());
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    for attached in 1..4 {
        let said = done(&upgrade(&service).output().unwrap());
        assert_eq!(said["pid"], process);
        assert_eq!(said["version"], said["version_before"]);
        source.wait_for_agent(attached);
        source
            .attached
            .client
            .discard(&[source.attached.ram.range(attached, 1)], Punch::Yes)
            .unwrap();
    }
    assert_eq!(std::fs::metadata(service.socket()).unwrap().ino(), socket.ino());
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    let there = destination.client.discarded(3).unwrap();
    assert_eq!((0..5).filter(|page| there.contains(*page)).collect::<Vec<_>>(), [1, 2, 3]);
    source.end();
    // It removes its path at its end, as one that was never upgraded.
    let path = service.socket().to_owned();
    service.process().terminate().unwrap();
    assert!(service.process().wait(SOON).unwrap().success());
    assert!(!path.exists());
}

#[test]
fn a_job_ends_first_and_no_other_begins() {
    let folder = tempfile::tempdir().unwrap();
    let service = agent(&folder);
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    let destination = Side::new(Ram::odd(PAGES));
    let path = folder.path().join("guest");
    destination.listen(&path, &IncomingOptions::default());
    let options = OutgoingOptions { bandwidth: SLOW, ..OutgoingOptions::default() };
    let job = source.attached.send(&path, &options);
    let mut upgrading = Process::spawn("upgrade", &mut upgrade(&service)).unwrap();
    upgrading.wait_for_line("is upgraded when job 1 (outgoing) has ended", SOON).unwrap();
    let refused = || {
        let started = source.attached.client.start_snapshot(folder.path(), &Default::default());
        started.unwrap_err().to_string()
    };
    wait_until("jobs to be refused", SOON, || refused().contains("is to be upgraded")).unwrap();
    assert!(!upgrading.has_ended());
    assert_eq!(source.agents_attached(), 0);
    source.attached.client.cancel().unwrap();
    // The VMM hears how the job has ended, or only that its agent is gone.
    let ended = source.attached.client.wait(job, SOON);
    assert!(ended.is_err() || ended.is_ok_and(|status| status.phase == Phase::Cancelled));
    assert!(upgrading.wait(SOON).unwrap().success());
    source.wait_for_agent(1);
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    source.end();
}

#[test]
fn an_agent_whose_program_is_gone_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("program");
    std::fs::copy(program(), &copy).unwrap();
    let mut service = AgentProcess::spawn(&copy, folder.path(), "agent").unwrap();
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    std::fs::remove_file(&copy).unwrap();
    request(&mut service);
    source.wait_for_agent(1);
    service.process().wait_for_line("cannot execute", SOON).unwrap();
    // An operator can put a program there, and try again.
    std::fs::copy(program(), &copy).unwrap();
    request(&mut service);
    source.wait_for_agent(2);
    let lines = service.process().lines();
    assert_eq!(lines.iter().filter(|line| line.contains("cannot execute")).count(), 1, "{lines:?}");
    let destination = Side::new(Ram::odd(PAGES));
    moves_to(&source.attached, &destination);
    source.end();
}

#[test]
fn however_many_requests_come_the_agent_lives() {
    let folder = tempfile::tempdir().unwrap();
    let mut service = agent(&folder);
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    for _ in 0..300 {
        request(&mut service);
        std::thread::sleep(Duration::from_millis(2));
    }
    let answers = || source.attached.client.status().is_ok();
    wait_until("the agent to answer", SOON, answers).unwrap();
    assert!(!service.process().has_ended());
    let destination = Side::new(Ram::odd(PAGES));
    wait_until("the last upgrade", SOON, || {
        let before = source.agents_attached();
        std::thread::sleep(Duration::from_millis(300));
        before == source.agents_attached() && answers()
    })
    .unwrap();
    moves_to(&source.attached, &destination);
    source.end();
}

#[test]
fn an_agent_of_its_vmm_is_not_upgraded() {
    let vmm = ScriptedVmm::new();
    let command = || {
        let mut command = Command::new(program());
        command.args(["agent", "--stdin"]);
        command
    };
    let (client, supervisor) =
        Supervisor::spawn(command, config(), ScriptedHooks(vmm.clone())).unwrap();
    let process = client.agent_pid();
    for _ in 0..3 {
        kill_process(pid(process), Signal::USR2).unwrap();
        client.status().unwrap();
    }
    assert_eq!(client.agent_pid(), process);
    drop(client);
    supervisor.join();
}

#[test]
fn who_takes_no_signal_gets_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nobody");
    let output = Command::new(program()).args(["upgrade", "--socket"]).arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no agent answers on"), "{said}");
}
