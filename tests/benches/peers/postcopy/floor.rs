// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lowest possible cost of a fault on a remote page: a fault that another process answers, plus
//! a request and its reply over a socket.
//!
//! The other process is this program once more (`--answer`). It gets the userfaultfd, reads each
//! fault and answers it with the same bytes. It answers each request on a TCP connection with a
//! header and a page. It has no bitmaps, records or checksums.

use super::{Times, shuffled};
use pageferry_protocol::control::{Frame, FrameSocket};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::RECORD_SIZE;
use pageferry_protocol::userfault::{AddressRange, Events, RegisterMode, Userfaultfd, feature};
use pageferry_tests::memory::TestMemory;
use pageferry_tests::process::Process;
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// The times of both halves.
#[derive(Debug, Default)]
pub struct Floor {
    /// From a touch until it returns, answered by another process.
    pub fault: Times,
    /// From a request to its reply.
    pub socket: Times,
}

impl Floor {
    /// A quantile, in thousandths, of the sum of both in microseconds.
    pub fn quantile(&self, part: usize) -> f64 {
        self.fault.quantile(part) + self.socket.quantile(part)
    }

    /// Touches `count` pages of `memory`, none of which is allocated, and sends as many requests.
    pub fn measure(memory: &TestMemory, unit: u64, count: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let _other = Process::spawn("floor", command.arg("--answer").arg(&path)).unwrap();
        let mut control = FrameSocket::from(OwnedFd::from(listener.accept().unwrap().0));

        let block = &memory.blocks()[0];
        let uffd = Userfaultfd::open(feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS).unwrap();
        let all = AddressRange { start: block.address(), length: block.layout().length };
        uffd.register(all, RegisterMode::Missing).unwrap();
        let mut order = Frame::request(0, unit.to_le_bytes().to_vec());
        order.fds.push(uffd.as_fd().try_clone_to_owned().unwrap());
        control.send(&order, deadline()).unwrap();
        let port = u16::from_le_bytes(control.recv(deadline()).unwrap().body.try_into().unwrap());
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();

        let mut floor = Self::default();
        let mut answer = vec![0; RECORD_SIZE + unit as usize];
        for page in shuffled(all.length / unit, 1).into_iter().take(count as usize) {
            floor.fault.push(super::touch(block, page * unit));
            let started = Instant::now();
            stream.write_all(&[0; RECORD_SIZE]).unwrap();
            stream.read_exact(&mut answer).unwrap();
            floor.socket.push(started.elapsed());
        }
        uffd.unregister(all).unwrap();
        floor
    }
}

/// The other process: answers until it is killed.
pub fn answer(control: &Path) {
    let mut control = FrameSocket::from(OwnedFd::from(UnixStream::connect(control).unwrap()));
    let mut order = control.recv(deadline()).unwrap();
    let unit = u64::from_le_bytes(order.body.try_into().unwrap());
    let uffd = Userfaultfd::from(order.fds.remove(0));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || answer_questions(&listener, unit));
    control.send(&Frame::reply(0, port.to_le_bytes().to_vec()), deadline()).unwrap();
    let page = vec![1; unit as usize];
    let mut events = Events::default();
    loop {
        poll(&mut [PollFd::new(&uffd, PollFlags::IN)], None).unwrap();
        uffd.read_events(&mut events).unwrap();
        for address in events.faults() {
            uffd.copy(address / unit * unit, &page).unwrap();
        }
    }
}

fn answer_questions(listener: &TcpListener, unit: u64) {
    let mut stream = listener.accept().unwrap().0;
    stream.set_nodelay(true).unwrap();
    let (mut question, answer) = ([0; RECORD_SIZE], vec![1; RECORD_SIZE + unit as usize]);
    while stream.read_exact(&mut question).is_ok() {
        stream.write_all(&answer).unwrap();
    }
}

const _: () = assert!(RECORD_SIZE == 32 && PAGE_SIZE == 4096);
