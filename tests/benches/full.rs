//! 2 GiB of random pages over TCP loopback: a migration of a paused guest, beside a plain copy of the same bytes through one socket.
//!
//! Both run interleaved in one process, onto memory that was touched and punched before; the figures are medians. Run it with
//! `cargo bench -p pageferry-tests --bench full`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use pageferry_client::{Client, Config, IncomingOptions, OutgoingOptions, Phase, Target};
use pageferry_tests::files::{Still, memfd};
use pageferry_tests::in_process::InProcessAgent;
use rustix::fs::{FallocateFlags, fallocate};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const BUFFER: usize = 256 << 10;
const ROUNDS: usize = 5;

fn punch(fd: &OwnedFd, size: u64) {
    fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, size).unwrap();
}

fn fill(fd: &OwnedFd, size: u64) {
    let mut random = std::fs::File::open("/dev/urandom").unwrap();
    let mut buffer = vec![0u8; BUFFER];
    for at in (0..size).step_by(BUFFER) {
        random.read_exact(&mut buffer).unwrap();
        assert_eq!(rustix::io::pwrite(fd, &buffer, at).unwrap(), BUFFER);
    }
}

fn migrate(source: &OwnedFd, destination: &OwnedFd, size: u64, streams: u16) -> Duration {
    let side = |fd: &OwnedFd| {
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, Config::default()).unwrap();
        Still::hand_over(&client, channel, fd, size).unwrap();
        (client, agent)
    };
    let (from, to) = (side(source), side(destination));
    let listen = Target::Address("tcp:127.0.0.1:0".into());
    let incoming = to.0.start_incoming(listen, &IncomingOptions::default()).unwrap();
    let options = OutgoingOptions { streams, ..OutgoingOptions::default() };
    let job = from.0.start_outgoing(Target::Address(incoming.address), &options).unwrap().job;
    let status = from.0.wait(job, Duration::from_secs(300)).unwrap();
    assert_eq!(status.phase, Phase::Completed, "{}", status.error);
    Duration::from_micros(status.counters.total_us)
}

fn copy(source: &OwnedFd, destination: &OwnedFd, size: u64) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut socket = listener.accept().unwrap().0;
            let mut buffer = vec![0u8; BUFFER];
            for at in (0..size).step_by(BUFFER) {
                socket.read_exact(&mut buffer).unwrap();
                assert_eq!(rustix::io::pwrite(destination, &buffer, at).unwrap(), BUFFER);
            }
        });
        let mut socket = TcpStream::connect(address).unwrap();
        let mut buffer = vec![0u8; BUFFER];
        for at in (0..size).step_by(BUFFER) {
            assert_eq!(rustix::io::pread(source, &mut buffer, at).unwrap(), BUFFER);
            socket.write_all(&buffer).unwrap();
        }
    });
    started.elapsed()
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn main() {
    // `cargo test` runs benches, too, once and briefly: then it is a test that the bench works.
    let bench = std::env::args().any(|argument| argument == "--bench");
    let (size, rounds) = if bench { (2u64 << 30, ROUNDS) } else { (16 << 20, 1) };
    let (source, destination) = (memfd(size).unwrap(), memfd(size).unwrap());
    fill(&source, size);
    // First touches come from the host underneath; after this, allocating is allocating.
    copy(&source, &destination, size);
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..rounds {
        punch(&destination, size);
        times[0].push(copy(&source, &destination, size));
        for (slot, streams) in [(1, 1), (2, 2)] {
            punch(&destination, size);
            times[slot].push(migrate(&source, &destination, size, streams));
        }
    }
    let plain = median(&mut times[0]);
    println!("{size} bytes of random pages, TCP loopback, medians of {rounds}");
    for (name, times) in ["plain copy, 1 socket", "pageferry, 1 stream", "pageferry, 2 streams"].iter().zip(&mut times)
    {
        let time = median(times);
        println!("{name:22} {:6.2} GB/s   {:4.2} of the plain copy", size as f64 / time / 1e9, plain / time);
    }
}
