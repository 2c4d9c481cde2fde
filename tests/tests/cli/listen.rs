// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations that an operator alone arranges: `listen` at the destination, which asks its VMM, and
//! `set` for a job that runs.

use super::side::{PAGES, Side};
use pageferry_client::{HookError, Ownership, Phase, SnapshotOptions};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{At, lock};
use pageferry_tests::vmm::PATIENCE;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Output, Stdio};

/// Starts to listen at a port that the kernel chooses. Returns the command, and the address.
fn listen(side: &Side) -> (Child, String) {
    listen_with(side, &[])
}

/// The same, with `more` options.
fn listen_with(side: &Side, more: &[&str]) -> (Child, String) {
    let mut command = side.command("listen", &["tcp:127.0.0.1:0", "--json"]);
    command.args(more);
    let mut listening = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let first = next_line(&mut listening);
    let object: Value = serde_json::from_str(&first).unwrap();
    (listening, object["listening"].as_str().unwrap().to_owned())
}

/// The next line of the standard output of a command.
fn next_line(command: &mut Child) -> String {
    let mut line = String::new();
    // A line at a time: the rest stays in the pipe.
    let mut stdout = BufReader::with_capacity(1, command.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    command.stdout = Some(stdout.into_inner());
    line
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn an_operator_moves_a_guest_into_a_vmm_that_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::full(folder.path(), "source");
    let destination = Side::full(folder.path(), "destination");
    destination.vmm.ram.write(3, 999);

    // A VMM refuses, unless its author has written the hooks: before anybody waits for a source.
    let refused = destination.run("listen", &["tcp:127.0.0.1:0"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let named = "the VMM does not wait for a guest: this VMM does not wait for a migration at";
    assert!(stderr(&refused).contains(named), "{refused:?}");
    assert!(refused.stdout.is_empty() && !stderr(&refused).contains("listens"), "{refused:?}");

    // One that changes its mind refuses when the source is here. Both guests stay where they are.
    let changed = || Err(HookError::new("this VMM does not wait for a migration any more"));
    destination.vmm.vmm.on(At::AcceptGuest, changed);
    let (listening, address) = listen(&destination);
    let status = destination.run("status", &[]);
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("waits for a source to connect"), "{status}");
    let moved = source.run("migrate", &["--to", &address]);
    assert_eq!(moved.status.code(), Some(1), "{moved:?}");
    assert!(stderr(&moved).contains("the guest is here, as it was before"), "{moved:?}");
    let listened = listening.wait_with_output().unwrap();
    assert_eq!(listened.status.code(), Some(1), "{listened:?}");
    let said = stderr(&listened);
    assert!(said.contains("does not wait for a migration any more"), "{said}");
    assert!(said.contains("; a guest that this VMM had before goes on"), "{said}");
    assert_eq!(destination.vmm.client.ownership(), Ownership::Ours);
    assert_eq!(destination.vmm.ram.stamp(3), 999);
    assert!(!source.vmm.vmm.is_paused());

    // Until a source comes, the guest of the destination is its own: it frees, and is kept if the
    // job is cancelled.
    let vmm = destination.vmm.vmm.clone();
    destination.vmm.vmm.on(At::AcceptGuest, move || {
        lock(&vmm.asked).paused = true;
        Ok(())
    });
    let (listening, _) = listen(&destination);
    assert_eq!(destination.vmm.client.populate(&[destination.vmm.ram.range(0, 1)]).unwrap(), 0);
    assert!(destination.run("cancel", &[]).status.success());
    assert_eq!(listening.wait_with_output().unwrap().status.code(), Some(1));
    assert_eq!(destination.vmm.client.ownership(), Ownership::Ours);

    let (listening, address) = listen(&destination);
    let moved = source.run("migrate", &["--to", &address]);
    assert!(moved.status.success(), "{moved:?}");
    let listened = listening.wait_with_output().unwrap();
    assert!(listened.status.success(), "{listened:?}");
    assert!((0..PAGES).all(|page| destination.vmm.ram.stamp(page) == page + 1));
    assert_eq!(source.vmm.client.ownership(), Ownership::Gone);
    assert_eq!(destination.vmm.client.ownership(), Ownership::Ours);
    assert!(!destination.vmm.vmm.is_paused());

    // Addresses that cannot be listened at are refused at once.
    for (wrong, code, word) in
        [("7000", 2, "tcp:HOST:PORT"), ("unix:/nowhere/at/all", 1, "/nowhere/at/all")]
    {
        let refused = destination.run("listen", &[wrong]);
        assert_eq!(refused.status.code(), Some(code));
        assert!(stderr(&refused).contains(word), "{refused:?}");
    }
}

#[test]
fn an_operator_who_wants_no_huge_pages_reads_that_there_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::full(folder.path(), "source");
    let mut destination = Side::new(folder.path(), "destination");
    destination.vmm.vmm.on(At::AcceptGuest, || Ok(()));
    let refused = destination.run("listen", &["tcp:127.0.0.1:0", "--huge-pages", "always"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let (listening, address) = listen_with(&destination, &["--huge-pages", "never"]);
    let moved = source.run("migrate", &["--to", &address, "--huge-pages", "auto"]);
    assert!(moved.status.success(), "{moved:?}");
    assert!(listening.wait_with_output().unwrap().status.success());
    let why = "no huge pages: the job was told to make none";
    let object = destination.json("status");
    assert_eq!(object["placing"], "pages", "{object}");
    assert_eq!(object["placing_reason"], why);
    assert_eq!(object["huge_pages"], 0);
    let said = String::from_utf8(destination.run("status", &[]).stdout).unwrap();
    let line = format!("placing            through a mapping, page by page ({why})\n");
    assert!(said.contains(&line), "{said}");
    // The job that sends does not place.
    assert_eq!(source.json("status")["placing"], Value::Null);
    let logged = destination.agent.process().lines();
    let logged = logged.iter().filter(|line| line.contains(why)).count();
    assert_eq!(logged, 1);
}

/// A VMM that takes its time is not waited for once the job is cancelled, and its guest goes on.
#[test]
fn a_listen_is_cancelled_while_the_vmm_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::full(folder.path(), "source");
    let destination = Side::full(folder.path(), "destination");
    let (release, resumes) =
        (destination.vmm.vmm.block(At::AcceptGuest), destination.vmm.vmm.resumes());
    let (listening, address) = listen(&destination);
    let migrate = source.command("migrate", &["--to", &address]);
    let migrate = { migrate }.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the question", PATIENCE, || {
        let status = destination.vmm.client.status().unwrap();
        status.error_text().contains("the VMM is asked whether it takes this guest")
    })
    .unwrap();
    assert!(destination.run("cancel", &[]).status.success());
    // The hook has not returned.
    let listened = listening.wait_with_output().unwrap();
    assert_eq!(listened.status.code(), Some(1));
    let moved = migrate.wait_with_output().unwrap();
    assert_eq!(moved.status.code(), Some(1));
    assert!(stderr(&moved).contains("before it accepted the guest"), "{moved:?}");
    assert!(!source.vmm.vmm.is_paused());
    // The VMM wakes up late, agrees, and is told that no guest comes. Its own goes on.
    drop(release);
    wait_until("the guest to go on", PATIENCE, || destination.vmm.vmm.resumes() > resumes).unwrap();
    assert_eq!(destination.vmm.client.ownership(), Ownership::Ours);
    assert_eq!(destination.vmm.ram.stamp(3), 4);
    let image = folder.path().join("image");
    let mode = pageferry_client::SnapshotMode::Paused;
    let paused = SnapshotOptions { mode, ..SnapshotOptions::default() };
    let job = destination.vmm.client.start_snapshot(&image, &paused).unwrap().job;
    assert_eq!(destination.vmm.client.wait(job, PATIENCE).unwrap().phase, Phase::Completed);
}

