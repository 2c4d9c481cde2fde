// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the metrics say while jobs run, and between them.

use super::Side;
use pageferry_client::{IncomingOptions, OutgoingOptions, Phase, Punch};
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::{AgentProcess, Process, program};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::scrape::exchange;
use pageferry_tests::scenario::{At, Attached, Ram, SOON, Scrape};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

const PAGES: u64 = 1024;
const PAGE: f64 = 4096.0;

#[test]
fn a_migration_is_seen_from_its_start_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let source = Side::new(folder.path(), "source", PAGES);
    let destination = Side::new(folder.path(), "destination", PAGES);
    (0..PAGES).for_each(|page| source.vmm.ram.write(page, page + 1));
    let mut before = [source.scrape(), destination.scrape()];
    assert_eq!(before[0].phase(), "idle");
    assert_eq!(before[0].value("pageferry_memory_bytes"), PAGES as f64 * PAGE);
    assert_eq!(before[0].value("pageferry_memory_blocks"), 1.0);
    assert_eq!(before[0].value("pageferry_vmm_connected"), 1.0);

    let path = folder.path().join("stream");
    let incoming = destination.vmm.listen(&path, &IncomingOptions::default());
    assert_eq!(destination.scrape().value("pageferry_job_running{kind=\"incoming\"}"), 1.0);
    // 4 MiB: half a second.
    let slow = OutgoingOptions { bandwidth: 8 << 20, ..OutgoingOptions::default() };
    let outgoing = source.vmm.send(&path, &slow);
    let mut seen = 0;
    loop {
        let now = [source.scrape(), destination.scrape()];
        now.iter().zip(&before).for_each(|(now, before)| now.assert_not_less_than(before));
        if now[0].phase() == "passes" {
            assert_eq!(now[0].value("pageferry_job_running{kind=\"outgoing\"}"), 1.0);
            assert!(now[0].value("pageferry_job_remaining_bytes") <= PAGES as f64 * PAGE);
            seen += 1;
        }
        before = now;
        if before[0].value("pageferry_job_running{kind=\"outgoing\"}") == 0.0 && seen > 0 {
            break;
        }
    }
    assert!(seen > 5, "{seen} scrapes while the passes ran");
    assert_eq!(source.vmm.wait(outgoing).phase, Phase::Completed);
    assert_eq!(destination.vmm.wait(incoming).phase, Phase::Completed);

    let [here, there] = [source.scrape(), destination.scrape()];
    for (scrape, kind) in [(&here, "outgoing"), (&there, "incoming")] {
        let value = |series: &str| scrape.value(&series.replace("KIND", kind));
        assert_eq!(scrape.phase(), "completed");
        assert_eq!(value("pageferry_jobs_started_total{kind=\"KIND\"}"), 1.0);
        assert_eq!(value("pageferry_jobs_ended_total{kind=\"KIND\",outcome=\"completed\"}"), 1.0);
        assert_eq!(value("pageferry_pages_total{kind=\"KIND\",sort=\"content\"}"), PAGES as f64);
        assert!(value("pageferry_stream_bytes_total{kind=\"KIND\"}") > PAGES as f64 * PAGE);
        assert!(value("pageferry_passes_total{kind=\"KIND\"}") >= 1.0);
    }
    assert!(here.value("pageferry_job_downtime_seconds") > 0.0);
    assert!(here.value("pageferry_job_bandwidth_bytes_per_second") > 1e6);
    assert!(here.value("pageferry_job_duration_seconds") > 0.1);
}

#[test]
fn sums_grow_over_jobs_and_vmms() {
    let folder = tempfile::tempdir().unwrap();
    let mut side = Side::new(folder.path(), "agent", PAGES);
    side.vmm.ram.write(3, 7);
    let mut before = side.scrape();
    let mut next = |side: &Side| {
        let now = side.scrape();
        now.assert_not_less_than(&before);
        before = now.clone();
        now
    };
    for number in 1..=3 {
        let image = folder.path().join(format!("image-{number}"));
        let job = side.vmm.client.start_snapshot(&image, &paused()).unwrap().job;
        next(&side);
        assert_eq!(side.vmm.wait(job).phase, Phase::Completed);
        let seen = next(&side);
        let count = f64::from(number);
        assert_eq!(seen.value("pageferry_jobs_started_total{kind=\"snapshot\"}"), count);
        let completed = "pageferry_jobs_ended_total{kind=\"snapshot\",outcome=\"completed\"}";
        assert_eq!(seen.value(completed), count);
        assert_eq!(seen.value("pageferry_pages_total{kind=\"snapshot\",sort=\"content\"}"), count);
        assert_eq!(seen.value("pageferry_image_bytes_total{kind=\"snapshot\"}"), count * PAGE);
    }
    let job = side.vmm.send(&folder.path().join("nobody"), &OutgoingOptions::default());
    assert_eq!(side.vmm.wait(job).phase, Phase::Failed);
    let failed = "pageferry_jobs_ended_total{kind=\"outgoing\",outcome=\"failed\"}";
    assert_eq!(next(&side).value(failed), 1.0);

    // The next VMM: the sums are the agent's.
    drop(side.vmm);
    wait_for("the VMM to be gone", SOON, || {
        (Scrape::of(&side.metrics).value("pageferry_vmm_connected") == 0.0).then_some(())
    })
    .unwrap();
    assert_eq!(Scrape::of(&side.metrics).phase(), "failed");
    side.vmm = Attached::new(side.agent.socket(), Ram::odd(16));
    let seen = next(&side);
    assert_eq!((seen.value(failed), seen.phase()), (1.0, "idle"), "the job was not this VMM's");
    assert_eq!(seen.value("pageferry_memory_bytes"), 16.0 * PAGE);
    let job = side.vmm.send(&folder.path().join("nobody"), &OutgoingOptions::default());
    assert_eq!(side.vmm.wait(job).phase, Phase::Failed);
    assert_eq!(next(&side).value(failed), 2.0);
}

