// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How commands end: exit codes, standard output and standard error, with a terminal, a pipe,
//! `--json` and a closed pipe.

use super::pty::OnTerminal;
use pageferry_client::{IncomingOptions, Phase, Target};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::{Attached, Ram};
use pageferry_tests::vmm::PATIENCE;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const PAGES: u64 = 4096;

/// A guest with a full memory, a destination that listens, and their agents.
struct Pair {
    source: Attached,
    agent: AgentProcess,
    destination: Attached,
    _destination_agent: AgentProcess,
    address: String,
}

impl Pair {
    fn new(folder: &Path) -> Self {
        let agent = AgentProcess::spawn(program(), folder, "source").unwrap();
        let destination_agent = AgentProcess::spawn(program(), folder, "destination").unwrap();
        let source = Attached::new(agent.socket(), Ram::odd(PAGES));
        (0..PAGES).for_each(|page| source.ram.write(page, page + 1));
        let destination = Attached::new(destination_agent.socket(), Ram::odd(PAGES));
        let address = format!("unix:{}", folder.join("stream").display());
        let listen = Target::Address(address.clone());
        destination.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        Self { source, agent, destination, _destination_agent: destination_agent, address }
    }

    fn command(&self, what: &str, more: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg(what).arg("--socket").arg(self.agent.socket()).args(more).stdin(Stdio::null());
        command
    }

    /// 16 MiB at 64 KiB per second: the job does not end by itself.
    fn slow_migration(&self) -> Command {
        self.command("migrate", &["--to", &self.address, "--bandwidth", "64K"])
    }

    fn wait_for_passes(&self) {
        wait_until("passes", PATIENCE, || {
            self.source.client.status().unwrap().phase == Phase::Passes
        })
        .unwrap();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn interrupt(child: &Child) {
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
}

#[test]
fn failed_job_says_why_on_stderr_and_prints_no_table() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let nowhere = ["--to", "unix:/nonexistent/stream"];

    let failed = pair.command("migrate", &nowhere).output().unwrap();
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(text(&failed.stdout), "", "no table of a job that failed");
    let stderr = text(&failed.stderr);
    let last = stderr.lines().last().unwrap();
    assert!(
        last.starts_with("pageferry: job 1 (outgoing) failed: ")
            && last.contains("/nonexistent/stream")
            && last.ends_with("; the guest is here, as it was before the migration"),
        "{stderr}"
    );

    let failed = pair.command("migrate", &nowhere).arg("--json").output().unwrap();
    assert_eq!(failed.status.code(), Some(1));
    let stdout = text(&failed.stdout);
    let object: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(object["status"], "failed");
    assert!(text(&failed.stderr).contains("job 2 (outgoing) failed"), "{failed:?}");

    let mut terminal = OnTerminal::spawn(&mut pair.command("migrate", &nowhere));
    let (status, drawn) = terminal.end();
    assert_eq!(status.code(), Some(1));
    assert!(drawn.contains("pageferry: job 3 (outgoing) failed"), "{drawn}");
    assert!(!drawn.contains("pages sent"), "{drawn}");

    // The reason is also there later.
    let watched = pair.command("watch", &[]).output().unwrap();
    assert_eq!(watched.status.code(), Some(1));
    assert!(text(&watched.stderr).contains("job 3 (outgoing) failed"), "{watched:?}");
}

#[test]
fn completed_job_prints_its_table_on_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let moved = pair.command("migrate", &["--to", &pair.address]).output().unwrap();
    assert_eq!(moved.status.code(), Some(0), "{moved:?}");
    assert!(text(&moved.stdout).contains("pages sent         4096 (16.0 MiB)"), "{moved:?}");
    assert!(!text(&moved.stderr).contains("pageferry:"), "{moved:?}");
    let there = pair.destination.client.status().unwrap();
    assert_eq!(there.counters.pages_received, PAGES);
}

#[test]
fn first_interrupt_leaves_the_job_and_says_how_to_cancel_it() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let mut terminal = OnTerminal::spawn(&mut pair.slow_migration());
    terminal.wait_for("pass 0");
    interrupt(&terminal.child);
    let (status, drawn) = terminal.end();
    assert_eq!(status.code(), Some(130), "{drawn}");
    let socket = pair.agent.socket().display();
    assert!(drawn.contains("the job goes on without this command"), "{drawn}");
    assert!(drawn.contains(&format!("pageferry cancel --socket {socket}")), "{drawn}");
    assert_eq!(pair.source.client.status().unwrap().phase, Phase::Passes, "the job goes on");
}

