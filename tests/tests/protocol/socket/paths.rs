// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent's path: what exists there already, other agents at the same path, and the limit of its
//! length.

use pageferry_client::{Client, Config, Error, IncomingOptions, Target};
use pageferry_protocol::error::chain;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::{Attached, Ram, RawClient, SOON};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

fn agent_at(path: &Path) -> Command {
    let mut command = Command::new(program());
    command.arg("agent").arg("--socket").arg(path);
    command
}

fn spawn(folder: &Path, name: &str) -> AgentProcess {
    AgentProcess::spawn(program(), folder, name).unwrap()
}

/// Checks that the command ends with these words.
#[track_caller]
fn assert_refused(command: &mut Command, words: &[&str]) {
    let mut process = Process::spawn("refused", command).unwrap();
    let status = process.wait(SOON).unwrap();
    let text = process.lines().join("\n");
    assert!(!status.success(), "{text}");
    for word in words {
        assert!(text.contains(word), "\"{word}\" is missing in: {text}");
    }
}

#[test]
fn an_agent_and_its_streams_replace_no_file_and_no_link() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("file"), "precious").unwrap();
    std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
    drop(UnixListener::bind(at("stale")).unwrap());
    std::os::unix::fs::symlink(at("stale"), at("to-stale")).unwrap();
    let agent = spawn(folder.path(), "agent");
    let vmm = Attached::new(agent.socket(), Ram::odd(16));
    for (name, found) in
        [("file", "regular file"), ("link", "symbolic link"), ("to-stale", "symbolic link")]
    {
        let sentence = format!("{} is a {found}, not a socket", at(name).display());
        assert_refused(&mut agent_at(&at(name)), &[&sentence]);
        let listen = Target::Address(format!("unix:{}", at(name).display()));
        match vmm.client.start_incoming(listen, &IncomingOptions::default()) {
            Err(Error::Refused { sentence: refused, .. }) => {
                assert!(refused.contains(&sentence), "{refused}")
            }
            other => panic!("not refused: {other:?}"),
        }
    }
    assert_eq!(std::fs::read_to_string(at("file")).unwrap(), "precious");
    assert_eq!(std::fs::read_link(at("link")).unwrap(), at("file"));
    assert_eq!(std::fs::read_link(at("to-stale")).unwrap(), at("stale"));
    assert!(at("stale").exists());
}

#[test]
fn an_ending_agent_leaves_the_path_to_its_new_owner() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = spawn(folder.path(), "agent");
    std::fs::remove_file(first.socket()).unwrap();
    let mut second = spawn(folder.path(), "agent");
    first.process().terminate().unwrap();
    assert!(first.process().wait(SOON).unwrap().success());
    RawClient::connect(second.socket()).status();
    second.process().terminate().unwrap();
    assert!(second.process().wait(SOON).unwrap().success());
    assert!(!second.socket().exists(), "an agent removes its own path");
}

#[test]
fn one_of_many_agents_takes_over_a_stale_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    drop(UnixListener::bind(&path).unwrap());
    let mut agents: Vec<Process> = (0..4)
        .map(|number| Process::spawn(&format!("agent {number}"), &mut agent_at(&path)).unwrap())
        .collect();
    for _ in 0..3 {
        let ended = wait_for("an agent to be refused", SOON, || {
            agents.iter_mut().position(|one| one.has_ended())
        });
        let mut refused = agents.swap_remove(ended.unwrap());
        assert!(!refused.wait(SOON).unwrap().success());
        let text = refused.lines().join("\n");
        assert!(text.contains("in use") && text.contains(path.to_str().unwrap()), "{text}");
    }
    agents[0].wait_for_line("listening on", SOON).unwrap();
    RawClient::connect(&path).status();
}

#[test]
fn sighup_ends_an_agent_in_good_order_unless_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let hang_up = |agent: &mut AgentProcess| {
        let pid = Pid::from_raw(agent.process().id().try_into().unwrap()).unwrap();
        kill_process(pid, Signal::HUP).unwrap();
    };
    // If this process was started by nohup, its children ignore the signal, too. But a signal with
    // a handler is not ignored in a program that is executed.
    signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::default()).unwrap();
    let mut agent = spawn(folder.path(), "agent");
    agent.process().wait_for_line("listening on", SOON).unwrap();
    hang_up(&mut agent);
    assert!(agent.process().wait(SOON).unwrap().success());
    assert!(!agent.socket().exists());

    // Like nohup.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(program());
    let mut agent = AgentProcess::start(&mut command, folder.path(), "ignores").unwrap();
    agent.process().wait_for_line("listening on", SOON).unwrap();
    hang_up(&mut agent);
    RawClient::connect(agent.socket()).status();
    agent.process().terminate().unwrap();
    assert!(agent.process().wait(SOON).unwrap().success());
}

/// A path of `length` bytes.
fn path_of(folder: &Path, length: usize) -> PathBuf {
    folder.join("s".repeat(length - folder.as_os_str().len() - 1))
}

#[test]
fn all_sockets_take_the_same_paths_and_name_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let longest = path_of(folder.path(), 107);
    let mut agent = Process::spawn("agent", &mut agent_at(&longest)).unwrap();
    agent.wait_for_line("listening on", SOON).unwrap();
    let vmm = Attached::new(&longest, Ram::odd(16));
    let status = |path: &Path| {
        let mut command = Command::new(program());
        command.arg("status").arg("--socket").arg(path);
        command
    };
    assert!(status(&longest).status().unwrap().success());
    let stream = path_of(folder.path(), 106);
    let listen = |path: &Path| {
        let listen = Target::Address(format!("unix:{}", path.display()));
        vmm.client.start_incoming(listen, &IncomingOptions::default())
    };
    listen(&stream).unwrap();
    UnixStream::connect(&stream).unwrap();
    vmm.client.cancel().unwrap();

    for length in [108, 109, 300] {
        let path = path_of(folder.path(), length);
        let limit = format!("has {length} bytes, allowed are 107");
        assert_refused(&mut agent_at(&path), &[&limit]);
        assert_refused(&mut status(&path), &[&limit]);
        let refused = Client::connect(&path, Config::default()).unwrap_err();
        assert!(chain(&refused).contains(&limit), "{}", chain(&refused));
        assert!(listen(&path).unwrap_err().to_string().contains(&limit));
        assert!(!path.exists());
    }
    assert_refused(&mut agent_at(Path::new("")), &["a value is required"]);
    assert!(
        chain(&Client::connect(Path::new(""), Config::default()).unwrap_err())
            .contains("path is empty")
    );
    let nul = Path::new(OsStr::new("\0abstract"));
    assert!(
        chain(&Client::connect(nul, Config::default()).unwrap_err()).contains("a byte of zero")
    );
    assert!(listen(nul).unwrap_err().to_string().contains("a byte of zero"));
}
