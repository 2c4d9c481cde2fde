//! Bad input on the control socket and on the page stream: an error that names the field, the end of one request, one connection or one
//! job, and of nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Ram, SOON, Side, assert_same, lock, passes, read_record};
use pageferry_client::{IncomingOptions, JobStatus, Phase};
use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder};
use pageferry_protocol::control::frame::{HEADER_SIZE, MAX_BODY};
use pageferry_protocol::control::request::{
    BlockRange, ErrorCode, OWN_REQUESTS, RemoteError, Reply, Request, code, decode_reply,
};
use pageferry_protocol::control::{Frame, FrameSocket, SocketError};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::stream::hello::decode_error;
use pageferry_protocol::stream::payload::{StatePart, Totals, encode_runs};
use pageferry_protocol::stream::{Hello, Kind, RECORD_SIZE, RecordHeader, STREAM_VERSION};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::pipe::PipeFlags;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

// ---- The control socket.

/// An agent that listens, until it is dropped.
struct Listening {
    path: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Listening {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let mut server = pageferry_agent::server::Server::new().unwrap();
        server.listen(&path).unwrap();
        let (stopped, stop) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        server.stop_on(stopped).unwrap();
        let thread = std::thread::spawn(move || server.run().unwrap());
        Self { path, stop, thread: Some(thread), _folder: folder }
    }

    fn connect(&self) -> Peer {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Peer { raw: stream.try_clone().unwrap(), socket: FrameSocket::from(OwnedFd::from(stream)) }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &[1]).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// One connection.
struct Peer {
    raw: UnixStream,
    socket: FrameSocket,
}

impl Peer {
    fn reply(&mut self) -> Result<Frame, SocketError> {
        self.socket.recv(Instant::now() + SOON)
    }

