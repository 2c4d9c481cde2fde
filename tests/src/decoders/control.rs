// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decoders of the messages between a VMM, its operator and the agent.
#![allow(clippy::expect_used, reason = "a target fails by panicking")]

use super::heap::{fair, within};
use super::{choice, refused, same};
use pageferry_client::{
    BlockRange, Compression, IncomingOptions, JobStatus, OutgoingOptions, Phase, Trackers,
};
use pageferry_protocol::control::frame::{
    FLAG_NEED_REPLY, FLAG_REPLY, HEADER_SIZE, MAX_BODY, VERSION,
};
use pageferry_protocol::control::hook::{self, GuestOrigin, Hook};
use pageferry_protocol::control::hook_reply::{
    SavedState, decode_hook_reply, decode_state_reply, encode_hook_reply, encode_state_reply,
    reply_sequence,
};
use pageferry_protocol::control::job::{
    JobKind, Mode, NonConvergence, Parameters, RestoreMode, RestoreOptions, RunState, SnapshotMode,
    SnapshotOptions,
};
use pageferry_protocol::control::journal::Journal;
use pageferry_protocol::control::reply::{
    AddBlockReply, ErrorCode, HelloReply, JobStarted, RangesReply, RemoteError, Reply,
    decode_reply, encode_reply,
};
use pageferry_protocol::control::request::{DISCARD_PUNCH, FIRST_NATIVE_REQUEST, Request};
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::control::vhost_user::{
    Region, decode_log, decode_mem_table, decode_single_region, decode_u64,
};
use pageferry_protocol::control::{AgentInfo, BlockInfo};
use pageferry_protocol::control::{
    DecodeError, Decoder, Encoder, FrameHeader, FrameSocket, SocketError,
};
use pageferry_protocol::memory::BlockGeometry;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// Longest stream that is tried, in bytes. It fits into a socket's buffer.
pub(super) const MOST: usize = 48 << 10;

/// A socket that holds `bytes` and then ends.
pub(super) fn spooled(bytes: &[u8]) -> OwnedFd {
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("a socket that does not wait");
    ours.write_all(bytes).expect("room for the bytes");
    theirs.into()
}

/// A socket returns the frames in the bytes, and then the reason why there are no more.
pub fn control_frame(data: &[u8]) -> bool {
    let mut rest = &data[..data.len().min(MOST)];
    // The body is allocated when its header is here, and the length in a header may be wrong up to
    // the limit.
    let limit = fair(rest) + MAX_BODY;
    let mut socket = FrameSocket::from(spooled(rest));
    let mut frames = 0;
    loop {
        match within(limit, || socket.try_recv()) {
            Ok(frame) => {
                let frame = frame.expect("all that will come is here");
                let header = FrameHeader::new(frame.request, frame.flags, frame.body.len());
                let (bytes, after) = rest.split_at(HEADER_SIZE + frame.body.len());
                assert_eq!(bytes, [header.as_bytes(), &frame.body].concat());
                assert!(frame.fds.is_empty() && header.check().is_ok());
                assert_eq!(frame.is_reply(), bytes[4] & FLAG_REPLY as u8 != 0);
                assert_eq!(frame.needs_reply(), bytes[4] & FLAG_NEED_REPLY as u8 != 0);
                rest = after;
                frames += 1;
            }
            Err(SocketError::Closed) => {
                assert!(rest.is_empty(), "{} bytes more", rest.len());
                return frames > 0;
            }
            Err(SocketError::ClosedInFrame { missing }) => {
                let size = FrameHeader::read_from_prefix(rest)
                    .map_or(0, |(header, _)| header.size.get() as usize);
                assert_eq!(rest.len() + missing, HEADER_SIZE + size);
                return false;
            }
            Err(SocketError::Header(error)) => {
                let (header, _) = FrameHeader::read_from_prefix(rest).expect("a whole header");
                assert!(
                    header.flags.get() & 3 != VERSION || header.size.get() as usize > MAX_BODY,
                    "{error}"
                );
                return false;
            }
            Err(error) => assert_eq!(error.to_string(), "", "only the bytes can be wrong"),
        }
    }
}

/// One frame, several with bodies, and the largest flags.
pub fn frame_seeds() -> Vec<Vec<u8>> {
    let frame = |request: u32, flags: u32, body: &[u8]| {
        [FrameHeader::new(request, flags, body.len()).as_bytes(), body].concat()
    };
    let many =
        [frame(1, 0, &[]), frame(37, FLAG_NEED_REPLY, &[7; 40]), frame(0x1003, FLAG_REPLY, b"x")]
            .concat();
    vec![frame(0x1000, !3, &[1, 0, 1, 0, 0, 0, 0, 0]), many, frame(5, 0, &[9; 9000])]
}