#[test]
fn an_agent_that_is_ended_tells_how_its_job_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut side = Side::new(folder.path(), "agent");
    side.vmm.vmm.on(At::AcceptGuest, || Ok::<(), HookError>(()));
    let (mut listening, _) = listen(&side);
    // The command watches the job.
    assert!(next_line(&mut listening).contains("connecting"));
    side.agent.process().terminate().unwrap();
    let listened = listening.wait_with_output().unwrap();
    assert_eq!(listened.status.code(), Some(1));
    let said = stderr(&listened);
    assert!(said.contains("job 1 (incoming) was cancelled because the agent was ended"), "{said}");
}

/// Once the agent has changed the memory, the guest that was there is lost, and the operator reads
/// it.
#[test]
fn a_guest_that_was_given_up_for_one_that_dies_on_its_way_is_said_to_be_lost() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = Side::full(folder.path(), "source");
    let destination = Side::full(folder.path(), "destination");
    destination.vmm.vmm.on(At::AcceptGuest, || Ok::<(), HookError>(()));
    let (listening, address) = listen(&destination);
    let slow = ["--to", &address, "--bandwidth", "64K", "--detach"];
    assert!(source.run("migrate", &slow).status.success());
    wait_until("pages", PATIENCE, || {
        destination.vmm.client.status().unwrap().counters.pages_received > 0
    })
    .unwrap();
    source.agent.process().kill().unwrap();
    let listened = listening.wait_with_output().unwrap();
    assert_eq!(listened.status.code(), Some(1));
    let said = stderr(&listened);
    assert!(said.contains("so a guest that this VMM had before, if any, is lost"), "{said}");
    assert_eq!(destination.vmm.client.ownership(), Ownership::Awaiting);
}