    fn ask_raw(&mut self, request: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Reply<Vec<u8>> {
        self.socket.send(&Frame { request, flags: 0, body, fds }, Instant::now() + SOON).unwrap();
        let reply = self.reply().unwrap();
        assert!(reply.is_reply());
        assert_eq!(reply.request, request);
        decode_reply(&reply.body, |decoder| Ok::<_, DecodeError>(decoder.remainder().to_vec())).unwrap()
    }

    fn ask(&mut self, request: &Request, fds: Vec<OwnedFd>) -> Reply<Vec<u8>> {
        self.ask_raw(request.code(), request.encode(), fds)
    }

    #[track_caller]
    fn assert_refused(&mut self, request: &Request, fds: Vec<OwnedFd>, words: &[&str]) -> RemoteError {
        let error = self.ask(request, fds).unwrap_err();
        for word in words {
            assert!(error.sentence.contains(word), "\"{word}\" is missing in: {error}");
        }
        error
    }

    fn status(&mut self) -> JobStatus {
        let body = self.ask(&Request::QueryStatus, Vec::new()).unwrap();
        JobStatus::decode(&mut Decoder::new(&body)).unwrap()
    }

    /// The agent ends this connection without an answer.
    #[track_caller]
    fn assert_dropped(&mut self) {
        match self.reply() {
            Err(SocketError::Closed | SocketError::Kernel(_)) => {}
            other => panic!("not dropped: {other:?}"),
        }
    }

    /// Discards a page; returns how many pages that changed.
    fn discard(&mut self, range: BlockRange) -> Reply<u64> {
        let body = self.ask(&Request::Discard { flags: 0, ranges: vec![range] }, Vec::new())?;
        Ok(u64::from_le_bytes(body.try_into().unwrap()))
    }
}

fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

fn geometry(id: u32, gpa: u64, length: u64) -> BlockGeometry {
    BlockGeometry { id, name: format!("block{id}"), gpa, length, granularity: PAGE_SIZE }
}

fn add_block(geometry: BlockGeometry, fd_offset: u64) -> Request {
    Request::AddBlock { geometry, fd_offset, vmm_address: 0, flags: 0 }
}

/// Memory and a bitmap for it.
fn fds(size: u64) -> Vec<OwnedFd> {
    vec![memfd(size), memfd(4096)]
}

fn page(block: u32, page: u64) -> BlockRange {
    BlockRange { block, offset: page * PAGE_SIZE, length: PAGE_SIZE }
}

/// A connection that owns one block of 16 pages at 64 KiB, with the id 1.
fn owner(agent: &Listening) -> Peer {
    let mut peer = agent.connect();
    peer.ask(&add_block(geometry(1, 0x1_0000, 0x1_0000), 0), fds(0x1_0000)).unwrap();
    peer
}

#[test]
fn a_header_that_breaks_the_framing_ends_its_connection_and_nothing_else() {
    let agent = Listening::new();
    let mut vmm = owner(&agent);
    let header = |request: u32, flags: u32, size: u32| Encoder::new().u32(request).u32(flags).u32(size).finish();
    for bytes in [header(code::HELLO, 2, 0), header(code::HELLO, 1, MAX_BODY as u32 + 1), header(1, 1, u32::MAX)] {
        assert_eq!(bytes.len(), HEADER_SIZE);
        let mut stranger = agent.connect();
        stranger.raw.write_all(&bytes).unwrap();
        stranger.assert_dropped();
    }
    // One that ends in the middle of a header, and one in the middle of a body.
    agent.connect().raw.write_all(&[1, 2, 3]).unwrap();
    agent.connect().raw.write_all(&header(code::HELLO, 1, 16)).unwrap();
    assert_eq!(vmm.discard(page(1, 3)).unwrap(), 1, "the VMM's session goes on");
    assert_eq!(agent.connect().status().phase, Phase::Idle);
}

#[test]
fn requests_that_are_unknown_or_malformed_are_refused_by_name_and_the_connection_goes_on() {
    let agent = Listening::new();
    let mut peer = owner(&agent);
    for unknown in [0x1fff, 0x1006, OWN_REQUESTS + 0xf000] {
        let error = peer.ask_raw(unknown, vec![1, 2, 3], Vec::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported);
        assert!(error.sentence.contains(&format!("{unknown:#x}")), "{error}");
    }
    let mut longer = Request::RemoveBlock { id: 1 }.encode();
    longer.push(0);
    let cases = [
        (code::REMOVE_BLOCK, longer, "1 bytes longer"),
        (code::REMOVE_BLOCK, vec![1, 0], "field id"),
        (code::REMOVE_BLOCK, Vec::new(), "field id"),
        (code::HELLO, vec![1, 0, 1, 0], "field reserved"),
        (code::QUERY_STATUS, vec![0], "longer"),
        (code::DISCARD, Encoder::new().u32(1).u32(2).bytes(&[0; 24]).finish(), "field ranges"),
        (code::DISCARD, Encoder::new().u32(1).u32(u32::MAX).finish(), "count is 0xffffffff"),
        (code::DISCARD, Encoder::new().u32(6).u32(0).finish(), "flags is 0x6"),
        (code::ADD_BLOCK, vec![0; 47], "field"),
        (code::SUBSCRIBE, Encoder::new().u32(1).finish(), "interval is 0x1"),
        (code::START_INCOMING, Encoder::new().text("unix:/x").u64(0).u64(1).finish(), "peer_timeout is 0x0"),
        (code::START_OUTGOING, Encoder::new().u32(u32::MAX).finish(), "target"),
    ];
    for (request, body, word) in cases {
        let error = peer.ask_raw(request, body, Vec::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid, "{error}");
        assert!(error.sentence.contains(word), "\"{word}\" is missing in: {error}");
        assert!(error.sentence.contains(&format!("{request:#x}")), "the request is missing in: {error}");
    }
    let hello = Request::Hello { version_min: 7, version_max: 9, features: 0 };
    let error = peer.assert_refused(&hello, Vec::new(), &["version 7 to 9"]);
    assert_eq!(error.code, ErrorCode::Unsupported);
    assert_eq!(peer.discard(page(1, 0)).unwrap(), 1, "block 1 is still there");
}

#[test]
fn blocks_that_are_not_valid_are_refused_by_field_and_value_and_leave_the_others() {
    let agent = Listening::new();
    let mut peer = owner(&agent);
    let size = 0x1_0000;
    let named = |geometry: BlockGeometry, name: &str| BlockGeometry { name: name.to_owned(), ..geometry };
    let unit = |geometry: BlockGeometry, granularity| BlockGeometry { granularity, ..geometry };
    let cases: Vec<(Request, &[&str])> = vec![
        (add_block(geometry(2, 0x1_f000, 0x2000), 0), &["block 2", "overlaps block 1", "0x1f000"]),
        (add_block(geometry(2, 0x0, 0x1_1000), 0), &["block 2", "overlaps block 1"]),
        (add_block(geometry(2, 0x4_0800, 0x1000), 0), &["block 2", "gpa 0x40800"]),
        (add_block(geometry(2, 0x4_0000, 0x1001), 0), &["block 2", "length 0x1001"]),
        (add_block(geometry(2, 0x4_0000, 0x1000), 0x10), &["block 2", "fd_offset 0x10"]),
        (add_block(geometry(2, 0x4_0000, 0), 0), &["block 2", "length 0x0"]),
        (add_block(geometry(2, u64::MAX - 0xfff, 0x2000), 0), &["block 2", "overflows", "0xfffffffffffff000"]),
        (add_block(geometry(2, 0, u64::MAX - 0xfff), 0), &["block 2", "length 0xfffffffffffff000"]),
        (add_block(geometry(2, 0x4_0000, 0x1_1000), 0), &["block 2", "0x10000 bytes is shorter", "0x11000"]),
        (add_block(geometry(2, 0x4_0000, 0x1_0000), 0x1000), &["block 2", "0x10000 bytes is shorter", "0x1000"]),
        (add_block(geometry(2, 0x4_0000, 0x1000), u64::MAX - 0xfff), &["block 2", "0xfffffffffffff000"]),
        (add_block(unit(geometry(2, 0x4_0000, 0x1000), 0x3000), 0), &["block 2", "granularity 0x3000"]),
        (add_block(geometry(1, 0x4_0000, 0x1000), 0), &["block 1", "id is taken"]),
        (add_block(named(geometry(2, 0x4_0000, 0x1000), "block1"), 0), &["block 2", "name \"block1\" is taken"]),
        (add_block(named(geometry(2, 0x4_0000, 0x1000), ""), 0), &["block 2", "name of 0 bytes"]),
    ];
    for (request, words) in cases {
        let error = peer.assert_refused(&request, fds(size), words);
        assert_eq!(error.code, ErrorCode::Invalid, "{error}");
    }
    // None of them left anything behind.
    assert!(peer.discard(page(2, 0)).unwrap_err().sentence.contains("block 2 does not exist"));
    peer.ask(&add_block(geometry(2, 0x4_0000, size), 0), fds(size)).unwrap();
    assert_eq!(peer.discard(page(1, 15)).unwrap(), 1);
    assert_eq!(peer.discard(page(2, 15)).unwrap(), 1);
}

#[test]
fn descriptors_that_are_no_memory_are_refused() {
    let agent = Listening::new();
    let mut peer = owner(&agent);
    let request = add_block(geometry(2, 0x4_0000, 0x1000), 0);
    for count in [0usize, 1, 3] {
        let wrong = (0..count).map(|_| memfd(0x1000)).collect();
        peer.assert_refused(&request, wrong, &["add block", &count.to_string(), "2"]);
    }
    let (pipe, _writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    peer.assert_refused(&request, vec![pipe, memfd(4096)], &["block 2", "not a regular file"]);
    let (socket, _other) = UnixStream::pair().unwrap();
    peer.assert_refused(&request, vec![socket.into(), memfd(4096)], &["block 2", "not a regular file"]);
    let memory = memfd(0x1000);
    let own = format!("/proc/self/fd/{}", memory.as_raw_fd());
    for flags in [OFlags::RDONLY, OFlags::WRONLY] {
        let half = rustix::fs::open(&own, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        peer.assert_refused(&request, vec![half, memfd(4096)], &["block 2", "reading and writing"]);
    }
    peer.assert_refused(&request, vec![memfd(0x1000), memfd(0)], &["block 2", "discard bitmap", "shorter"]);
    peer.assert_refused(&Request::RemoveBlock { id: 5 }, Vec::new(), &["block 5"]);
    assert_eq!(peer.discard(page(1, 0)).unwrap(), 1);
}

#[test]
fn ranges_outside_of_blocks_change_nothing() {
    let agent = Listening::new();
    let mut peer = owner(&agent);
    let good = page(1, 4);
    let bad: [(BlockRange, &[&str]); 4] = [
        (page(1, 16), &["range 1", "block 1", "0x10000"]),
        (BlockRange { block: 1, offset: 0xf000, length: 0x1001 }, &["range 1", "block 1", "0x1001"]),
        (BlockRange { block: 1, offset: u64::MAX - 10, length: 20 }, &["range 1", "block 1", "overflows"]),
        (page(6, 0), &["range 1", "block 6 does not exist"]),
    ];
    for (range, words) in bad {
        peer.assert_refused(&Request::Discard { flags: 1, ranges: vec![good, range] }, Vec::new(), words);
        peer.assert_refused(&Request::Populate { ranges: vec![good, range] }, Vec::new(), words);
    }
    assert_eq!(peer.discard(good).unwrap(), 1, "it was not discarded by any of the requests that were refused");
    let populate = Request::Populate { ranges: vec![good, page(1, 16)] };
    peer.assert_refused(&populate, Vec::new(), &["range 1"]);
    assert_eq!(peer.discard(good).unwrap(), 0, "it was not populated either");
}

#[test]
fn an_operator_sees_the_jobs_and_cannot_touch_the_memory() {
    let agent = Listening::new();
    let mut vmm = owner(&agent);
    let mut operator = agent.connect();
    let forbidden = [
        (add_block(geometry(2, 0x4_0000, 0x1000), 0), fds(0x1000)),
        (Request::RemoveBlock { id: 1 }, Vec::new()),
        (Request::Discard { flags: 1, ranges: vec![page(1, 0)] }, Vec::new()),
        (Request::Populate { ranges: vec![page(1, 0)] }, Vec::new()),
        (Request::SetTrackers { sources: 0 }, Vec::new()),
    ];
    for (request, fds) in forbidden {
        let error = operator.ask(&request, fds).unwrap_err();
        assert_eq!(error.code, ErrorCode::Denied, "{error}");
    }
    assert_eq!(operator.status().phase, Phase::Idle);
    assert_eq!(vmm.discard(page(1, 0)).unwrap(), 1, "what the operator asked for was not done");
    drop(operator);
    assert_eq!(vmm.discard(page(1, 1)).unwrap(), 1);
    // When the VMM is gone, another may come.
    drop(vmm);
    let deadline = Instant::now() + SOON;
    let mut next = agent.connect();
    while let Err(error) = next.ask(&add_block(geometry(1, 0, 0x1000), 0), fds(0x1000)) {
        assert_eq!(error.code, ErrorCode::Denied);
        assert!(Instant::now() < deadline, "the old session does not end");
        std::thread::yield_now();
    }
}

// ---- The page stream.

const PAGES: u64 = 40;

/// Says what a source might.
struct FakeSource {
    stream: UnixStream,
}

impl FakeSource {
    fn connect(scene: &Scene) -> Self {
        let stream = UnixStream::connect(scene.path()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Self { stream }
    }

    /// A source whose hello was accepted.
    fn accepted(scene: &Scene) -> Self {
        let mut source = Self::connect(scene);
        source.hello(&hello());
        assert_eq!(source.next().0, Kind::Accept);
        source
    }

    fn send(&mut self, header: RecordHeader, payload: &[u8]) {
        let bytes = [header.sealed(payload).to_wire().as_slice(), payload].concat();
        self.stream.write_all(&bytes).unwrap();
    }

    fn hello(&mut self, hello: &Hello) {
        let payload = hello.encode();
        self.send(RecordHeader::plain(Kind::Hello, 0, payload.len()), &payload);
    }

    fn data(&mut self, block: u32, first: u64, count: u64) {
        let payload = vec![9; (count * PAGE_SIZE) as usize];
        self.send(RecordHeader::new(Kind::Data, 0, block, PageRange::new(first, count), payload.len()), &payload);
    }

    fn end_pass(&mut self, number: u64) {
        self.send(RecordHeader::plain(Kind::PassEnd, number, 0), &[]);
    }

    fn state(&mut self, length: u64, bytes: &[u8]) {
        let payload = StatePart { name: "vcpu", length, offset: 0, bytes }.encode();
        self.send(RecordHeader::plain(Kind::State, 0, payload.len()), &payload);
    }

    fn end(&mut self, totals: Totals) {
        let payload = totals.encode();
        self.send(RecordHeader::plain(Kind::End, 0, payload.len()), &payload);
    }

    fn next(&mut self) -> (Kind, Vec<u8>) {
        let (kind, _, payload) = read_record(&self.stream).expect("the connection ended");
        (kind, payload)
    }

    /// Reads on to a record of this kind; returns the sentence in it.
    fn sentence(&mut self, kind: Kind) -> String {
        loop {
            let (found, payload) = self.next();
            if found == kind {
                return decode_error(&payload).unwrap().sentence;
            }
            assert_eq!(found, Kind::PassDone);
        }
    }
}

fn hello() -> Hello {
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
        blocks,
    }
}

/// A destination that waits for a guest.
struct Scene {
    folder: tempfile::TempDir,
    destination: Side,
}

impl Scene {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), destination: Side::new(Ram::odd(PAGES)) }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("destination")
    }

