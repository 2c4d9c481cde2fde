// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket: requests that are refused with the field and its value, and connections that
//! end.

use super::geometry;
use pageferry_client::{
    MIN_BANDWIDTH, OutgoingOptions, Parameters, Phase, RestoreOptions, SnapshotOptions, Trackers,
};
use pageferry_protocol::control::SocketError;
use pageferry_protocol::control::codec::Encoder;
use pageferry_protocol::control::frame::{HEADER_SIZE, MAX_BODY};
use pageferry_protocol::control::reply::{ErrorCode, RemoteError, Reply};
use pageferry_protocol::control::request::{BlockRange, FIRST_NATIVE_REQUEST, Request, code};
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
use pageferry_tests::files::memfd;
use pageferry_tests::scenario::{Listening, RawClient, SOON};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

#[track_caller]
fn assert_refused(
    peer: &mut RawClient, request: &Request, fds: Vec<OwnedFd>, words: &[&str],
) -> RemoteError {
    let error = peer.ask(request, fds).unwrap_err();
    for word in words {
        assert!(error.sentence.contains(word), "\"{word}\" is missing in: {error}");
    }
    error
}

/// Checks that the agent ends this connection without a reply.
#[track_caller]
fn assert_dropped(peer: &mut RawClient) {
    match peer.reply() {
        Err(SocketError::Closed | SocketError::Kernel(_)) => {}
        other => panic!("not dropped: {other:?}"),
    }
}

/// Discards a range. Returns the number of pages that changed.
fn discard(peer: &mut RawClient, range: BlockRange) -> Reply<u64> {
    let body = peer.ask(&Request::Discard { flags: 0, ranges: vec![range] }, Vec::new())?;
    Ok(u64::from_le_bytes(body.try_into().unwrap()))
}

fn add_block(geometry: BlockGeometry, fd_offset: u64) -> Request {
    Request::AddBlock { geometry, fd_offset, vmm_address: 0, flags: 0 }
}

/// Memory and a bitmap for it.
fn fds(size: u64) -> Vec<OwnedFd> {
    vec![memfd(size).unwrap(), memfd(4096).unwrap()]
}

fn page(block: u32, page: u64) -> BlockRange {
    BlockRange { block, offset: page * PAGE_SIZE, length: PAGE_SIZE }
}

/// A connection that owns one block of 16 pages at 64 KiB, with the id 1.
fn owner(agent: &Listening) -> RawClient {
    let mut peer = agent.connect();
    peer.ask(&add_block(geometry(1, 0x1_0000, 0x1_0000), 0), fds(0x1_0000)).unwrap();
    peer
}

#[test]
fn a_broken_header_ends_its_connection_only() {
    let agent = Listening::start();
    let mut vmm = owner(&agent);
    let header = |request: u32, flags: u32, size: u32| {
        Encoder::new().u32(request).u32(flags).u32(size).finish()
    };
    for bytes in [
        header(code::HELLO, 2, 0),
        header(code::HELLO, 1, MAX_BODY as u32 + 1),
        header(1, 1, u32::MAX),
    ] {
        assert_eq!(bytes.len(), HEADER_SIZE);
        let mut stranger = agent.connect();
        stranger.raw.write_all(&bytes).unwrap();
        assert_dropped(&mut stranger);
    }
    // A connection that ends in a header, and one that ends in a body.
    agent.connect().raw.write_all(&[1, 2, 3]).unwrap();
    agent.connect().raw.write_all(&header(code::HELLO, 1, 16)).unwrap();
    assert_eq!(discard(&mut vmm, page(1, 3)).unwrap(), 1, "the VMM's session continues");
    assert_eq!(agent.connect().status().phase, Phase::Idle);
}