#[test]
fn discarded_memory_shows_within_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let side = Side::new(folder.path(), "agent", PAGES);
    assert_eq!(side.scrape().value("pageferry_memory_discarded_bytes"), 0.0);
    side.vmm.client.discard(&[side.vmm.ram.range(16, 32)], Punch::Yes).unwrap();
    wait_for("the discarded memory", SOON, || {
        (side.scrape().value("pageferry_memory_discarded_bytes") == 32.0 * PAGE).then_some(())
    })
    .unwrap();
}

#[test]
fn a_port_serves_metrics_and_a_socket_lets_its_group_in() {
    let folder = tempfile::tempdir().unwrap();
    let side = Side::new(folder.path(), "unix", 16);
    let mode = std::fs::metadata(&side.metrics).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);
    let metrics = side.metrics.clone();
    let Side { vmm, mut agent, .. } = side;
    drop(vmm);
    agent.process().terminate().unwrap();
    assert!(agent.process().wait(SOON).unwrap().success());
    assert!(!metrics.exists(), "the path is removed at the end");

    let more = ["--metrics", "127.0.0.1:0", "--name", "vm \"1\""];
    let mut command = Command::new(program());
    let mut agent = AgentProcess::start_with(&mut command, folder.path(), "tcp", &more).unwrap();
    let line = agent.process().wait_for_line("metrics on tcp:", SOON).unwrap();
    let (_, address) = line.rsplit_once("tcp:").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(",vm=\"vm \\\"1\\\"\"} 1\n"), "{answer}");
    drop(stream);

    // Another agent cannot have the same port, and says which option is wrong.
    let second = folder.path().join("second.sock");
    let mut command = Command::new(program());
    command.args(["agent", "--metrics", address, "--socket"]).arg(&second);
    let mut refused = Process::spawn("second", &mut command).unwrap();
    assert_eq!(refused.wait(SOON).unwrap().code(), Some(1));
    let lines = refused.lines().join("\n");
    let expected = format!("pageferry: --metrics: cannot listen on tcp:{address}");
    assert!(lines.contains(&expected), "{lines}");
    assert!(!second.exists(), "it did not listen");
}

#[test]
fn an_address_that_is_none_is_refused_with_the_option() {
    let output = Command::new(program())
        .args(["agent", "--socket", "/nonexistent/socket", "--metrics", "9091"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("--metrics") && error.contains("or HOST:PORT"), "{error}");
}

#[test]
fn other_requests_get_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let side = Side::new(folder.path(), "agent", 16);
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("DELETE /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        ("SSH-2.0-OpenSSH_9.7\r\n", "400 Bad Request"),
    ] {
        let answer = exchange(&side.metrics, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
        assert!(answer.lines().last().unwrap().len() > 20, "{answer}");
    }
    let answer = exchange(
        &side.metrics,
        b"GET /metrics HTTP/1.1\r\nAccept: text/plain;version=0.0.4\r\n\r\n",
    );
    assert!(answer.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
    check_with_promtool(answer.split_once("\r\n\r\n").unwrap().1);
}

/// Checks the text with Prometheus' own tool, where it is installed.
fn check_with_promtool(text: &str) {
    let started = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut promtool = match started {
        Ok(promtool) => promtool,
        Err(error) => return eprintln!("skipped: promtool: {error}"),
    };
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let checked = promtool.wait_with_output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn a_scrape_does_not_wait_for_a_vmm_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let side = Side::new(folder.path(), "agent", 16);
    let release = side.vmm.vmm.block(At::Pause);
    let image = folder.path().join("image");
    let job = side.vmm.client.start_snapshot(&image, &paused()).unwrap().job;
    wait_for("the job to run", SOON, || {
        (side.scrape().value("pageferry_job_running{kind=\"snapshot\"}") == 1.0).then_some(())
    })
    .unwrap();
    (0..10).for_each(|_| drop(side.scrape()));
    let phase = side.vmm.client.status().unwrap().phase;
    assert!(!phase.is_final(), "the VMM still hangs, and the scrapes were answered");
    drop(release);
    assert_eq!(side.vmm.wait(job).phase, Phase::Completed);
}