    fn listen(&self) -> u64 {
        self.listen_for(SOON)
    }

    fn listen_for(&self, peer_timeout: Duration) -> u64 {
        self.destination.listen(&self.path(), &IncomingOptions { peer_timeout, ..IncomingOptions::default() })
    }

    /// The job that waits still takes a guest from a proper source.
    fn assert_takes_a_guest(&self, job: u64) {
        let source = Side::new(Ram::odd(PAGES));
        for page in 0..PAGES {
            source.ram.write(page, 300 + page);
        }
        let outgoing = source.send(&self.path(), &passes(1));
        let status = source.wait(outgoing);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error);
        assert_eq!(self.destination.wait(job).phase, Phase::Completed);
        assert_eq!(self.destination.vmm.resumes(), 1);
        assert_same(&source.ram, &self.destination.ram);
    }
}

#[test]
fn what_is_no_page_stream_is_dropped_and_the_right_source_is_still_taken() {
    let scene = Scene::new();
    let job = scene.listen();
    for garbage in [vec![0xee; 500], b"GET / HTTP/1.1\r\nHost: localhost:7000\r\n\r\n".to_vec()] {
        let mut stranger = FakeSource::connect(&scene);
        stranger.stream.write_all(&garbage).unwrap();
        // Whatever it is told, the connection ends.
        let mut rest = Vec::new();
        let _ = stranger.stream.shutdown(std::net::Shutdown::Write);
        stranger.stream.read_to_end(&mut rest).unwrap();
    }
    // One that claims a large hello, one that begins with another record, and one that goes at once.
    let mut stranger = FakeSource::connect(&scene);
    let header = RecordHeader::plain(Kind::Hello, 0, u32::MAX as usize).sealed(&[]).to_wire();
    stranger.stream.write_all(&header).unwrap();
    assert!(stranger.sentence(Kind::Reject).contains("0xffffffff"));
    let mut stranger = FakeSource::connect(&scene);
    stranger.send(RecordHeader::plain(Kind::Commit, 0, 0), &[]);
    assert!(stranger.sentence(Kind::Reject).contains("Commit"));
    drop(FakeSource::connect(&scene));
    assert_eq!(scene.destination.client.status().unwrap().phase, Phase::Connecting);
    scene.assert_takes_a_guest(job);
}

