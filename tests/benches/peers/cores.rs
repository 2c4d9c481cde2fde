// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Many workers on few processors: what the agent's own locks and threads cost.
//!
//! A machine with two processors cannot show that 32 workers are faster than two. It can show that
//! they are not slower, and how long they wait for locks of the agent. What is left on a large
//! machine are the locks of the kernel, which `docs/performance.md` names.

use super::Bench;
use super::floor;
use super::image::{Image, full_guest, warm_large_pages};
use super::table::{Better, Table, median};
use pageferry_agent::hooks::Hooks;
use pageferry_agent::job::Deadline;
use pageferry_agent::lock::waits;
use pageferry_agent::memory::block::GuestLog;
use pageferry_agent::memory::{Backing, Block, GuestMemory};
use pageferry_agent::pagemap::Pagemap;
use pageferry_agent::tracking::{DirtyPages, TrackerChoice, Trackers};
use pageferry_client::tracking::uffd::WriteProtect;
use pageferry_client::{
    Client, Config, IncomingOptions, OutgoingOptions, Phase, Target, Trackers as Declared,
};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::shm::DirtyLog;
use pageferry_protocol::stream::answer::Accept;
use pageferry_protocol::stream::hello::{Hello, STREAM_VERSION};
use pageferry_protocol::stream::{Kind, MAX_PAYLOAD, RECORD_SIZE, RecordHeader};
use pageferry_tests::files::{Still, memfd};
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::require;
use rustix::net::{RecvFlags, recv};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const GIB: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(600);
/// Numbers of workers. All are compared with the second.
const WORKERS: [u16; 4] = [1, 2, 8, 32];

fn workers(count: u16) -> String {
    if count == 1 { "1 worker".into() } else { format!("{count} workers") }
}

/// What one number of workers has measured.
#[derive(Default)]
struct Measured {
    figures: Vec<f64>,
    waits: Vec<f64>,
    waited: Vec<f64>,
}

impl Measured {
    /// Runs `work`, whose result is the figure, and notes the waits for locks meanwhile.
    fn run(&mut self, work: impl FnOnce() -> f64) {
        let before = waits();
        self.figures.push(work());
        let after = waits();
        self.waits.push((after.0 - before.0) as f64);
        self.waited.push((after.1 - before.1).as_secs_f64() * 1e3);
    }
}

/// Measures all numbers of workers in turns.
fn compare(
    bench: &Bench, table: &mut Table, work: &str, unit: &'static str, better: Better,
    mut run: impl FnMut(u16) -> f64,
) {
    let mut measured: [Measured; WORKERS.len()] = Default::default();
    // The first round is a warm-up.
    WORKERS.iter().for_each(|count| _ = run(*count));
    for _ in 0..bench.rounds {
        for (count, measured) in WORKERS.iter().zip(&mut measured) {
            measured.run(|| run(*count));
        }
    }
    for (count, measured) in WORKERS.iter().zip(&measured) {
        let remark = format!(
            "{:.0} waits for locks of the agent, {:.3} ms in all",
            median(&measured.waits),
            median(&measured.waited)
        );
        table.add(work, &workers(*count), unit, &measured.figures, remark);
    }
    for count in WORKERS {
        table.compare_rounds(work, &workers(count), &workers(WORKERS[1]), better);
    }
}

/// Pages, scans and harvests by 1 to 32 workers.
pub fn cores(bench: &Bench, table: &mut Table) {
    pages(bench, table);
    both_ends(bench, table);
    plain_copy(bench, table);
    scans(bench, table);
    harvests(bench, table);
}

/// A VMM whose agent is in this process, so that the agent's waits for locks count.
struct Vmm {
    // Before the agent, whose drop waits for the end of the connection.
    client: Client,
    _agent: InProcessAgent,
}

impl Vmm {
    fn new(image: &Image) -> Self {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
        Still::hand_over(&client, channel, &image.file, image.size).unwrap();
        Self { client, _agent: agent }
    }
}

/// Moves the guest of `client`. Returns the speed in GB/s.
fn moved(client: &Client, address: String, streams: u16, size: u64) -> f64 {
    let options = OutgoingOptions { streams, ..OutgoingOptions::default() };
    let job = client.start_outgoing(Target::Address(address), &options).unwrap().job;
    let status = client.wait(job, LIMIT).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(status.counters.pages_sent, size / PAGE_SIZE);
    size as f64 / status.counters.total_us as f64 / 1e3
}

