// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents that are upgraded: the process executes its program again, and the guest does not notice.

use super::supervisor::{PAGES, SLOW, Supervised, pid};
use pageferry_client::{
    IncomingOptions, OutgoingOptions, Ownership, Phase, Punch, Supervisor, Target,
};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::{
    Listening, Ram, SOON, ScriptedHooks, ScriptedVmm, Side, config, moves_to,
};
use rustix::process::{Signal, kill_process};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

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

/// A VMM that has connected to this agent.
fn served(service: AgentProcess) -> (AgentProcess, Supervised) {
    let source = Supervised::connected(Ram::odd(PAGES).stamped(), service.socket());
    (service, source)
}

#[track_caller]
fn done(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_process_and_the_socket_stay_and_the_guest_moves_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut service, source) = served(agent(&folder));
    let (process, socket) = (service.process().id(), std::fs::metadata(service.socket()).unwrap());
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
    let (service, source) = served(agent(&folder));
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
    // Another name of the same file: the kernel executes no file that somebody has open to write
    // it, and a process that another test starts meanwhile may have such a descriptor of a copy.
    let program = program();
    let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let copy = folder.path().join("program");
    std::fs::hard_link(program, &copy).unwrap();
    let (mut service, source) = served(AgentProcess::spawn(&copy, folder.path(), "agent").unwrap());
    std::fs::remove_file(&copy).unwrap();
    request(&mut service);
    source.wait_for_agent(1);
    service.process().wait_for_line("cannot execute", SOON).unwrap();
    // An operator can put a program there, and try again.
    std::fs::hard_link(program, &copy).unwrap();
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
    let (mut service, source) = served(agent(&folder));
    let upgrades = |service: &mut AgentProcess| {
        let lines = service.process().lines();
        lines.iter().filter(|line| line.contains("upgraded to version")).count()
    };
    for _ in 0..3 {
        let (before, attached) = (upgrades(&mut service), source.agents_attached());
        // As many as fit while it ends, executes and starts.
        while upgrades(&mut service) == before {
            request(&mut service);
        }
        wait_until("the next agent", SOON, || source.agents_attached() > attached).unwrap();
    }
    let destination = Side::new(Ram::odd(PAGES));
    let path = folder.path().join("guest");
    destination.listen(&path, &IncomingOptions::default());
    // The last of them may still be under way. A job that has begun ends first.
    wait_until("the guest to leave", SOON, || {
        let target = Target::Address(format!("unix:{}", path.display()));
        let started = source.attached.client.start_outgoing(target, &OutgoingOptions::default());
        let _ = started.and_then(|started| source.attached.client.wait(started.job, SOON));
        source.attached.client.ownership() == Ownership::Gone
    })
    .unwrap();
    assert!(!service.process().has_ended());
    source.end();
}

/// The signal would end a process that does not know it.
#[test]
fn only_an_agent_that_can_be_upgraded_gets_the_signal() {
    let refused = |path: &Path| {
        let command = Command::new(program()).args(["upgrade", "--socket"]).arg(path).output();
        let output = command.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let said = refused(&folder.path().join("nobody"));
    assert!(said.contains("no agent answers on"), "{said}");
    // An agent on a thread of this process, which has no handler.
    let said = refused(&Listening::start().path);
    assert!(said.contains(&format!("process {}, which", std::process::id())), "{said}");
    // An agent that ends with its VMM, and listens for operators, too.
    let path = folder.path().join("agent");
    let command = {
        let path = path.clone();
        move || {
            let mut command = Command::new(program());
            command.args(["agent", "--stdin", "--socket"]).arg(&path);
            command
        }
    };
    let hooks = ScriptedHooks(ScriptedVmm::new());
    let (client, supervisor) = Supervisor::spawn(command, config(), hooks).unwrap();
    let process = client.agent_pid();
    let said = refused(&path);
    assert!(said.contains("its VMM starts the next one"), "{said}");
    for _ in 0..3 {
        kill_process(pid(process), Signal::USR2).unwrap();
        client.status().unwrap();
    }
    assert_eq!(client.agent_pid(), process);
    drop(client);
    supervisor.join();
}