#[test]
fn a_silent_stranger_does_not_keep_the_right_source_out() {
    let scene = Scene::new();
    let job = scene.listen_for(Duration::from_secs(1));
    let mut silent = FakeSource::connect(&scene);
    let mut slow = FakeSource::connect(&scene);
    let bytes = hello().encode();
    let header = RecordHeader::plain(Kind::Hello, 0, bytes.len()).sealed(&bytes).to_wire();
    slow.stream.write_all(&header[..20]).unwrap();
    // Both are sent away when their time is up.
    assert!(silent.sentence(Kind::Reject).contains("silent"));
    assert!(slow.sentence(Kind::Reject).contains("silent"));
    let _other = FakeSource::connect(&scene);
    scene.assert_takes_a_guest(job);
}

#[test]
fn a_wrong_magic_and_a_wrong_version_are_rejected_in_words() {
    let scene = Scene::new();
    let job = scene.listen();
    let mut payload = hello().encode();
    payload[0] ^= 0xff;
    let mut source = FakeSource::connect(&scene);
    source.send(RecordHeader::plain(Kind::Hello, 0, payload.len()), &payload);
    assert!(source.sentence(Kind::Reject).contains("magic"));
    let mut source = FakeSource::connect(&scene);
    source.hello(&Hello { version_min: 8, version_max: 9, ..hello() });
    let sentence = source.sentence(Kind::Reject);
    assert!(sentence.contains("version 8 to 9"), "{sentence}");
    let mut source = FakeSource::connect(&scene);
    source.hello(&Hello { stream: 3, streams: 2, ..hello() });
    let sentence = source.sentence(Kind::Reject);
    assert!(sentence.contains("stream is 0x3"), "{sentence}");
    let mut source = FakeSource::connect(&scene);
    source.hello(&Hello { streams: 65, ..hello() });
    assert!(source.sentence(Kind::Reject).contains("streams is 0x41"));
    scene.assert_takes_a_guest(job);
}