#[test]
fn bad_requests_are_refused_by_name_and_the_connection_lives() {
    let agent = Listening::start();
    let mut peer = owner(&agent);
    for unknown in [0x1fff, 0x1006, FIRST_NATIVE_REQUEST + 0xf000] {
        let error = peer.ask_raw(unknown, vec![1, 2, 3], Vec::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported);
        assert!(error.sentence.contains(&format!("{unknown:#x}")), "{error}");
    }
    let compressed = |which: u16, level: u16| {
        let options = OutgoingOptions::default();
        let mut body = Request::StartOutgoing { target: "unix:/x".into(), options }.encode();
        // Before the two cases at the end, which wait for a timeout.
        let at = body.len() - 22;
        body[at..at + 4].copy_from_slice(&[which.to_le_bytes(), level.to_le_bytes()].concat());
        body
    };
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
        (
            code::START_INCOMING,
            Encoder::new().text("unix:/x").u64(0).u64(1).finish(),
            "peer_timeout is 0 s",
        ),
        (
            code::START_OUTGOING,
            compressed(3, 0),
            "compression is 0x3, allowed: 0 none, 1 lz4, 2 zstd",
        ),
        (
            code::START_OUTGOING,
            compressed(2, 20),
            "compression_level is 0x14, allowed: 1 to 19 with zstd",
        ),
        (code::START_OUTGOING, Encoder::new().u32(u32::MAX).finish(), "target"),
    ];
    for (request, body, word) in cases {
        let error = peer.ask_raw(request, body, Vec::new()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid, "{error}");
        assert!(error.sentence.contains(word), "\"{word}\" is missing in: {error}");
        assert!(
            error.sentence.contains(&format!("{request:#x}")),
            "the request is missing in: {error}"
        );
    }
    let hello = Request::Hello {
        version_min: 7,
        version_max: 9,
        features: 0,
        agent: 0,
        name: String::new(),
    };
    let error = assert_refused(&mut peer, &hello, Vec::new(), &["version 7 to 9"]);
    assert_eq!(error.code, ErrorCode::Unsupported);
    assert_eq!(discard(&mut peer, page(1, 0)).unwrap(), 1, "block 1 is still there");
}

#[test]
fn invalid_blocks_are_refused_by_field_and_value() {
    let agent = Listening::start();
    let mut peer = owner(&agent);
    let size = 0x1_0000;
    let named =
        |geometry: BlockGeometry, name: &str| BlockGeometry { name: name.to_owned(), ..geometry };
    let unit = |geometry: BlockGeometry, granularity| BlockGeometry { granularity, ..geometry };
    let cases: Vec<(Request, &[&str])> = vec![
        (add_block(geometry(2, 0x1_f000, 0x2000), 0), &["block 2", "overlaps block 1", "0x1f000"]),
        (add_block(geometry(2, 0x0, 0x1_1000), 0), &["block 2", "overlaps block 1"]),
        (add_block(geometry(2, 0x4_0800, 0x1000), 0), &["block 2", "gpa 0x40800"]),
        (add_block(geometry(2, 0x4_0000, 0x1001), 0), &["block 2", "length 0x1001"]),
        (add_block(geometry(2, 0x4_0000, 0x1000), 0x10), &["block 2", "fd_offset 0x10"]),
        (add_block(geometry(2, 0x4_0000, 0), 0), &["block 2", "length 0x0"]),
        (
            add_block(geometry(2, u64::MAX - 0xfff, 0x2000), 0),
            &["block 2", "overflows", "0xfffffffffffff000"],
        ),
        (add_block(geometry(2, 0, u64::MAX - 0xfff), 0), &["block 2", "length 0xfffffffffffff000"]),
        (
            add_block(geometry(2, 0x4_0000, 0x1_1000), 0),
            &["block 2", "0x10000 bytes is shorter", "0x11000"],
        ),
        (
            add_block(geometry(2, 0x4_0000, 0x1_0000), 0x1000),
            &["block 2", "0x10000 bytes is shorter", "0x1000"],
        ),
        (
            add_block(geometry(2, 0x4_0000, 0x1000), u64::MAX - 0xfff),
            &["block 2", "0xfffffffffffff000"],
        ),
        (
            add_block(unit(geometry(2, 0x4_0000, 0x1000), 0x3000), 0),
            &["block 2", "granularity 0x3000"],
        ),
        (add_block(geometry(1, 0x4_0000, 0x1000), 0), &["block 1", "id is taken"]),
        (
            add_block(named(geometry(2, 0x4_0000, 0x1000), "block1"), 0),
            &["block 2", "name \"block1\" is taken"],
        ),
        (add_block(named(geometry(2, 0x4_0000, 0x1000), ""), 0), &["block 2", "name of 0 bytes"]),
    ];
    for (request, words) in cases {
        let error = assert_refused(&mut peer, &request, fds(size), words);
        assert_eq!(error.code, ErrorCode::Invalid, "{error}");
    }
    // None of these left anything behind.
    assert!(
        discard(&mut peer, page(2, 0)).unwrap_err().sentence.contains("block 2 does not exist")
    );
    peer.ask(&add_block(geometry(2, 0x4_0000, size), 0), fds(size)).unwrap();
    assert_eq!(discard(&mut peer, page(1, 15)).unwrap(), 1);
    assert_eq!(discard(&mut peer, page(2, 15)).unwrap(), 1);
}