/// Checks the result for a body whose encoding has the same length. Reserved fields may hold
/// anything.
fn checked<T: PartialEq + std::fmt::Debug>(
    body: &[u8], decode: impl Fn(&[u8]) -> Result<T, DecodeError>, encode: impl Fn(&T) -> Vec<u8>,
) -> bool {
    match within(fair(body), || decode(body)) {
        Ok(value) => {
            let again = encode(&value);
            assert_eq!(again.len(), body.len(), "{value:?} is encoded to another length");
            same(decode(&again), Ok(value));
            true
        }
        Err(error) => refused(&error),
    }
}

/// A request matches its code, and its encoding decodes to the same request.
pub fn request(data: &[u8]) -> bool {
    let (low, body) = choice(data);
    let code = FIRST_NATIVE_REQUEST + u32::from(low);
    if Request::decode(code, body).is_none() {
        return false;
    }
    let decode = |body: &[u8]| Request::decode(code, body).expect("the code is known");
    checked(body, decode, |request| {
        assert_eq!(request.code(), code);
        request.encode()
    })
}

/// One of each request.
pub fn request_seeds() -> Vec<Vec<u8>> {
    let range = |block, offset, length| BlockRange { block, offset, length };
    let options = OutgoingOptions {
        policy: NonConvergence::Throttle,
        streams: 64,
        ..OutgoingOptions::default()
    };
    let compressed = |compression| OutgoingOptions { compression, ..options.clone() };
    let policy = NonConvergence::Postcopy;
    let hybrid = OutgoingOptions {
        mode: Mode::Hybrid,
        policy,
        switch_after: 3,
        urgent_streams: 62,
        release: true,
        ..OutgoingOptions::default()
    };
    let geometry = BlockGeometry {
        id: 3,
        name: "ram".into(),
        gpa: 0x7000,
        length: 1 << 30,
        granularity: 2 << 20,
    };
    let requests = [
        Request::Hello {
            version_min: 1,
            version_max: 2,
            features: 2,
            agent: 0,
            name: String::new(),
        },
        Request::Hello {
            version_min: 1,
            version_max: 1,
            features: 3,
            agent: u64::MAX,
            name: "größer".into(),
        },
        Request::AddBlock { geometry, fd_offset: 0x5000, vmm_address: 1 << 47, flags: 1 },
        Request::RemoveBlock { id: 7 },
        Request::Discard {
            flags: DISCARD_PUNCH,
            ranges: vec![range(0, 0, 4096), range(1, 1 << 40, 1)],
        },
        Request::Free { ranges: vec![range(3, 8192, 4096)] },
        Request::Populate { ranges: vec![range(2, 4096, u64::MAX)] },
        Request::SetTrackers { sources: Trackers::HOOKS | Trackers::WRITE_PROTECT },
        Request::StartOutgoing { target: "tcp:[::1]:7000".into(), options: options.clone() },
        Request::StartIncoming {
            listen: "unix:/run/ü".into(),
            options: IncomingOptions::default(),
        },
        Request::Cancel,
        Request::StartOutgoing {
            target: "unix:/run/a".into(),
            options: compressed(Compression::Lz4),
        },
        Request::SetParameters {
            parameters: Parameters { throttle: Some(99), ..Parameters::bandwidth(1 << 20) },
        },
        Request::QueryAgent,
        Request::QueryStatus,
        Request::Subscribe { interval: Duration::from_millis(10) },
        Request::Resume { force: true },
        Request::StartPostcopy,
        Request::StartOutgoing { target: "unix:/run/a".into(), options: hybrid.clone() },
        Request::Recover { session: [7; 16], address: "tcp:[::1]:7000".into(), options: hybrid },
    ];
    requests
        .iter()
        .chain(&image_requests())
        .map(|request| [vec![request.code() as u8], request.encode()].concat())
        .collect()
}