#[test]
fn a_source_with_other_blocks_is_rejected_by_field() {
    let right = || geometry(3, 0x7000, PAGES * PAGE_SIZE);
    let table = |blocks: Vec<BlockGeometry>| {
        let mut table = BlockTable::new();
        blocks.into_iter().for_each(|block| table.insert(block, 8).unwrap());
        table
    };
    let cases: [(BlockTable, &[&str]); 7] = [
        (table(vec![BlockGeometry { name: "other".into(), ..right() }]), &["block 3", "name", "other", "block3"]),
        (table(vec![BlockGeometry { gpa: 0x9000, ..right() }]), &["block 3", "gpa", "0x9000", "0x7000"]),
        (table(vec![BlockGeometry { length: 0x1000, ..right() }]), &["block 3", "length", "0x1000", "0x28000"]),
        (table(vec![BlockGeometry { granularity: 0x2000, ..right() }]), &["block 3", "granularity", "0x2000"]),
        (table(vec![BlockGeometry { id: 4, ..right() }]), &["block 4", "does not exist"]),
        (table(vec![]), &["0 blocks", "1"]),
        (table(vec![right(), geometry(5, 0x100_0000, 0x1000)]), &["block 5", "does not exist"]),
    ];
    let scene = Scene::new();
    for (blocks, words) in cases {
        let job = scene.listen();
        let mut source = FakeSource::connect(&scene);
        source.hello(&Hello { blocks, ..hello() });
        let sentence = source.sentence(Kind::Reject);
        let status = scene.destination.wait(job);
        assert_eq!(status.phase, Phase::Failed);
        for word in words {
            assert!(sentence.contains(word), "\"{word}\" is missing in: {sentence}");
            assert!(status.error.contains(word), "\"{word}\" is missing in: {}", status.error);
        }
    }
    scene.assert_takes_a_guest(scene.listen());
}

