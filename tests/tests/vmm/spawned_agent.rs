// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent that the VMM starts as `pageferry agent --stdin`: it serves only that VMM, and ends
//! with it.

use pageferry_client::{Client, Error, IncomingOptions, Ownership, Phase, Target};
use pageferry_tests::deadline::{wait_for, wait_until};
use pageferry_tests::process::program;
use pageferry_tests::scenario::{Attached, Ram, RawClient, SOON, config, moves_to, passes};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

const PAGES: u64 = 100;

/// A VMM with its own agent, which also listens at `socket` if there is one.
fn spawned(ram: Ram, socket: Option<&Path>) -> (Attached, Child) {
    let mut command = Command::new(program());
    command.args(["agent", "--stdin"]);
    if let Some(socket) = socket {
        command.arg("--socket").arg(socket);
    }
    let (client, channel, child) = Client::spawn(&mut command, config()).unwrap();
    (Attached::over(client, channel, ram), child)
}

fn stamped() -> Ram {
    let ram = Ram::odd(PAGES);
    for page in (0..PAGES).step_by(2) {
        ram.write(page, 500 + page);
    }
    ram
}

/// The exit status of the agent. If it does not end, kills it.
fn end(mut child: Child) -> ExitStatus {
    let ended = wait_for("the agent's end", SOON, || child.try_wait().unwrap());
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended.unwrap()
}

#[test]
fn spawned_agents_migrate_the_guest_and_end_with_their_clients() {
    let (source, agent_here) = spawned(stamped(), None);
    let (destination, agent_there) = spawned(Ram::odd(PAGES), None);
    moves_to(&source, &destination);
    wait_until("the guest to be gone", SOON, || source.client.ownership() == Ownership::Gone)
        .unwrap();
    assert_eq!(destination.client.ownership(), Ownership::Ours);
    // Each agent ends when the last clone of its client is dropped.
    let clone = source.client.clone();
    drop((source, destination));
    assert!(end(agent_there).success());
    assert_eq!(clone.status().unwrap().phase, Phase::Completed);
    drop(clone);
    assert!(end(agent_here).success());
}

#[test]
fn a_spawned_agent_takes_operators_and_ends_with_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("operator");
    let (source, agent) = spawned(stamped(), Some(&socket));
    assert_eq!(RawClient::connect(&socket).status().phase, Phase::Idle);
    drop(source);
    assert!(end(agent).success());
    assert!(!socket.exists(), "the agent left its socket behind");
}

#[test]
fn after_a_killed_spawned_agent_the_next_migrates_the_guest() {
    let (source, mut agent) = spawned(stamped(), None);
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", folder.path().join("nobody").display());
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("nobody")).unwrap();
    source.client.start_outgoing(Target::Address(address), &passes(1)).unwrap();
    let _peer = listener.accept().unwrap();
    agent.kill().unwrap();
    assert!(!end(agent).success());
    wait_until("the agent to be lost", SOON, || source.client.status().is_err()).unwrap();
    assert!(matches!(source.client.status(), Err(Error::AgentLost { .. })));
    assert!(!source.vmm.is_paused());
    source.write(1, 11);

    let (destination, other) = spawned(Ram::odd(PAGES), None);
    let next = pageferry_tests::scenario::Agent::spawn();
    source.reattach(next.socket());
    moves_to(&source, &destination);
    drop(destination);
    assert!(end(other).success());
}

#[test]
fn a_spawned_agent_ends_job_and_itself_with_its_vmm() {
    let (destination, agent) = spawned(Ram::odd(PAGES), None);
    let folder = tempfile::tempdir().unwrap();
    destination.listen(&folder.path().join("guest"), &IncomingOptions::default());
    drop(destination);
    assert!(end(agent).success());
}

#[test]
fn a_stdin_that_is_no_connection_is_refused_by_its_kind() {
    let folder = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("listens")).unwrap();
    let open = |path: &Path| Stdio::from(std::fs::File::open(path).unwrap());
    for (stdin, found) in [
        (open(folder.path()), "a folder,"),
        (open(Path::new(program())), "a file,"),
        (Stdio::null(), "a device (/dev/null, or it is closed),"),
        (Stdio::from(OwnedFd::from(listener)), "a listening socket,"),
    ] {
        let ended =
            Command::new(program()).args(["agent", "--stdin"]).stdin(stdin).output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        let expected = format!(
            "--stdin: standard input is {found} but must be a connected UNIX stream socket"
        );
        assert!(said.contains(&expected), "{said}");
        assert_eq!(ended.status.code(), Some(2), "as for any other bad input");
    }
}
