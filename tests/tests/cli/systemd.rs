// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent as a service of systemd: the socket that it inherits, its messages, and the units.

use pageferry_client::{Client, Phase};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Attached, Ram, SOON, config};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A command that starts the agent with `inherited` as descriptor 3, as systemd does. `set` sets
/// the variables, and `$$` in it is the agent's process.
fn activated(set: &str, arguments: &str) -> Command {
    let mut command = Command::new("sh");
    // The shell replaces itself by the agent, so the agent has its process id.
    let script = format!("exec 3<&0 0</dev/null; {set} exec \"$0\" agent {arguments}");
    command.arg("-c").arg(script).arg(program());
    command
}

fn spawn(command: &mut Command, inherited: impl Into<OwnedFd>) -> Process {
    Process::spawn_with_stdin("agent", command, inherited.into().into()).unwrap()
}

const FOR_THE_AGENT: &str = "LISTEN_FDS=1 LISTEN_PID=$$";

#[test]
fn an_inherited_socket_is_served_and_stays_when_the_agent_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.sock");
    // This test is the service manager.
    let listener = UnixListener::bind(&path).unwrap();
    let inode = std::fs::metadata(&path).unwrap().ino();
    for round in 1..=2 {
        // A connection that comes before the agent waits for it.
        let early = UnixStream::connect(&path).unwrap();
        let mut agent = spawn(&mut activated(FOR_THE_AGENT, ""), listener.try_clone().unwrap());
        let vmm = Attached::new(&path, Ram::odd(16));
        let image = folder.path().join(format!("image-{round}"));
        let job = vmm.client.start_snapshot(&image, &paused()).unwrap().job;
        assert_eq!(vmm.wait(job).phase, Phase::Completed);
        drop((vmm, early));
        agent.terminate().unwrap();
        assert!(agent.wait(SOON).unwrap().success(), "{:?}", agent.lines());
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!(found.ino(), inode, "the path is the manager's");
    }
}

#[test]
fn what_is_not_one_socket_for_the_agent_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let listener = || OwnedFd::from(UnixListener::bind(folder.path().join("s")).unwrap());
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let free = folder.path().join("free");
    let socket = format!("--socket {}", free.display());
    let none = "no socket: give --socket PATH or --stdin";
    for (set, arguments, inherited, sentence) in [
        ("", "", null(), none),
        // As in a program that a service has started: the variables are the service's.
        ("LISTEN_FDS=1 LISTEN_PID=1", "", null(), none),
        ("LISTEN_FDS=0 LISTEN_PID=$$", "", null(), none),
        ("LISTEN_FDS=2 LISTEN_PID=$$", "", null(), "LISTEN_FDS is 2: an agent has one"),
        ("LISTEN_FDS=x LISTEN_PID=$$", "", null(), "LISTEN_FDS is \"x\", expected is a number"),
        (FOR_THE_AGENT, "", null(), "descriptor 3 is a device, expected is a UNIX stream socket"),
        (FOR_THE_AGENT, &socket, listener(), "--socket: systemd has handed over a socket"),
    ] {
        let mut agent = spawn(&mut activated(set, arguments), inherited);
        assert_eq!(agent.wait(SOON).unwrap().code(), Some(2), "{set}: {:?}", agent.lines());
        let lines = agent.lines().join("\n");
        assert!(lines.contains(sentence), "{set}: {lines}");
    }
    assert!(!free.exists());
}

/// How long the manager waits for a message at once.
const LOOK: Duration = Duration::from_millis(100);
/// The time in which the manager wants a sign of life, 200,000 microseconds.
const WATCHDOG: Duration = Duration::from_millis(200);

/// The service manager's end of the messages.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(folder: &Path) -> Self {
        let path = folder.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LOOK)).unwrap();
        Self { socket, path }
    }

    /// The next message; `None` if none comes for [`LOOK`].
    fn next(&self) -> Option<String> {
        let mut bytes = [0; 300];
        let count = self.socket.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..count].to_vec()).unwrap())
    }

    /// Checks that no message comes for this time.
    fn assert_silent(&self, time: Duration) {
        self.socket.set_read_timeout(Some(time)).unwrap();
        assert_eq!(self.next(), None);
        self.socket.set_read_timeout(Some(LOOK)).unwrap();
    }

    /// Waits for `expected`, and returns the messages before it.
    fn wait_for(&self, expected: &str) -> Vec<String> {
        let mut before = Vec::new();
        wait_for(&format!("{expected} to come"), SOON, || {
            let message = self.next()?;
            let found = message == expected;
            before.push(message);
            found.then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}: {before:?}"));
        before.pop();
        before
    }
}