/// The source of a migration, with a stream for each worker.
fn pages(bench: &Bench, table: &mut Table) {
    let size = GIB / bench.shrink;
    let image = Image::new(&bench.folder, "cores", size);
    image.fill(0, size);
    let work = "cores: 1 GiB to a peer that throws it away";
    compare(bench, table, work, "GB/s", Better::More, |streams| {
        // The guest leaves, so each round needs a VMM of its own.
        let vmm = Vmm::new(&image);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let peer = std::thread::spawn(move || throw_away(&listener, streams));
        let speed = moved(&vmm.client, address, streams, size);
        peer.join().unwrap();
        speed
    });
}

/// A whole migration, with a worker for each stream at both ends.
fn both_ends(bench: &Bench, table: &mut Table) {
    let size = GIB / bench.shrink;
    let (source, destination, _warm) = full_guest(&bench.folder, size);
    let work = "cores: 1 GiB to another agent";
    compare(bench, table, work, "GB/s", Better::More, |streams| {
        destination.clear();
        warm_large_pages(&bench.folder, size + size / 16);
        let (from, to) = (Vmm::new(&source), Vmm::new(&destination));
        let listen = Target::Address("tcp:127.0.0.1:0".into());
        let incoming = to.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
        moved(&from.client, incoming.address, streams, size)
    });
}

/// The control: a plain copy by as many pairs of threads, which share nothing but the kernel.
fn plain_copy(bench: &Bench, table: &mut Table) {
    let size = GIB / bench.shrink;
    let (source, destination, _warm) = full_guest(&bench.folder, size);
    let work = "cores: 1 GiB by a plain copy";
    compare(bench, table, work, "GB/s", Better::More, |sockets| {
        destination.clear();
        size as f64 / floor::copy(&source, &destination, sockets.into()).as_secs_f64() / 1e9
    });
}

/// A destination that accepts a guest and throws its memory away. The kernel does not even copy it.
fn throw_away(listener: &TcpListener, streams: u16) {
    let mut sockets: Vec<(u16, TcpStream)> = (0..streams)
        .map(|_| {
            let mut socket = listener.accept().unwrap().0;
            let header = read_header(&mut socket);
            let mut payload = vec![0; header.payload_length()];
            socket.read_exact(&mut payload).unwrap();
            (Hello::decode(&payload).unwrap().stream, socket)
        })
        .collect();
    sockets.sort_by_key(|(index, _)| *index);
    let accept = Accept { version: STREAM_VERSION, features: 0, host_pages: Vec::new() }.encode();
    answer(&sockets[0].1, RecordHeader::plain(Kind::Accept, 0, accept.len()), &accept);
    let primary = sockets[0].1.try_clone().unwrap();
    let barrier = Barrier::new(sockets.len());
    std::thread::scope(|scope| {
        for (index, mut socket) in sockets {
            let (primary, barrier) = (&primary, &barrier);
            scope.spawn(move || {
                let mut unused = vec![0; MAX_PAYLOAD];
                loop {
                    let header = read_header(&mut socket);
                    let mut left = header.payload_length();
                    while left > 0 {
                        let (_, count) =
                            recv(&socket, &mut unused[..left], RecvFlags::TRUNC).unwrap();
                        left -= count;
                    }
                    let plain = |kind| RecordHeader::plain(kind, header.number(), 0);
                    match header.check().unwrap() {
                        Kind::PassEnd if barrier.wait().is_leader() => {
                            answer(primary, plain(Kind::PassDone), &[]);
                        }
                        Kind::End if index == 0 => answer(primary, plain(Kind::Loaded), &[]),
                        Kind::End => return,
                        Kind::Commit => return answer(primary, plain(Kind::Resumed), &[]),
                        _ => {}
                    }
                }
            });
        }
    });
}

fn read_header(socket: &mut TcpStream) -> RecordHeader {
    let mut bytes = [0; RECORD_SIZE];
    socket.read_exact(&mut bytes).unwrap();
    RecordHeader::from_wire(bytes)
}