/// The requests about images, in all modes.
fn image_requests() -> Vec<Request> {
    let path = || String::from("/images/mönday.img");
    let full = SnapshotOptions {
        workers: 64,
        bandwidth: 1 << 30,
        base: "/images/sunday.img".into(),
        track: true,
        replace: true,
        cached: true,
        ..SnapshotOptions::default()
    };
    let working_set = "/images/monday.ws".into();
    let lazy = RestoreOptions {
        mode: RestoreMode::Lazy,
        workers: 64,
        working_set,
        ..RestoreOptions::default()
    };
    let snapshots = SnapshotMode::NAMES.into_iter().flat_map(|(_, mode)| {
        [
            SnapshotOptions { mode, ..full.clone() },
            SnapshotOptions { mode, ..SnapshotOptions::default() },
        ]
    });
    let restores =
        RestoreMode::NAMES.map(|(_, mode)| RestoreOptions { mode, ..RestoreOptions::default() });
    let snapshots = snapshots.map(|options| Request::StartSnapshot { path: path(), options });
    let restores = restores
        .into_iter()
        .chain([lazy])
        .map(|options| Request::StartRestore { path: path(), options });
    snapshots.chain(restores).collect()
}

type DecodeFields<T> = fn(&mut Decoder<'_>) -> Result<T, DecodeError>;
type EncodeFields<T> = fn(&T, Encoder) -> Encoder;

fn answer<T: PartialEq + std::fmt::Debug>(
    body: &[u8], decode: DecodeFields<T>, encode: EncodeFields<T>,
) -> bool {
    checked(body, |body| decode_reply(body, decode), |reply| encode_reply(reply, encode))
}

/// A reply to a request or to a hook carries a result or an error, and nothing else.
pub fn reply(data: &[u8]) -> bool {
    let (kind, body) = choice(data);
    let sequence = || reply_sequence(body).unwrap_or_default();
    match kind {
        0 => answer(body, HelloReply::decode, HelloReply::encode),
        1 => answer(body, AddBlockReply::decode, AddBlockReply::encode),
        2 => answer(body, RangesReply::decode, RangesReply::encode),
        3 => answer(body, JobStarted::decode, JobStarted::encode),
        4 => answer(body, JobStatus::decode, JobStatus::encode),
        5 => answer(body, |_| Ok(()), |(), encoder| encoder),
        6 => checked(body, decode_hook_reply, |reply| encode_hook_reply(sequence(), reply)),
        7 => checked(body, decode_state_reply, |reply| encode_state_reply(sequence(), reply)),
        8 => answer(body, AgentInfo::decode, AgentInfo::encode),
        _ => false,
    }
}

/// A success of each kind, and errors.
pub fn reply_seeds() -> Vec<Vec<u8>> {
    let error = RemoteError::new(ErrorCode::Busy, "block 3 is in use");
    let hello =
        HelloReply { version: 1, features: 0, max_body: 1 << 20, max_ranges: 43_690, pid: 77 };
    let started = JobStarted { job: 9, address: "tcp:127.0.0.1:4444".into() };
    let pieces = vec![
        PieceSize { name: "vcpu".into(), length: 5 },
        PieceSize { name: String::new(), length: 0 },
    ];
    let bodies = [
        encode_reply(&Ok(hello), HelloReply::encode),
        encode_reply(
            &Ok(AddBlockReply { host_page_size: 2 << 20, sealed: 1 }),
            AddBlockReply::encode,
        ),
        encode_reply(&Ok(RangesReply { changed_pages: 512 }), RangesReply::encode),
        encode_reply(&Ok(started), JobStarted::encode),
        encode_reply(&Ok(status()), JobStatus::encode),
        encode_reply(&Reply::<()>::Err(error.clone()), |(), encoder| encoder),
        encode_hook_reply(40, &Err(error)),
        encode_state_reply(41, &Ok(SavedState { guest: RunState::Paused, pieces })),
        encode_reply(&Ok(agent()), AgentInfo::encode),
    ];
    (0..).zip(bodies).map(|(kind, body)| [vec![kind], body].concat()).collect()
}

fn agent() -> AgentInfo {
    let block = BlockInfo {
        id: 3,
        name: "ram".into(),
        gpa: 1 << 32,
        length: 1 << 30,
        host_page_size: 2 << 20,
        discarded_pages: 512,
    };
    let (version, name) = ("0.1.0".into(), "größer".into());
    AgentInfo { version, pid: 7, name, vmm_pid: 8, blocks: vec![block.clone(), block] }
}

fn status() -> JobStatus {
    JobStatus {
        job: 7,
        kind: JobKind::Outgoing,
        phase: Phase::Failed,
        error: Some("gone".into()),
        ..JobStatus::default()
    }
}

/// A hook matches its code and number, and its encoding decodes to the same hook.
pub fn hook(data: &[u8]) -> bool {
    let (low, body) = choice(data);
    let code = hook::code::PAUSE + u32::from(low);
    if Hook::decode(code, body).is_none() {
        return false;
    }
    let decode = |body: &[u8]| Hook::decode(code, body).expect("the code is known");
    checked(body, decode, |(sequence, hook)| {
        assert_eq!((hook.code(), Ok(*sequence)), (code, reply_sequence(body)));
        hook.encode(*sequence)
    })
}

/// One of each hook.
pub fn hook_seeds() -> Vec<Vec<u8>> {
    let pieces = vec![
        PieceSize { name: "vcpu".into(), length: 1 << 30 },
        PieceSize { name: String::new(), length: 0 },
    ];
    let hooks = [
        Hook::Pause,
        Hook::Resume { force: true, paused: true },
        Hook::StartTracking { sources: Trackers::HOOKS },
        Hook::StopTracking { sources: Trackers::HOOKS | Trackers::WRITE_PROTECT },
        Hook::SyncTracker,
        Hook::ClearTracker { block: 3, first: 128, bitmap: vec![1, u64::MAX] },
        Hook::Throttle { percent: 99 },
        Hook::SaveState,
        Hook::LoadState { pieces },
        Hook::Relinquish { session: [7; 16], release: true },
        Hook::ExpectGuest { origin: GuestOrigin::Migration { address: "unix:/a".into() } },
        Hook::AcceptGuest { origin: GuestOrigin::Migration { address: "tcp:[::]:1".into() } },
        Hook::MemoryArrived,
        Hook::ProbeFaults,
        Hook::RegisterFaults,
        Hook::KeepJournal { journal: vec![1, 2, 3] },
        Hook::UnregisterFaults { complete: true },
        Hook::WatchWrites,
        Hook::UnwatchWrites,
        Hook::CheckGuest,
        Hook::AcceptGuest { origin: GuestOrigin::Image { path: "/images/mönday.img".into() } },
        Hook::Event { status: Box::new(status()) },
    ];
    (9..)
        .zip(hooks)
        .map(|(sequence, hook)| [vec![hook.code() as u8], hook.encode(sequence)].concat())
        .collect()
}

/// The journal of a job.
pub fn journal(data: &[u8]) -> bool {
    checked(data, Journal::decode, Journal::encode)
}

/// A journal of each kind.
pub fn journal_seeds() -> Vec<Vec<u8>> {
    let (path, options) = ("/images/größer".to_owned(), RestoreOptions::default());
    let restore = Journal::Restore { path, image: [3; 16], options };
    let (address, options) = ("tcp:[::1]:7000".to_owned(), IncomingOptions::default());
    let (session, acknowledge) = ([4; 16], true);
    let incoming = [Vec::new(), vec![5; 65]].map(|peer| {
        let (address, options) = (address.clone(), options.clone());
        Journal::Incoming { session, peer, address, acknowledge, options }.encode()
    });
    [vec![restore.encode()], incoming.into()].concat()
}

fn print_region(encoder: Encoder, region: &Region) -> Encoder {
    encoder.u64(region.gpa).u64(region.length).u64(region.vmm_address).u64(region.fd_offset)
}

fn print_table(regions: &[Region]) -> Vec<u8> {
    regions.iter().fold(Encoder::new().u32(regions.len() as u32).u32(0), print_region).finish()
}

/// The bodies of vhost-user's requests, encoded again in its layout.
pub fn vhost_user(data: &[u8]) -> bool {
    let (kind, body) = choice(data);
    match kind {
        0 => checked(body, decode_mem_table, |table| print_table(table)),
        1 => checked(body, decode_single_region, |region| {
            print_region(Encoder::new().u64(0), region).finish()
        }),
        2 => checked(body, decode_u64, |value| value.to_le_bytes().to_vec()),
        3 => {
            let numbers =
                |body: &[u8]| decode_log(body).map(|log| (log.mmap_size, log.mmap_offset));
            checked(body, numbers, |(size, offset)| Encoder::new().u64(*size).u64(*offset).finish())
        }
        _ => false,
    }
}

/// A table with the largest number of regions, one region, and numbers.
pub fn vhost_user_seeds() -> Vec<Vec<u8>> {
    let region = |at: u64| Region {
        gpa: at << 30,
        length: 1 << 30,
        vmm_address: at << 40,
        fd_offset: at << 12,
    };
    let table = |count: u64| print_table(&(0..count).map(region).collect::<Vec<_>>());
    let single = print_region(Encoder::new().u64(0), &region(3)).finish();
    let log = Encoder::new().u64(1 << 20).u64(4096).finish();
    let bodies = [(0, table(2)), (0, table(32)), (1, single), (2, vec![0xff; 8]), (3, log)];
    bodies.map(|(kind, body)| [vec![kind], body].concat()).into()
}
