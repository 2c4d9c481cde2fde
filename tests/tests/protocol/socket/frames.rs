// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Incomplete requests: without their descriptors, or without their end.

use super::waits::hand_over;
use pageferry_client::Phase;
use pageferry_protocol::control::frame::{FLAG_NEED_REPLY, FrameHeader};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::hook_reply::{SavedState, encode_hook_reply, encode_state_reply};
use pageferry_protocol::control::job::{RunState, SnapshotMode, SnapshotOptions};
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::control::{Frame, FrameSocket};
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::scenario::{Attached, Listening, Ram, RawClient, SOON};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use zerocopy::IntoBytes;

fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

fn add_block(id: u32) -> Request {
    let gpa = u64::from(id) << 30;
    let geometry = BlockGeometry {
        id,
        name: format!("ram{id}"),
        gpa,
        length: 0x1_0000,
        granularity: PAGE_SIZE,
    };
    Request::AddBlock { geometry, fd_offset: 0, vmm_address: 0, flags: 0 }
}

#[test]
fn a_request_without_its_descriptors_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let mut vmm = RawClient::connect(agent.socket());
    vmm.ask(&add_block(0), vec![memfd(0x1_0000), memfd(4096)]).unwrap();
    // The three standard descriptors are open, so there is no room for another one.
    agent.process().limit_descriptors(3).unwrap();

    let refused = vmm.ask(&add_block(1), vec![memfd(0x1_0000), memfd(4096)]).unwrap_err();
    assert_eq!(refused.code, ErrorCode::System);
    assert!(refused.sentence.contains("out of file descriptors (RLIMIT_NOFILE)"), "{refused}");
    // VHOST_USER_SET_BACKEND_REQ_FD, whose reply is a number.
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let frame =
        Frame { request: 21, flags: FLAG_NEED_REPLY, body: Vec::new(), fds: vec![theirs.into()] };
    vmm.socket.send(&frame, Instant::now() + SOON).unwrap();
    assert_ne!(vmm.reply().unwrap().body, [0; 8]);
    assert_eq!(vmm.status().phase, Phase::Idle);

    agent.process().limit_descriptors(1024).unwrap();
    vmm.ask(&add_block(1), vec![memfd(0x1_0000), memfd(4096)]).unwrap();
    // The VMM still owns the memory.
    let denied =
        RawClient::connect(agent.socket()).ask(&add_block(2), vec![memfd(0x1_0000), memfd(4096)]);
    assert_eq!(denied.unwrap_err().code, ErrorCode::Denied);
}

#[test]
fn an_endless_request_ends_its_connection_but_not_a_vmms() {
    let agent = Listening::start();
    let mut vmm = RawClient::connect(&agent.path);
    vmm.ask(&add_block(0), vec![memfd(0x1_0000), memfd(4096)]).unwrap();
    let header = FrameHeader::new(Request::QueryStatus.code(), 0, 4);
    vmm.raw.write_all(&header.as_bytes()[..7]).unwrap();
    let mut operator = UnixStream::connect(&agent.path).unwrap();
    operator.set_read_timeout(Some(SOON)).unwrap();
    operator.write_all(header.as_bytes()).unwrap();
    let began = Instant::now();
    // A peer that sends byte by byte gets no more time.
    let mut slow = RawClient::connect(&agent.path);
    slow.raw.write_all(&header.as_bytes()[..1]).unwrap();
    assert_eq!(operator.read(&mut [0]).unwrap(), 0, "the connection ended");
    assert!(began.elapsed().as_secs() >= 9);
    assert!(slow.reply().is_err());
    // The VMM may finish a request that it began.
    vmm.raw.write_all(&header.as_bytes()[7..]).unwrap();
    vmm.raw.write_all(&[0; 4]).unwrap();
    vmm.reply().unwrap();
    assert_eq!(vmm.status().phase, Phase::Idle);
}

#[test]
fn only_a_connected_unix_stream_socket_is_taken_for_hooks() {
    let agent = Listening::start();
    let vmm = Attached::new(&agent.path, Ram::odd(16));
    let mut other = RawClient::connect(&agent.path);
    drop(vmm);
    other.ask(&add_block(0), vec![memfd(0x1_0000), memfd(4096)]).unwrap();
    let mut set = |fd: OwnedFd| {
        let frame = Frame { request: 21, flags: FLAG_NEED_REPLY, body: Vec::new(), fds: vec![fd] };
        other.socket.send(&frame, Instant::now() + SOON).unwrap();
        other.reply().unwrap().body != [0; 8]
    };
    assert!(set(memfd(4096)));
    assert!(set(std::fs::File::open("/dev/zero").unwrap().into()));
    assert!(set(std::os::unix::net::UnixDatagram::pair().unwrap().0.into()));
    assert!(!set(UnixStream::pair().unwrap().0.into()));
}

#[test]
fn a_hook_answer_without_its_descriptor_fails_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = AgentProcess::spawn(program(), folder.path(), "agent").unwrap();
    let mut vmm = RawClient::connect(agent.socket());
    let mut hooks = FrameSocket::from(OwnedFd::from(hand_over(&mut vmm, 0)));
    let path = folder.path().join("image").to_str().unwrap().to_owned();
    let options = SnapshotOptions { mode: SnapshotMode::Paused, ..SnapshotOptions::default() };
    let snapshot = Request::StartSnapshot { path, options };
    // The VMM's state comes with a descriptor. The first time there is no room for it.
    for descriptors in [3, 1024] {
        vmm.ask(&snapshot, Vec::new()).unwrap();
        let status = loop {
            let frame = hooks.recv(Instant::now() + SOON).unwrap();
            let (sequence, hook) = Hook::decode(frame.request, &frame.body).unwrap().unwrap();
            let (body, fds) = match hook {
                Hook::Event { status } if status.phase.is_final() => break status,
                Hook::Event { .. } => continue,
                Hook::SaveState => {
                    let pieces = vec![PieceSize { name: "cpu".into(), length: 5 }];
                    let saved = SavedState { guest: RunState::Running, pieces };
                    agent.process().limit_descriptors(descriptors).unwrap();
                    (encode_state_reply(sequence, &Ok(saved)), vec![memfd(5)])
                }
                _ => (encode_hook_reply(sequence, &Ok(())), Vec::new()),
            };
            hooks
                .send(&Frame { fds, ..Frame::reply(frame.request, body) }, Instant::now() + SOON)
                .unwrap();
        };
        if descriptors == 3 {
            assert_eq!(status.phase, Phase::Failed);
            let named = status.error_text().contains("hook \"save state\"")
                && status.error_text().contains("(RLIMIT_NOFILE)");
            assert!(named, "{}", status.error_text());
            agent.process().limit_descriptors(1024).unwrap();
        } else {
            assert_eq!((status.phase, status.error_text()), (Phase::Completed, ""));
        }
    }
}