/// A source that does `what` after its hello makes the job fail with an error that has `words`, and the next job takes a guest.
#[track_caller]
fn assert_fails(words: &[&str], what: impl FnOnce(&mut FakeSource)) {
    let scene = Scene::new();
    let job = scene.listen();
    let mut source = FakeSource::accepted(&scene);
    what(&mut source);
    // Read to the end, where there is one to hear it.
    let _ = source.stream.shutdown(std::net::Shutdown::Write);
    let status = scene.destination.wait(job);
    assert_eq!(status.phase, Phase::Failed, "{}", status.error);
    for word in words {
        assert!(status.error.contains(word), "\"{word}\" is missing in: {}", status.error);
    }
    assert_eq!(scene.destination.vmm.resumes(), 0);
    assert!(lock(&scene.destination.vmm.asked).state.is_empty());
    drop(source);
    scene.assert_takes_a_guest(scene.listen());
}

#[test]
fn records_about_pages_that_do_not_exist_fail_the_job() {
    assert_fails(&["block 99", "does not exist"], |source| source.data(99, 0, 1));
    assert_fails(&["block 3", "0x26", "0x3", "0x28"], |source| source.data(3, PAGES - 2, 3));
    let zero = |first: u64, count: u64| RecordHeader::new(Kind::Zero, 0, 3, PageRange::new(first, count), 0);
    assert_fails(&["block 3", "0x28"], |source| source.send(zero(PAGES, 1), &[]));
    assert_fails(&["block 3", "0xffffffffffffffff"], |source| source.send(zero(1, u64::MAX), &[]));
    for run in [PageRange::new(PAGES, 1), PageRange::new(5, 0), PageRange::new(u64::MAX, 2)] {
        let payload = encode_runs(&[PageRange::new(0, 1), run]);
        let header = RecordHeader::new(Kind::Discard, 0, 3, PageRange::new(0, 0), payload.len());
        let first = format!("{:#x}", run.first);
        assert_fails(&["discard", "run", &first], |source| source.send(header, &payload));
    }
    let header = RecordHeader::new(Kind::Discard, 0, 3, PageRange::new(0, 0), 17);
    assert_fails(&["payload length is 0x11"], |source| source.send(header, &[0; 17]));
}

