// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A flood of strangers at the migration port: the right source gets through, and the agent uses
//! no more memory and descriptors than it may.

use super::scene::{Host, PAGES, moves_to};
use pageferry_agent::trust::{Connection, Trust};
use pageferry_client::{Mode, OutgoingOptions, Parameters, Phase};
use pageferry_protocol::memory::BlockTable;
use pageferry_protocol::stream::hello::FEATURES;
use pageferry_protocol::stream::{Hello, Kind, RecordHeader, STREAM_VERSION};
use pageferry_tests::certificates::Authority;
use pageferry_tests::flood::{Flood, Stranger};
use pageferry_tests::proxy::Proxy;
use pageferry_tests::require;
use pageferry_tests::scenario::Ram;
use rustls::unbuffered::ConnectionState;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

const NAMES: [&str; 2] = ["localhost", "host-a"];
const KINDS: [&str; 2] = ["tcp", "tls"];
const STRANGERS: usize = 5_000;
const MIB: u64 = 1 << 20;

/// What a source sends first over TLS.
fn client_hello(certificates: &Path) -> Vec<u8> {
    let trust = Trust::in_folder(certificates, &[]).unwrap();
    let Connection::Client(mut client) = trust.connect("localhost").unwrap().connection else {
        panic!("a source is a client");
    };
    let Ok(ConnectionState::EncodeTlsData(mut hello)) = client.process_tls_records(&mut []).state
    else {
        panic!("a client speaks first");
    };
    let mut bytes = vec![0; 4096];
    let length = hello.encode(&mut bytes).unwrap();
    bytes.truncate(length);
    bytes
}

/// The hello of a source whose guest fits nowhere, with more streams than it connects.
fn wrong_hello(stream: u16) -> Vec<u8> {
    let hello = Hello {
        version_min: STREAM_VERSION,
        version_max: STREAM_VERSION,
        features: FEATURES,
        session: [7; 16],
        stream,
        streams: 8,
        urgent: 1,
        flags: 0,
        blocks: BlockTable::new(),
    };
    let payload = hello.encode();
    let header = RecordHeader::plain(Kind::Hello, 0, payload.len()).with_checksum(&payload);
    [&header.to_wire()[..], &payload].concat()
}

fn mix(certificates: &Path) -> Vec<Stranger> {
    let shake = client_hello(certificates);
    vec![
        Stranger::Silent,
        Stranger::Garbage,
        Stranger::Slow(shake.clone()),
        Stranger::Slow(wrong_hello(0)),
        Stranger::Says(shake[..shake.len() / 2].to_vec()),
        Stranger::Says(shake),
        Stranger::Gone,
        Stranger::Says(wrong_hello(0)),
        Stranger::Says(wrong_hello(3)),
    ]
}

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// A number from the agent's `status` in /proc, in bytes.
fn memory_of(host: &mut Host, field: &str) -> u64 {
    let path = format!("/proc/{}/status", host.agent().process().id());
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches([':', ' ', '\t', 'k', 'B']).parse::<u64>().unwrap() * 1024
}