#[test]
fn the_manager_hears_what_the_agent_does() {
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let mut command = Command::new(program());
    command.env("NOTIFY_SOCKET", &manager.path);
    let mut agent = AgentProcess::start(&mut command, folder.path(), "agent").unwrap();
    assert_eq!(manager.next().as_deref(), Some("READY=1"), "it listens");
    assert_eq!(manager.next().as_deref(), Some("STATUS=no job was started yet"));
    let vmm = Attached::new(agent.socket(), Ram::odd(16));
    let job = vmm.client.start_snapshot(&folder.path().join("image"), &paused()).unwrap().job;
    assert_eq!(vmm.wait(job).phase, Phase::Completed);
    let before = manager.wait_for("STATUS=job 1, snapshot: completed");
    assert!(before.iter().all(|message| message.starts_with("STATUS=job 1, snapshot: ")));
    agent.process().terminate().unwrap();
    manager.wait_for("STOPPING=1");
    assert!(agent.process().wait(SOON).unwrap().success());
    assert_eq!(manager.next(), None, "no sign of life was asked for");
}

#[test]
fn signs_of_life_come_only_while_the_agent_works() {
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let mut command = Command::new(program());
    command.env("NOTIFY_SOCKET", &manager.path).env("WATCHDOG_USEC", "200000");
    let mut agent = AgentProcess::start(&mut command, folder.path(), "agent").unwrap();
    (0..5).for_each(|_| drop(manager.wait_for("WATCHDOG=1")));
    agent.process().freeze().unwrap();
    while manager.next().is_some() {}
    manager.assert_silent(3 * WATCHDOG);
    agent.process().thaw().unwrap();
    manager.wait_for("WATCHDOG=1");

    // A variable for another process is no order for this one.
    let mut other = Command::new(program());
    other.env("NOTIFY_SOCKET", &manager.path).env("WATCHDOG_USEC", "200000");
    other.env("WATCHDOG_PID", "1");
    agent.process().kill().unwrap();
    while manager.next().is_some() {}
    let _other = AgentProcess::start(&mut other, folder.path(), "other").unwrap();
    manager.wait_for("STATUS=no job was started yet");
    manager.assert_silent(3 * WATCHDOG);
}

#[test]
fn a_manager_that_cannot_be_reached_is_named_in_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(program());
    command.env("NOTIFY_SOCKET", "/nonexistent/notify");
    let mut agent = AgentProcess::start(&mut command, folder.path(), "agent").unwrap();
    let expected = "NOTIFY_SOCKET is \"/nonexistent/notify\", which cannot be used: ";
    agent.process().wait_for_line(expected, SOON).unwrap();
}

#[test]
fn an_agent_of_a_vmm_sends_nothing_to_the_manager_of_the_vmm() {
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let mut command = Command::new(program());
    command.args(["agent", "--stdin"]).env("NOTIFY_SOCKET", &manager.path);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut agent = spawn(&mut command, theirs);
    let (client, channel) = Client::from_socket(ours.into(), config()).unwrap();
    drop(Attached::over(client, channel, Ram::odd(16)));
    assert!(agent.wait(SOON).unwrap().success(), "{:?}", agent.lines());
    assert_eq!(manager.next(), None);
}

#[test]
fn systemd_accepts_the_units() {
    let folder = tempfile::tempdir().unwrap();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/systemd");
    let copied = ["pageferry@.service", "pageferry@.socket"].map(|name| {
        let text = std::fs::read_to_string(units.join(name)).unwrap();
        // The program must exist.
        let text = text.replace("/usr/bin/pageferry", program().to_str().unwrap());
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    });
    let verified =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).args(copied).output();
    let verified = match verified {
        Ok(verified) => verified,
        Err(error) => return eprintln!("skipped: systemd-analyze: {error}"),
    };
    assert!(verified.status.success() && verified.stderr.is_empty(), "{verified:?}");
}