/// A guest that never left keeps its chain of images.
#[test]
fn a_listen_for_nobody_ends_no_increments() {
    let folder = tempfile::tempdir().unwrap();
    let side = Side::full(folder.path(), "agent");
    let paused = SnapshotOptions {
        mode: pageferry_client::SnapshotMode::Paused,
        track: true,
        ..SnapshotOptions::default()
    };
    let image = |name: &str| folder.path().join(name);
    let job = side.vmm.client.start_snapshot(&image("one"), &paused).unwrap().job;
    assert_eq!(side.vmm.client.wait(job, PATIENCE).unwrap().phase, Phase::Completed);
    side.vmm.vmm.on(At::AcceptGuest, || Ok::<(), HookError>(()));
    let (listening, _) = listen(&side);
    assert!(side.run("cancel", &[]).status.success());
    assert_eq!(listening.wait_with_output().unwrap().status.code(), Some(1));
    let increment = SnapshotOptions { base: image("one").display().to_string(), ..paused };
    let job = side.vmm.client.start_snapshot(&image("two"), &increment).unwrap().job;
    let status = side.vmm.client.wait(job, PATIENCE).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
}

#[test]
fn an_operator_changes_a_job_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::full(folder.path(), "source");
    let refused = |more: &[&str], code, word: &str| {
        let refused = source.run("set", more);
        assert_eq!(refused.status.code(), Some(code), "{refused:?}");
        assert!(stderr(&refused).contains(word), "{refused:?}");
    };
    refused(&[], 2, "--bandwidth");
    refused(&["--throttle", "100"], 2, "--throttle");
    refused(&["--bandwidth", "0"], 1, "no job is running");

    // A snapshot has only the bandwidth.
    let image = folder.path().join("image");
    let slow = SnapshotOptions {
        mode: pageferry_client::SnapshotMode::Paused,
        bandwidth: 64 << 10,
        ..SnapshotOptions::default()
    };
    let job = source.vmm.client.start_snapshot(&image, &slow).unwrap().job;
    refused(&["--throttle", "3"], 1, "throttle: job 1 is a snapshot");
    let set = source.run("set", &["--bandwidth", "0"]);
    assert!(set.status.success(), "{set:?}");
    assert_eq!(source.vmm.client.wait(job, PATIENCE).unwrap().phase, Phase::Completed);

    // A migration that does not end by itself: no pass of 64 KiB/s fits the downtime limit.
    let destination = Side::full(folder.path(), "destination");
    destination.vmm.vmm.on(At::AcceptGuest, || Ok::<(), HookError>(()));
    let (listening, address) = listen(&destination);
    let migrate = source.command("migrate", &["--to", &address, "--bandwidth", "64K"]);
    let migrate = { migrate }.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("passes", PATIENCE, || source.vmm.client.status().unwrap().phase == Phase::Passes)
        .unwrap();
    let remaining = source.vmm.client.status().unwrap().counters.remaining_pages;
    assert!(remaining > 0 && remaining <= PAGES, "{remaining} of {PAGES} pages");
    wait_until("fewer pages", PATIENCE, || {
        source.vmm.client.status().unwrap().counters.remaining_pages < remaining
    })
    .unwrap();
    refused(&["--policy", "postcopy"], 1, "it takes hybrid");
    refused(&["--switch-after", "3"], 1, "hybrid");
    let set = source.run("set", &["--throttle", "40", "--downtime-limit", "0ms", "--json"]);
    assert!(set.status.success(), "{set:?}");
    let set = source.run("set", &["--bandwidth", "0"]);
    assert!(set.status.success(), "{set:?}");
    let moved = migrate.wait_with_output().unwrap();
    assert!(moved.status.success(), "{moved:?}");
    assert!(listening.wait_with_output().unwrap().status.success());
    assert!((0..PAGES).all(|page| destination.vmm.ram.stamp(page) == page + 1));
}
