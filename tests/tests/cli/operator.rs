// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Commands of an operator beside the VMM: status, watch, migrate, cancel, and their errors.

use super::side::{PAGES, Side, last_object, text};
use pageferry_client::{IncomingOptions, OutgoingOptions, Phase, Punch, Target, Trackers};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Ram};
use pageferry_tests::vmm::PATIENCE;
use serde_json::{Value, json};
use std::process::{Command, Stdio};

#[test]
fn an_operator_migrates_a_guest_and_reads_how_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) =
        (Side::new(folder.path(), "source"), Side::new(folder.path(), "destination"));
    let table = text(&source.run("status", &[]).stdout);
    assert!(
        table.ends_with(
            "trackers           log-is-complete\njob                no job was started yet\n"
        ),
        "{table}"
    );
    source.vmm.ram.write(17, 1234);
    let address = format!("unix:{}", folder.path().join("stream").display());
    let listen = Target::Address(address.clone());
    let incoming =
        destination.vmm.client.start_incoming(listen, &IncomingOptions::default()).unwrap().job;

    let migrated = source
        .run("migrate", &["--to", &address, "--streams", "2", "--compress", "zstd:3", "--json"]);
    assert!(migrated.status.success(), "{migrated:?}");
    assert_eq!(last_object(&migrated)["status"], "completed");
    assert_eq!(destination.vmm.client.wait(incoming, PATIENCE).unwrap().phase, Phase::Completed);
    assert_eq!(destination.vmm.ram.stamp(17), 1234);
    assert!(source.vmm.vmm.is_paused());

    let seen = source.json("status");
    assert_eq!(
        (&seen["status"], &seen["pages_sent"], &seen["job"]),
        (&"completed".into(), &1.into(), &1.into())
    );
    let wire_bytes = seen["wire_bytes"].as_u64().unwrap();
    // The state of the VMM alone has 3000 bytes.
    assert!(
        wire_bytes < 4096 + 3000,
        "the page was not compressed: {wire_bytes} bytes on the wire"
    );
    assert!(source.run("watch", &[]).status.success(), "the last job is shown");
    let table = text(&source.run("status", &[]).stdout);
    assert!(
        table.contains("1 outgoing") && table.contains("pages sent         1 (4.0 KiB)"),
        "{table}"
    );

    // The VMM leaves. An operator still finds the final status of its job, until the next VMM
    // connects.
    let Side { vmm, agent } = source;
    drop(vmm);
    let mut left = Value::Null;
    wait_until("the VMM is gone", PATIENCE, || {
        let mut status = Command::new(program());
        let status = status.args(["status", "--json", "--socket"]).arg(agent.socket()).output();
        left = last_object(&status.unwrap());
        left["agent"]["vmm_pid"].is_null()
    })
    .unwrap();
    assert_eq!(left["agent"]["blocks"], json!([]));
    assert_eq!((&left["job"], &left["status"]), (&seen["job"], &seen["status"]));
    assert_eq!(left["pages_sent"], seen["pages_sent"]);
    let source = Side { vmm: Attached::new(agent.socket(), Ram::odd(PAGES)), agent };
    assert_eq!(source.json("status")["status"], "idle", "the job was not this VMM's");
    let options = OutgoingOptions::default();
    let job = source
        .vmm
        .client
        .start_outgoing(Target::Address("unix:/nonexistent/stream".into()), &options)
        .unwrap()
        .job;
    assert_eq!(job, 2, "job numbers continue");
    assert_eq!(source.vmm.client.wait(job, PATIENCE).unwrap().phase, Phase::Failed);
    assert_eq!(source.json("status")["status"], "failed");
}

#[test]
fn pages_that_the_vmm_has_queued_are_not_sent_for_an_operator() {
    for trackers in [Trackers::HOOKS, Trackers::LOG_IS_COMPLETE] {
        let folder = tempfile::tempdir().unwrap();
        let (source, destination) =
            (Side::new(folder.path(), "source"), Side::new(folder.path(), "destination"));
        let vmm = &source.vmm;
        vmm.client.set_trackers(trackers).unwrap();
        (0..PAGES).for_each(|page| vmm.ram.write(page, page + 1));
        // A balloon in its own order, and memory that is unplugged.
        for page in (0u64..3000).rev().filter(|page| !page.is_multiple_of(3)) {
            vmm.client.free_later(&[vmm.ram.range(page, 1)]).unwrap();
        }
        vmm.client.discard_later(&[vmm.ram.range(3500, 500)], Punch::Yes).unwrap();
        let address = format!("unix:{}", folder.path().join("stream").display());
        let incoming =
            destination.vmm.listen(&folder.path().join("stream"), &IncomingOptions::default());
        let migrated = source.run("migrate", &["--to", &address, "--json"]);
        assert!(migrated.status.success(), "{migrated:?}");
        assert_eq!(destination.vmm.wait(incoming).phase, Phase::Completed);
        let sent = last_object(&migrated)["pages_sent"].as_u64().unwrap();
        assert_eq!(sent, PAGES - 2000 - 500, "{trackers}");
        assert_eq!(vmm.client.flush().unwrap(), 2000 + 500, "they were done for the job");
        let given =
            |page: &u64| (*page < 3000 && !page.is_multiple_of(3)) || (3500..4000).contains(page);
        for page in 0..PAGES {
            let hole = destination.vmm.ram.is_hole(page);
            assert_eq!(hole, given(&page), "page {page}");
            assert!(hole || destination.vmm.ram.stamp(page) == page + 1);
        }
    }
}

