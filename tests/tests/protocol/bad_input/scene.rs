// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A destination that waits for a guest, and a source that sends arbitrary bytes.

use super::geometry;
use pageferry_client::IncomingOptions;
use pageferry_protocol::memory::{BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::stream::answer::decode_error;
use pageferry_protocol::stream::payload::{StatePart, Totals};
use pageferry_protocol::stream::{Hello, Kind, RecordHeader, STREAM_VERSION};
use pageferry_tests::scenario::{
    Agent, Attached, Listening, Ram, SOON, Side, arrives_at, read_record,
};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

pub const PAGES: u64 = 40;

/// A source that a test plays.
pub struct FakeSource {
    pub stream: UnixStream,
}

impl FakeSource {
    pub fn connect(scene: &Scene) -> Self {
        let stream = UnixStream::connect(scene.path()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Self { stream }
    }

    /// A source whose hello was accepted.
    pub fn accepted(scene: &Scene) -> Self {
        let mut source = Self::connect(scene);
        source.hello(&hello());
        assert_eq!(source.next().0, Kind::Accept);
        source
    }

    pub fn send(&mut self, header: RecordHeader, payload: &[u8]) {
        let bytes = [header.with_checksum(payload).to_wire().as_slice(), payload].concat();
        self.stream.write_all(&bytes).unwrap();
    }

    pub fn hello(&mut self, hello: &Hello) {
        let payload = hello.encode();
        self.send(RecordHeader::plain(Kind::Hello, 0, payload.len()), &payload);
    }

    pub fn data(&mut self, block: u32, first: u64, count: u64) {
        let payload = vec![9; (count * PAGE_SIZE) as usize];
        self.send(
            RecordHeader::new(Kind::Data, 0, block, PageRange::new(first, count), payload.len()),
            &payload,
        );
    }

    pub fn end_pass(&mut self, number: u64) {
        self.send(RecordHeader::plain(Kind::PassEnd, number, 0), &[]);
    }

    pub fn state(&mut self, length: u64, bytes: &[u8]) {
        let payload = StatePart { name: "vcpu", length, offset: 0, bytes }.encode();
        self.send(RecordHeader::plain(Kind::State, 0, payload.len()), &payload);
    }

    pub fn end(&mut self, totals: Totals) {
        let payload = totals.encode();
        self.send(RecordHeader::plain(Kind::End, 0, payload.len()), &payload);
    }

    pub fn next(&mut self) -> (Kind, Vec<u8>) {
        let (kind, _, payload) = read_record(&self.stream).expect("the connection ended");
        (kind, payload)
    }

    /// Reads up to a record of this kind. Returns its sentence.
    pub fn sentence(&mut self, kind: Kind) -> String {
        loop {
            let (found, payload) = self.next();
            if found == kind {
                return decode_error(&payload).unwrap().sentence;
            }
            assert_eq!(found, Kind::PassDone);
        }
    }
}

pub fn hello() -> Hello {
    let ram = Ram::odd(PAGES);
    let mut blocks = BlockTable::new();
    blocks.insert(geometry(ram.id, ram.gpa, PAGES * PAGE_SIZE), 1).unwrap();
    Hello {
        version_min: STREAM_VERSION,
        version_max: STREAM_VERSION,
        features: 0,
        session: [7; 16],
        stream: 0,
        streams: 1,
        urgent: 0,
        flags: 0,
        blocks,
    }
}

/// A destination that waits for a guest.
pub struct Scene {
    pub folder: tempfile::TempDir,
    pub destination: Attached,
    // Dropped after the VMM, because the drop waits for the agent.
    pub agent: Agent,
}

impl Scene {
    pub fn new() -> Self {
        Self::on(Agent::Stopped(Listening::start()))
    }

    /// A destination on an agent process.
    pub fn far() -> Self {
        Self::on(Agent::spawn())
    }

    fn on(agent: Agent) -> Self {
        let destination = Attached::new(agent.socket(), Ram::odd(PAGES));
        Self { folder: tempfile::tempdir().unwrap(), destination, agent }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("destination")
    }

    pub fn listen(&self) -> u64 {
        self.listen_for(SOON)
    }

    pub fn listen_for(&self, peer_timeout: Duration) -> u64 {
        self.destination
            .listen(&self.path(), &IncomingOptions { peer_timeout, ..IncomingOptions::default() })
    }

    /// Checks that the waiting job still accepts a guest from a proper source.
    pub fn assert_takes_a_guest(&self, job: u64) {
        let source = Side::new(Ram::odd(PAGES));
        for page in 0..PAGES {
            source.ram.write(page, 300 + page);
        }
        arrives_at(&source, &self.path(), &self.destination, job);
    }
}