#[test]
fn descriptors_that_are_no_memory_are_refused() {
    let agent = Listening::start();
    let mut peer = owner(&agent);
    let request = add_block(geometry(2, 0x4_0000, 0x1000), 0);
    for count in [0usize, 1, 3] {
        let wrong = (0..count).map(|_| memfd(0x1000).unwrap()).collect();
        assert_refused(&mut peer, &request, wrong, &["add block", &count.to_string(), "2"]);
    }
    let (pipe, _writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    assert_refused(
        &mut peer,
        &request,
        vec![pipe, memfd(4096).unwrap()],
        &["block 2", "not a regular file"],
    );
    let (socket, _other) = UnixStream::pair().unwrap();
    assert_refused(
        &mut peer,
        &request,
        vec![socket.into(), memfd(4096).unwrap()],
        &["block 2", "not a regular file"],
    );
    let memory = memfd(0x1000).unwrap();
    let own = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let opened =
        |path: &str, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
    for (flags, name) in [
        (OFlags::RDONLY, "O_RDONLY"),
        (OFlags::WRONLY, "O_WRONLY"),
        (OFlags::PATH, "O_PATH"),
        // Linux writes at the end of such a file, whatever the offset.
        (OFlags::RDWR | OFlags::APPEND, "O_APPEND"),
    ] {
        let wrong = opened(&own, flags);
        assert_refused(
            &mut peer,
            &request,
            vec![wrong, memfd(4096).unwrap()],
            &["block 2", "memory fd", name],
        );
    }
    let whole = memfd(4096).unwrap();
    let bitmap = format!("/proc/self/fd/{}", whole.as_raw_fd());
    for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::PATH] {
        let wrong = vec![memfd(0x1000).unwrap(), opened(&bitmap, flags)];
        assert_refused(&mut peer, &request, wrong, &["block 2", "discard bitmap", "O_RDWR"]);
    }
    assert_refused(
        &mut peer,
        &request,
        vec![memfd(0x1000).unwrap(), memfd(0).unwrap()],
        &["block 2", "discard bitmap", "shorter"],
    );
    assert_refused(&mut peer, &Request::RemoveBlock { id: 5 }, Vec::new(), &["block 5"]);
    assert_eq!(discard(&mut peer, page(1, 0)).unwrap(), 1);
}

