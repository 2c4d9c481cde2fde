// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The relay between the two agents. It passes one record of one connection at a time, and checks
//! that no page is requested twice.

use crate::source::{Page, layouts, pages_of};
use pageferry_protocol::memory::PageRange;
use pageferry_protocol::shm::bitmap::{WORD_BITS, runs_of_word};
use pageferry_protocol::stream::payload::decode_bitmap;
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_tests::random::Random;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// One direction of one connection.
struct Pipe {
    from: UnixStream,
    to: UnixStream,
    to_destination: bool,
    /// The number of its set of connections. Each time that the source connects begins a new set.
    set: u64,
}

impl Pipe {
    fn is_ready(&self) -> bool {
        let mut polled = [PollFd::new(&self.from, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).unwrap() > 0
    }

    fn read(&mut self) -> std::io::Result<(Kind, RecordHeader, Vec<u8>)> {
        let mut header = [0; RECORD_SIZE];
        self.from.read_exact(&mut header)?;
        let header = RecordHeader::from_wire(header);
        let kind = header.check().unwrap();
        let mut payload = vec![0; header.payload_length()];
        self.from.read_exact(&mut payload)?;
        Ok((kind, header, payload))
    }

    /// Closes the connection. The pipe of the other direction notices that.
    fn close(&self) {
        // Either side may be closed already.
        let _ = self.from.shutdown(Shutdown::Both);
        let _ = self.to.shutdown(Shutdown::Both);
    }
}

/// A record that was read and not passed on yet.
pub struct Passing {
    pipe: usize,
    pub to_destination: bool,
    pub kind: Kind,
    pub header: RecordHeader,
    pub payload: Vec<u8>,
}

impl Passing {
    pub fn pages(&self) -> impl Iterator<Item = Page> + use<> {
        pages_of(self.header.block(), self.header.range())
    }

    fn bytes(&self) -> Vec<u8> {
        [self.header.to_wire().as_slice(), &self.payload].concat()
    }

    /// The pages of a bitmap.
    pub fn bitmap(&self) -> Vec<Page> {
        let id = self.header.block();
        let pages = layouts().iter().find(|layout| layout.id == id).unwrap().pages;
        let words = decode_bitmap(&self.payload, self.header.range(), pages).unwrap();
        let runs = words.flat_map(|(word, bits)| runs_of_word(word * WORD_BITS, bits));
        runs.flat_map(|run: PageRange| pages_of(id, run)).collect()
    }
}

/// The pages that were requested from the source, and the pages that must not be requested any
/// more.
#[derive(Default)]
struct Asked {
    /// Requested pages, with the set of connections.
    asked: BTreeSet<(u64, Page)>,
    /// For each settled page, the first set of connections on which it must not be requested.
    settled: BTreeMap<Page, u64>,
}

pub struct Relay {
    listener: UnixListener,
    destination: PathBuf,
    pipes: Vec<Pipe>,
    /// Number of connections in a set.
    connections: u64,
    accepted: u64,
    /// Number of sets that the source knows to be accepted.
    established: u64,
    asked: Asked,
}

impl Relay {
    /// A relay from `path` to `destination`, for a source that makes this many connections at once.
    pub fn new(path: &Path, destination: &Path, connections: u64) -> Self {
        // Removes the socket of the attempt before.
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            listener,
            destination: destination.to_owned(),
            pipes: Vec::new(),
            connections,
            accepted: 0,
            established: 0,
            asked: Asked::default(),
        }
    }

    pub fn accept(&mut self) {
        while let Ok((from, _)) = self.listener.accept() {
            let set = self.accepted / self.connections;
            self.accepted += 1;
            // A destination whose job has ended does not listen any more. The source then finds its
            // connection closed.
            let Ok(to) = UnixStream::connect(&self.destination) else { continue };
            from.set_nonblocking(false).unwrap();
            let [back, forth] = [to.try_clone().unwrap(), from.try_clone().unwrap()];
            self.pipes.push(Pipe { from: back, to: forth, to_destination: false, set });
            self.pipes.push(Pipe { from, to, to_destination: true, set });
        }
    }

    /// Reads a record from a random pipe, if there is one.
    pub fn next(&mut self, chance: &mut Random) -> Option<Passing> {
        let at = chance.below(self.pipes.len() as u64) as usize;
        let pipe = self.pipes.get_mut(at).filter(|pipe| pipe.is_ready())?;
        let Ok((kind, header, payload)) = pipe.read() else {
            self.close(at);
            return None;
        };
        let passing =
            Passing { pipe: at, to_destination: pipe.to_destination, kind, header, payload };
        if kind == Kind::Request {
            let set = pipe.set;
            self.check_request(&passing, set);
        }
        Some(passing)
    }

    fn check_request(&mut self, request: &Passing, set: u64) {
        for page in request.pages() {
            assert!(self.asked.asked.insert((set, page)), "page {page:?} is requested twice");
            let settled = self.asked.settled.get(&page).copied().unwrap_or(u64::MAX);
            assert!(set < settled, "page {page:?} is requested although it is not needed any more");
        }
    }

    /// The page has arrived or is discarded. It must not be requested on later connections. On
    /// existing connections it may be requested only if the guest touched it before.
    pub fn settle(&mut self, page: Page, touched: bool) {
        let from = if touched { self.accepted.div_ceil(self.connections) } else { 0 };
        let settled = self.asked.settled.entry(page).or_insert(from);
        *settled = from.min(*settled);
    }

    /// True while the newest connections are not accepted yet.
    pub fn shakes_hands(&self) -> bool {
        self.established < self.accepted.div_ceil(self.connections)
    }

    pub fn pass(&mut self, record: &Passing) {
        if record.kind == Kind::Accept {
            self.established = self.pipes[record.pipe].set + 1;
        }
        if self.pipes[record.pipe].to.write_all(&record.bytes()).is_err() {
            self.close(record.pipe);
        }
    }

    /// Passes on a part of the record, and closes its connection.
    pub fn cut(&mut self, record: &Passing, bytes: usize) {
        let bytes = &record.bytes()[..bytes];
        // The receiver may have closed the connection.
        let _ = self.pipes[record.pipe].to.write_all(bytes);
        self.close(record.pipe);
    }

    fn close(&mut self, at: usize) {
        self.pipes.swap_remove(at).close();
    }

    /// Closes a random connection.
    pub fn cut_any(&mut self, chance: &mut Random) {
        if !self.pipes.is_empty() {
            self.close(chance.below(self.pipes.len() as u64) as usize);
        }
    }

    pub fn cut_all(&mut self) {
        self.pipes.drain(..).for_each(|pipe| pipe.close());
    }
}