#[test]
fn second_interrupt_cancels_the_job() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let mut terminal = OnTerminal::spawn(&mut pair.slow_migration());
    terminal.wait_for("pass 0");
    interrupt(&terminal.child);
    terminal.wait_for("press Ctrl-C again");
    interrupt(&terminal.child);
    let (status, drawn) = terminal.end();
    assert_eq!(status.code(), Some(1), "{drawn}");
    assert!(drawn.contains("pageferry: job 1 (outgoing) was cancelled by an operator;"), "{drawn}");
    assert_eq!(pair.source.client.status().unwrap().phase, Phase::Cancelled);
    assert!(!pair.source.vmm.is_paused());
}

#[test]
fn interrupt_ends_a_watch_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let mut migrate =
        pair.slow_migration().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    pair.wait_for_passes();
    let mut terminal = OnTerminal::spawn(&mut pair.command("watch", &[]));
    terminal.wait_for("pass 0");
    interrupt(&terminal.child);
    assert_eq!(terminal.end().0.code(), Some(130));
    assert_eq!(pair.source.client.status().unwrap().phase, Phase::Passes);
    pair.source.client.cancel().unwrap();
    assert_eq!(migrate.wait().unwrap().code(), Some(1));
}

#[test]
fn progress_on_a_terminal_has_size_rate_and_time_and_fits_it() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let mut terminal = OnTerminal::spawn(&mut pair.slow_migration());
    terminal.wait_for(" of 16.0 MiB, ");
    terminal.wait_for(" left");
    pair.source.client.cancel().unwrap();
    let (_, drawn) = terminal.end();
    let bars: Vec<_> = drawn.lines().filter(|line| line.starts_with("pass ")).collect();
    assert!(!bars.is_empty(), "{drawn}");
    for bar in bars {
        assert!(bar.chars().count() <= 80, "{} columns: {bar}", bar.chars().count());
        assert!(bar.contains("/s, "), "no rate: {bar}");
    }
}

#[test]
fn watch_into_a_pipe_prints_lines_as_they_come() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let mut migrate =
        pair.slow_migration().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    pair.wait_for_passes();
    let mut watch = Process::spawn("watch", &mut pair.command("watch", &[])).unwrap();
    let line = watch.wait_for_line(" of 16.0 MiB, ", PATIENCE).unwrap();
    assert!(line.starts_with("pass 0 ") && line.contains("%, "), "{line}");
    // More lines come while nothing but the numbers changes.
    wait_until("two more lines", PATIENCE, || watch.lines().len() >= 3).unwrap();
    pair.source.client.cancel().unwrap();
    assert_eq!(watch.wait(PATIENCE).unwrap().code(), Some(1));
    assert!(
        watch.lines().last().unwrap().contains("was cancelled by the VMM;"),
        "{:?}",
        watch.lines()
    );
    migrate.wait().unwrap();
}

#[test]
fn closed_pipe_ends_every_command_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    let mut migrate =
        pair.slow_migration().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    pair.wait_for_passes();
    for (what, more) in [
        ("status", vec![]),
        ("status", vec!["--json"]),
        ("watch", vec![]),
        ("watch", vec!["--json"]),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = pair.command(what, &more);
        let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        let output = output.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(141), "{what} {more:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{what} {more:?}: {output:?}");
    }
    pair.source.client.cancel().unwrap();
    migrate.wait().unwrap();
}

#[test]
fn wrong_command_lines_end_with_2_and_name_the_flag() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::new(folder.path());
    for (more, sentence) in [
        (["--switch-after", "3"], "--switch-after needs --mode hybrid"),
        (["--policy", "postcopy"], "--policy postcopy needs --mode hybrid"),
        (["--hook-timeout", "0s"], "--hook-timeout"),
        (["--streams", "65"], "--streams"),
    ] {
        let mut command = pair.command("migrate", &["--to", &pair.address]);
        let output = command.args(more).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let stderr = text(&output.stderr);
        assert!(stderr.contains(sentence) && !stderr.contains("0x"), "{stderr}");
    }
    assert_eq!(pair.source.client.status().unwrap().phase, Phase::Idle, "no job was started");
}