fn answer(mut socket: &TcpStream, header: RecordHeader, payload: &[u8]) {
    socket.write_all(&header.with_checksum(payload).to_wire()).unwrap();
    socket.write_all(payload).unwrap();
}

/// Memory with one block and a log, and its dirty pages.
fn memory(
    fd: std::os::fd::OwnedFd, length: u64, address: u64, log: DirtyLog,
) -> (GuestMemory, DirtyPages) {
    let backing = Backing::new(fd, 0, length).unwrap();
    let (name, granularity) = ("ram".to_owned(), PAGE_SIZE);
    let geometry = BlockGeometry { id: 0, name, gpa: 0, length, granularity };
    let block = Arc::new(Block::new(geometry, backing, address, None).unwrap());
    let log = Some(Arc::new(GuestLog::new(log)));
    let memory = GuestMemory::new(vec![block], BlockTable::new(), log);
    let dirty = DirtyPages::none(&memory).unwrap();
    (memory, dirty)
}

fn log(length: u64) -> DirtyLog {
    let bytes = (length / PAGE_SIZE / 8).max(PAGE_SIZE);
    DirtyLog::map_sparse(memfd(bytes).unwrap(), 0, bytes).unwrap()
}

fn trackers(declared: Declared, pagemap: Option<Arc<Pagemap>>) -> Trackers {
    let choice = TrackerChoice { declared, pagemap };
    Trackers::new(&choice, &Arc::new(Hooks::new(None)), Duration::ZERO, &Deadline::default())
}

fn millis(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64() * 1e3
}

/// A sync by write-protect scanning. The memory has 16 chunks, and so at most 16 threads.
fn scans(bench: &Bench, table: &mut Table) {
    if !require::uffd() {
        return table.note("skipped: cores, scans: no userfaultfd".into());
    }
    let length = 4 * GIB / bench.shrink;
    let file = memfd(length).unwrap();
    let backing = Some(FileOffset::new(file.try_clone().unwrap().into(), 0));
    let ranges = [(GuestAddress(0), length as usize, backing)];
    let mapped = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
    let address = mapped.get_host_address(GuestAddress(0)).unwrap() as u64;
    let write_protect = WriteProtect::register(&[(address, length)]).unwrap();
    let pagemap = Pagemap::new(write_protect.pagemap().try_clone_to_owned().unwrap()).unwrap();
    let (memory, dirty) = memory(file, length, address, log(length));
    let mut trackers = trackers(Declared::WRITE_PROTECT, Some(Arc::new(pagemap)));
    for (work, writes) in [
        ("cores: sync of 4 GiB by scanning, nothing written", false),
        ("cores: sync of 4 GiB by scanning, all written", true),
    ] {
        compare(bench, table, work, "ms", Better::Less, |threads| {
            if writes {
                (0..length).step_by(PAGE_SIZE as usize).for_each(|at| {
                    mapped.write_obj(1u8, GuestAddress(at)).unwrap();
                });
            }
            dirty.block(0).clear(dirty.block(0).all());
            let time = millis(|| trackers.sync(&memory, &dirty, threads.into()).unwrap());
            if writes {
                assert_eq!(dirty.count(), length / PAGE_SIZE);
            }
            time
        });
    }
}

/// A harvest of the dirty log of a large guest.
fn harvests(bench: &Bench, table: &mut Table) {
    let length = 1024 * GIB / bench.shrink;
    let (memory, dirty) = memory(memfd(length).unwrap(), length, 0, log(length));
    let log = memory.log.clone().unwrap();
    let mut trackers = trackers(Declared::LOG_IS_COMPLETE, None);
    for (work, every) in [
        ("cores: harvest a log of 1 TiB, 1 page of 100 dirty", Some(100)),
        ("cores: harvest a log of 1 TiB, nothing dirty", None),
    ] {
        compare(bench, table, work, "ms", Better::Less, |threads| {
            dirty.block(0).clear(dirty.block(0).all());
            if let Some(every) = every {
                (0..length / PAGE_SIZE)
                    .step_by(every)
                    .for_each(|page| log.log.mark(PageRange::new(page, 1)));
            }
            millis(|| trackers.sync(&memory, &dirty, threads.into()).unwrap())
        });
    }
}