#[test]
fn records_whose_form_is_wrong_fail_the_job() {
    assert_fails(&["payload length 0x400001", "limit"], |source| {
        source.send(RecordHeader::plain(Kind::State, 0, (4 << 20) + 1), &[]);
    });
    assert_fails(&["payload length 0xffffffff"], |source| {
        source.send(RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), u32::MAX as usize), &[]);
    });
    assert_fails(&["payload length 0x10", "1 pages"], |source| {
        source.send(RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), 16), &[0; 16]);
    });
    assert_fails(&["checksum"], |source| {
        let payload = vec![1; PAGE_SIZE as usize];
        let header = RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), payload.len()).sealed(&payload);
        source.stream.write_all(&header.to_wire()).unwrap();
        source.stream.write_all(&[2; PAGE_SIZE as usize]).unwrap();
    });
    assert_fails(&["flags 0x8"], |source| {
        source.send(RecordHeader::new(Kind::Zero, 8, 3, PageRange::new(0, 1), 0), &[]);
    });
    assert_fails(&["kind 0x7777"], |source| {
        let mut bytes = RecordHeader::plain(Kind::PassEnd, 0, 0).to_wire();
        bytes[..2].copy_from_slice(&[0x77, 0x77]);
        source.stream.write_all(&bytes).unwrap();
    });
    assert_fails(&["Hello"], |source| source.hello(&hello()));
    assert_fails(&["Commit"], |source| source.send(RecordHeader::plain(Kind::Commit, 0, 0), &[]));
    assert_fails(&["cut inside a record", "4000 bytes"], |source| {
        let payload = vec![1; PAGE_SIZE as usize];
        let header = RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), payload.len()).sealed(&payload);
        source.stream.write_all(&header.to_wire()).unwrap();
        source.stream.write_all(&payload[..96]).unwrap();
    });
    assert_fails(&["cut inside a record"], |source| source.stream.write_all(&[1; RECORD_SIZE / 2]).unwrap());
    assert_fails(&["closed the connection"], |_| {});
}

#[test]
fn a_wrong_count_fails_the_job() {
    let whole = Totals { data_pages: 2, zero_pages: 0, discarded_pages: 0, stray_pages: 0, passes: 1 };
    let sent = |source: &mut FakeSource| {
        source.data(3, 0, 2);
        source.end_pass(0);
    };
    let wrong = [
        (Totals { data_pages: 3, ..whole }, ["data_pages", "is 3", "2 here"]),
        (Totals { zero_pages: 5, ..whole }, ["zero_pages", "is 5", "0 here"]),
        (Totals { discarded_pages: u64::MAX, ..whole }, ["discarded_pages", "18446744073709551615", "0 here"]),
        (Totals { stray_pages: 1, ..whole }, ["stray_pages", "is 1", "0 here"]),
        (Totals { passes: 2, ..whole }, ["passes", "is 2", "1 here"]),
    ];
    for (totals, words) in wrong {
        assert_fails(&words, |source| {
            sent(source);
            source.end(totals);
        });
    }
    assert_fails(&["ended pass 3", "expected is pass 1"], |source| {
        sent(source);
        source.end_pass(3);
    });
    assert_fails(&["ended pass 0", "expected is pass 1"], |source| {
        sent(source);
        source.end_pass(0);
    });
    assert_fails(&["vcpu", "5 of 10 bytes"], |source| {
        sent(source);
        source.state(10, b"12345");
        source.end(whole);
    });
    assert_fails(&["end record", "longer"], |source| {
        sent(source);
        let payload = [whole.encode(), vec![0]].concat();
        source.send(RecordHeader::plain(Kind::End, 0, payload.len()), &payload);
    });
}

#[test]
fn a_source_that_never_commits_gets_no_guest_running() {
    let scene = Scene::new();
    let job = scene.listen();
    let mut source = FakeSource::accepted(&scene);
    source.data(3, 0, 2);
    source.end_pass(0);
    source.state(3, b"123");
    source.end(Totals { data_pages: 2, passes: 1, ..Totals::default() });
    while source.next().0 != Kind::Loaded {}
    drop(source);
    let status = scene.destination.wait(job);
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error.contains("closed the connection"), "{}", status.error);
    assert_eq!(scene.destination.vmm.resumes(), 0);
    scene.assert_takes_a_guest(scene.listen());
}
