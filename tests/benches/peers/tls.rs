// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same migration in plain text and over TLS, in turn.
//!
//! The guest is small, so that the pages which one run gives back are those of the next: on a
//! virtual machine, first touches cost more than all that is compared here.

use super::Bench;
use super::image::{Image, full_guest, warm_large_pages};
use super::ours::{Side, migrate_over};
use super::postcopy::{self, Listens};
use super::qemu::{Mode, TLS_HOST};
use super::table::{Better, Table, median};
use pageferry_agent::transport::{RecordReader, StreamSocket};
use pageferry_agent::trust::Trust;
use pageferry_client::{IncomingOptions, OutgoingOptions};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::stream::{Kind, RecordHeader};
use pageferry_tests::certificates::Authority;
use pageferry_tests::require;
use rustix::io::IoSlice;
use rustix::time::{ClockId, clock_gettime};
use std::fs::{Permissions, set_permissions, write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

const WORK: &str = "tls";
const GIB: u64 = 1 << 30;
/// A bandwidth limit that both should reach, in bytes per second.
const LIMIT: u64 = 800_000_000;

/// The two that are compared, and where their destinations listen.
const PLAIN: (&str, &str) = ("plain", "tcp:127.0.0.1:0");
const TLS: (&str, &str) = ("TLS", "tls:127.0.0.1:0");

/// A way to move the guest, and what it cost in each round.
struct Way {
    name: String,
    address: &'static str,
    options: OutgoingOptions,
    rates: Vec<f64>,
    /// Processor time of both agents, in seconds per GiB.
    processor: Vec<f64>,
}

impl Way {
    fn new(name: &str, address: &'static str, options: &OutgoingOptions) -> Self {
        let (rates, processor) = Default::default();
        Self { name: name.to_owned(), address, options: options.clone(), rates, processor }
    }

    fn run(&mut self, source: &Image, destination: &Image, arguments: &[&str]) {
        let [from, to] = [source, destination].map(|image| Side::with_arguments(image, arguments));
        let incoming = IncomingOptions::default();
        let done = migrate_over(self.address, from, to, &self.options, &incoming);
        assert_eq!(done.status.counters.pages_sent, source.size / 4096);
        self.rates.push(source.size as f64 / done.time.as_secs_f64() / 1e9);
        self.processor.push(done.processor * GIB as f64 / source.size as f64);
    }
}

/// 512 MiB of random pages over TCP loopback, and the faults of a postcopy.
pub fn tls(bench: &Bench, table: &mut Table) {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    write(&token, "a token that is as good as any for a bench").unwrap();
    set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    let (source, destination, _warm) = full_guest(&bench.folder, GIB / 2 / bench.shrink);
    streams_alone(bench, table, &Trust::by_token(&token));
    migrations(bench, table, [&source, &destination], &token);
    if require::uffd() {
        faults(bench, table, [&source, &destination], &token);
    }
}

fn migrations(bench: &Bench, table: &mut Table, images: [&Image; 2], token: &Path) {
    let [source, destination] = images;
    let arguments = ["--token-file", token.to_str().unwrap()];
    let limited = OutgoingOptions { bandwidth: LIMIT, ..OutgoingOptions::default() };
    let kinds = bench.streams.iter().map(|&streams| {
        (streams.to_string(), OutgoingOptions { streams, ..OutgoingOptions::default() })
    });
    let kinds = kinds.chain([("800 MB/s".to_owned(), limited)]);
    let mut pairs: Vec<[Way; 2]> = kinds
        .map(|(kind, options)| {
            [PLAIN, TLS]
                .map(|(who, address)| Way::new(&format!("{who}, {kind}"), address, &options))
        })
        .collect();
    let authority = Authority::new("bench");
    let certificates = authority.folder([TLS_HOST; 2]);
    let mut by_qemu = bench.streams.iter().map(|_| Vec::new()).collect::<Vec<_>>();
    for _ in 0..bench.rounds {
        for (index, pair) in pairs.iter_mut().enumerate() {
            for way in pair {
                prepare(bench, images);
                way.run(source, destination, &arguments);
            }
            if let (Some(qemu), Some(&streams)) = (&bench.qemu, bench.streams.get(index)) {
                prepare(bench, images);
                let mode = Mode::multifd(streams.into());
                let took = qemu.migrate_with(source, destination, mode, Some(certificates.path()));
                by_qemu[index].push(source.size as f64 / took.time.as_secs_f64() / 1e9);
            }
        }
    }
    for (rates, streams) in by_qemu.iter().zip(&bench.streams).filter(|(of, _)| !of.is_empty()) {
        table.add(WORK, &qemus(streams), "GB/s", rates, String::new());
    }
    for (index, [plain, tls]) in pairs.iter().enumerate() {
        for way in [plain, tls] {
            table.add(WORK, &way.name, "GB/s", &way.rates, String::new());
        }
        table.compare_rounds(WORK, &tls.name, &plain.name, Better::More);
        if let Some(streams) = bench.streams.get(index) {
            table.compare_rounds(WORK, &tls.name, &qemus(streams), Better::More);
        }
        let cost = |way: &Way| format!("{}, processor", way.name);
        let more: Vec<f64> =
            tls.processor.iter().zip(&plain.processor).map(|(tls, plain)| tls - plain).collect();
        let remark = format!("{:.2} s more than plain, by the median", median(&more));
        table.add(WORK, &cost(plain), "s/GiB", &plain.processor, String::new());
        table.add(WORK, &cost(tls), "s/GiB", &tls.processor, remark);
    }
}

fn prepare(bench: &Bench, [source, destination]: [&Image; 2]) {
    destination.clear();
    warm_large_pages(&bench.folder, source.size + source.size / 16);
}

/// The name of QEMU with certificates.
fn qemus(streams: &u16) -> String {
    format!("QEMU, TLS, multifd {streams}")
}

/// How long a guest in postcopy waits for a page.
fn faults(bench: &Bench, table: &mut Table, images: [&Image; 2], token: &Path) {
    let work = "tls: a fault in postcopy, quiet";
    let arguments = ["--token-file", token.to_str().unwrap()];
    let ways = [PLAIN, TLS];
    let mut rounds = ways.map(|_| postcopy::Rounds::default());
    for round in 0..bench.rounds as u64 {
        for ((_, address), rounds) in ways.iter().zip(&mut rounds) {
            let listens = Listens { address, arguments: &arguments };
            postcopy::quiet(bench, images, listens, round, rounds);
        }
    }
    for ((who, _), rounds) in ways.iter().zip(&rounds) {
        rounds.add_rows(table, work, who);
    }
    for (name, _) in postcopy::QUANTILES {
        let [plain, tls] = ways.map(|(who, _)| format!("{who}, {name}"));
        table.compare_rounds(work, &tls, &plain, Better::Less);
    }
}

/// Processor time of this thread in seconds.
fn thread_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Records of 256 KiB from one thread to another, without agents and memory.
fn streams_alone(bench: &Bench, table: &mut Table, trust: &Trust) {
    let work = "tls: streams alone";
    let count = 4096 / bench.shrink;
    let names = [PLAIN.0, TLS.0];
    let mut sent = names.map(|_| Vec::new());
    let mut received = names.map(|_| Vec::new());
    for round in 0..bench.rounds * 4 {
        let way = round % 2;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let from = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (to, _) = listener.accept().unwrap();
        let socket = |end: TcpStream| StreamSocket::new(end.into(), Duration::from_secs(60));
        let (mut from, mut to) = (socket(from).unwrap(), socket(to).unwrap());
        if way == 1 {
            from = from.secured(Some(trust.connect("127.0.0.1").unwrap()));
            to = to.secured(Some(trust.accept().unwrap()));
        }
        // The names separate the four in a profile.
        let spawn = |side| std::thread::Builder::new().name(format!("{}-{side}", names[way]));
        let sends = spawn("send").spawn(move || {
            from.shake_hands().unwrap();
            let mut payload = vec![7; 256 << 10];
            let started = thread_time();
            for number in 0..count {
                payload[number as usize] = 1;
                let pages = PageRange::new(number * 64, 64);
                let header = RecordHeader::new(Kind::Data, 0, 0, pages, payload.len());
                let header = header.with_checksum(from.checked(&payload)).to_wire();
                let mut parts = [IoSlice::new(&header), IoSlice::new(&payload)];
                from.write_all(&mut parts).unwrap();
            }
            thread_time() - started
        });
        let receives = spawn("receive").spawn(move || {
            to.shake_hands().unwrap();
            let mut reader = RecordReader::new(to);
            let started = thread_time();
            for _ in 0..count {
                std::hint::black_box(reader.read().unwrap().payload);
            }
            thread_time() - started
        });
        let per_gib = 4096.0 / count as f64;
        received[way].push(receives.unwrap().join().unwrap() * per_gib);
        sent[way].push(sends.unwrap().join().unwrap() * per_gib);
    }
    for (way, name) in names.into_iter().enumerate() {
        for (side, samples) in [("send", &sent[way]), ("receive", &received[way])] {
            table.add(work, &format!("{name}, {side}"), "s/GiB", samples, String::new());
        }
    }
    let of = |way: usize, index| sent[way][index] + received[way][index];
    let both: Vec<f64> = (0..sent[0].len()).map(|index| of(1, index) - of(0, index)).collect();
    table.add(work, "TLS, more than plain at both ends", "s/GiB", &both, String::new());
}