fn descriptors_of(host: &mut Host) -> usize {
    let path = format!("/proc/{}/fd", host.agent().process().id());
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn a_flood_of_strangers_keeps_no_source_out() {
    let certificates = Authority::new("ca").folder(NAMES);
    for kind in KINDS {
        for streams in [1, 4] {
            let source = Host::source(certificates.path());
            let mut destination = Host::destination(certificates.path());
            let (job, port) = destination.listen_over(kind);
            let (memory, descriptors) =
                (memory_of(&mut destination, "VmHWM"), descriptors_of(&mut destination));
            let flood = Flood::start(
                Ipv4Addr::LOCALHOST,
                at(port),
                STRANGERS,
                &mix(certificates.path()),
                2,
            )
            .unwrap();
            let status = destination.attached.client.status().unwrap();
            assert_eq!((status.job, status.phase), (job, Phase::Connecting));
            assert!(status.error_text().len() < 1200, "{}", status.error_text());
            let flooded = descriptors_of(&mut destination);
            // Those that the gate allows, refused ones that stay a moment, and some for others.
            let allowed = 4096 + 1024 + 1024 + 256 + 128 + 32;
            assert!(flooded < descriptors + allowed, "{descriptors}: {flooded}");
            let options = OutgoingOptions { streams, ..OutgoingOptions::default() };
            moves_to(&source, &destination, job, &format!("{kind}:localhost:{port}"), &options);
            let most = memory_of(&mut destination, "VmHWM");
            assert!(most < memory + 64 * MIB, "{kind}: {} MiB", (most - memory) / MIB);
            drop(flood);
        }
    }
}

#[test]
fn a_flood_of_strangers_keeps_no_recovery_out() {
    if !require::uffd() {
        return;
    }
    let certificates = Authority::new("ca").folder(NAMES);
    for kind in KINDS {
        let source = Host::source(certificates.path());
        let destination = Host::new(Ram::odd(PAGES).mapped(), certificates.path(), &[]);
        let (job, port) = destination.listen_over(kind);
        let proxy = Proxy::to(&format!("tcp:127.0.0.1:{port}")).unwrap();
        let (_, through) = proxy.address().rsplit_once(':').unwrap();
        let client = &source.attached.client;
        let options = OutgoingOptions {
            mode: Mode::Postcopy,
            streams: 2,
            bandwidth: MIB / 4,
            ..OutgoingOptions::default()
        };
        let target = format!("{kind}:localhost:{through}");
        let outgoing = client.start_outgoing(pageferry_client::Target::Address(target), &options);
        let outgoing = outgoing.unwrap().job;
        source.reaches(Phase::Postcopy);
        destination.reaches(Phase::Postcopy);
        proxy.cut();
        source.reaches(Phase::PostcopyPaused);
        let why = destination.reaches(Phase::PostcopyPaused);
        let flood =
            Flood::start(Ipv4Addr::LOCALHOST, at(port), STRANGERS, &mix(certificates.path()), 2)
                .unwrap();
        let status = destination.attached.client.status().unwrap();
        assert_eq!((status.phase, status.error_text()), (Phase::PostcopyPaused, why.error_text()));
        let address = format!("{kind}:localhost:{port}");
        client.recover(Some(&address), &options).unwrap();
        // A recovery that fails pauses both again.
        destination.reaches(Phase::Postcopy);
        // Refused if all is there already.
        let _ = client.set_parameters(&Parameters::bandwidth(0));
        source.completes(outgoing);
        destination.completes(job);
        pageferry_tests::scenario::assert_same(&source.attached.ram, &destination.attached.ram);
        drop(flood);
    }
}

/// Two threads that only use the processor.
struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    fn start() -> Self {
        let stop = Arc::<AtomicBool>::default();
        let spin = |stop: Arc<AtomicBool>| {
            spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        let threads = [stop.clone(), stop.clone()].map(spin).into();
        Self { stop, threads }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// How long a migration takes from the request on, with and without strangers. `docs/tls.md` has
/// what it printed.
#[test]
#[ignore = "it measures: run it alone, in a release build, with --nocapture"]
fn what_strangers_cost_a_source() {
    const ROUNDS: usize = 7;
    let certificates = Authority::new("ca").folder(NAMES);
    let shakes = vec![Stranger::Says(client_hello(certificates.path()))];
    let floods = [
        ("none", Vec::new()),
        // What the threads of a flood cost by themselves.
        ("none, two busy threads", vec![]),
        ("all kinds", mix(certificates.path())),
        ("silent", vec![Stranger::Silent]),
        ("handshakes begun", shakes.clone()),
        ("handshakes begun at another address", shakes),
    ];
    for kind in ["tls", "tcp"] {
        for streams in [1, 8] {
            for (name, strangers) in &floods {
                let mut times = Vec::new();
                let mut rate = 0.0;
                for _ in 0..ROUNDS {
                    let source = Host::source(certificates.path());
                    let destination = Host::destination(certificates.path());
                    let (job, port) = destination.listen_over(kind);
                    let last = if name.contains("another") { 9 } else { 1 };
                    let from = Ipv4Addr::new(127, 0, 0, last);
                    let flood = (!strangers.is_empty())
                        .then(|| Flood::start(from, at(port), STRANGERS, strangers, 2).unwrap());
                    let busy = name.contains("busy").then(Busy::start);
                    let before = flood.as_ref().map_or(0, Flood::connected);
                    let options = OutgoingOptions { streams, ..OutgoingOptions::default() };
                    let began = Instant::now();
                    let address = format!("{kind}:localhost:{port}");
                    moves_to(&source, &destination, job, &address, &options);
                    let took = began.elapsed();
                    drop(busy);
                    let after = flood.as_ref().map_or(0, Flood::connected);
                    rate += (after - before) as f64 / took.as_secs_f64() / ROUNDS as f64;
                    times.push(took);
                }
                times.sort();
                let (middle, longest) = (times[ROUNDS / 2], times[ROUNDS - 1]);
                let millis = |time: Duration| time.as_millis();
                eprintln!(
                    "{kind}, {streams} streams, {name}: {} ms, at most {} ms; \
                     {rate:.0} strangers a second",
                    millis(middle),
                    millis(longest)
                );
            }
        }
    }
}