#[test]
fn ranges_outside_of_blocks_change_nothing() {
    let agent = Listening::start();
    let mut peer = owner(&agent);
    let good = page(1, 4);
    let bad: [(BlockRange, &[&str]); 4] = [
        (page(1, 16), &["range 1", "block 1", "0x10000"]),
        (
            BlockRange { block: 1, offset: 0xf000, length: 0x1001 },
            &["range 1", "block 1", "0x1001"],
        ),
        (
            BlockRange { block: 1, offset: u64::MAX - 10, length: 20 },
            &["range 1", "block 1", "overflows"],
        ),
        (page(6, 0), &["range 1", "block 6 does not exist"]),
    ];
    for (range, words) in bad {
        assert_refused(
            &mut peer,
            &Request::Discard { flags: 1, ranges: vec![good, range] },
            Vec::new(),
            words,
        );
        assert_refused(
            &mut peer,
            &Request::Populate { ranges: vec![good, range] },
            Vec::new(),
            words,
        );
    }
    assert_eq!(
        discard(&mut peer, good).unwrap(),
        1,
        "it was not discarded by any of the requests that were refused"
    );
    let populate = Request::Populate { ranges: vec![good, page(1, 16)] };
    assert_refused(&mut peer, &populate, Vec::new(), &["range 1"]);
    assert_eq!(discard(&mut peer, good).unwrap(), 0, "the page was not populated either");
}

#[test]
fn an_operator_sees_the_jobs_and_cannot_touch_the_memory() {
    let agent = Listening::start();
    let mut vmm = owner(&agent);
    let mut operator = agent.connect();
    let forbidden = [
        (add_block(geometry(2, 0x4_0000, 0x1000), 0), fds(0x1000)),
        (Request::RemoveBlock { id: 1 }, Vec::new()),
        (Request::Discard { flags: 1, ranges: vec![page(1, 0)] }, Vec::new()),
        (Request::Populate { ranges: vec![page(1, 0)] }, Vec::new()),
        (Request::SetTrackers { sources: Trackers::HOOKS }, Vec::new()),
    ];
    for (request, fds) in forbidden {
        let error = operator.ask(&request, fds).unwrap_err();
        assert_eq!(error.code, ErrorCode::Denied, "{error}");
    }
    assert_eq!(operator.status().phase, Phase::Idle);
    assert_eq!(
        discard(&mut vmm, page(1, 0)).unwrap(),
        1,
        "what the operator asked for was not done"
    );
    drop(operator);
    assert_eq!(discard(&mut vmm, page(1, 1)).unwrap(), 1);
    // When the VMM is gone, another one may connect.
    drop(vmm);
    let deadline = Instant::now() + SOON;
    let mut next = agent.connect();
    while let Err(error) = next.ask(&add_block(geometry(1, 0, 0x1000), 0), fds(0x1000)) {
        assert_eq!(error.code, ErrorCode::Denied);
        assert!(Instant::now() < deadline, "the old session does not end");
        std::thread::yield_now();
    }
}

#[test]
fn a_bandwidth_too_low_is_refused_with_the_minimum() {
    let agent = Listening::start();
    let mut vmm = owner(&agent);
    for bandwidth in [1, MIN_BANDWIDTH - 1] {
        let migration = OutgoingOptions { bandwidth, ..OutgoingOptions::default() };
        let snapshot = SnapshotOptions { bandwidth, ..SnapshotOptions::default() };
        let restore = RestoreOptions { bandwidth, ..RestoreOptions::default() };
        for request in [
            Request::StartOutgoing { target: "unix:/nowhere".into(), options: migration.clone() },
            Request::SetParameters { parameters: Parameters::bandwidth(bandwidth) },
            Request::StartSnapshot { path: "/nowhere".into(), options: snapshot },
            Request::StartRestore { path: "/nowhere".into(), options: restore },
        ] {
            let words = [format!("bandwidth is {bandwidth:#x}"), "at least 0x10000".to_owned()];
            assert_refused(&mut vmm, &request, Vec::new(), &words.each_ref().map(String::as_str));
        }
    }
}