#[test]
fn an_operator_cancels_and_whoever_watches_sees_it_end() {
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) =
        (Side::new(folder.path(), "source"), Side::new(folder.path(), "destination"));
    (0..PAGES).for_each(|page| source.vmm.ram.write(page, page + 1));
    let address = format!("unix:{}", folder.path().join("stream").display());
    destination
        .vmm
        .client
        .start_incoming(Target::Address(address.clone()), &IncomingOptions::default())
        .unwrap();
    // 16 MiB at 64 KiB per second: the job does not end by itself.
    let migrate = source.command("migrate", &["--to", &address, "--bandwidth", "64K", "--json"]);
    let migrate = { migrate }.stdout(Stdio::piped()).spawn().unwrap();
    wait_until("passes", PATIENCE, || source.vmm.client.status().unwrap().phase == Phase::Passes)
        .unwrap();
    let watch = { source.command("watch", &["--json"]) }.stdout(Stdio::piped()).spawn().unwrap();
    let cancelled = source.run("cancel", &["--json"]);
    assert!(cancelled.status.success(), "{cancelled:?}");
    for watching in [migrate, watch] {
        let output = watching.wait_with_output().unwrap();
        assert!(!output.status.success(), "the migration did not happen");
        assert_eq!(last_object(&output)["status"], "cancelled");
    }
    assert!(!source.vmm.vmm.is_paused());
}

#[test]
fn an_error_is_one_sentence_on_stderr_and_an_exit_status() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::new(folder.path(), "source");
    for (what, more, sentence) in [
        ("cancel", vec![], "no job is running"),
        ("resume", vec!["--force"], "was not handed over"),
        ("postcopy", vec![], "no outgoing migration is running"),
    ] {
        let output = source.run(what, &more);
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        let error = text(&output.stderr);
        assert!(error.starts_with("pageferry: ") && error.lines().count() == 1, "{what}: {error}");
        assert!(error.contains(sentence), "{what}: {error}");
        assert!(output.stdout.is_empty(), "{what}");
    }
    // Whatever would have failed for the lack of descriptors.
    let script = format!("ulimit -n 20 && exec {} agent --socket ./agent", program().display());
    let few = Command::new("sh").arg("-c").arg(script).current_dir(folder.path()).output();
    let few = few.unwrap();
    assert_eq!(few.status.code(), Some(1), "{few:?}");
    let named = "at most 20 open files (ulimit -n), and needs at least 64";
    assert!(text(&few.stderr).contains(named), "{few:?}");
    let nobody = Command::new(program())
        .args(["status", "--socket", "/nonexistent/agent"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stderr).contains("no agent answers on /nonexistent/agent"), "{nobody:?}");
}

#[test]
fn bad_targets_and_times_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (source, other) = (Side::new(folder.path(), "source"), Side::new(folder.path(), "other"));
    let control = format!("unix:{}", other.agent.socket().display());
    let output = source.run("migrate", &["--to", "carrier:pigeon"]);
    assert_eq!(
        output.status.code(),
        Some(2),
        "a wrong command line, whether there is an agent or not"
    );
    let error = text(&output.stderr);
    assert!(error.contains("carrier:pigeon") && error.contains("tcp:HOST:PORT"), "{error}");
    let output = source.run("migrate", &["--to", &control, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let error = last_object(&output)["error"].as_str().unwrap().to_owned();
    assert!(
        error.contains("no destination that waits for a guest (a control socket is none)"),
        "{error}"
    );
    assert!(!source.vmm.vmm.is_paused());
    let output = source.run("migrate", &["--to", &control, "--peer-timeout", "1e9s"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        error.contains("--peer-timeout") && error.contains("write a time from 1us to 24h"),
        "{error}"
    );
}

#[test]
fn an_agent_that_is_stopped_is_named_with_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    agent.process().freeze().unwrap();
    let output =
        Command::new(program()).args(["status", "--socket"]).arg(agent.socket()).output().unwrap();
    agent.process().thaw().unwrap();
    let error = text(&output.stderr);
    let expected = format!("the agent on {} has not answered for 1", agent.socket().display());
    assert!(error.contains(&expected) && error.contains("s: it is stopped, or hangs"), "{error}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::new(folder.path(), "source");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output =
        source.command("status", &[]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141), "as after SIGPIPE");
    assert!(output.stderr.is_empty(), "{output:?}");
}
