// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::super::devices::DeviceSpec;
use super::*;
use crate::control::frame::MAX_BODY;
use crate::control::job::{
    Compression, Counters, HugePages, JobKind, JobStatus, MIN_BANDWIDTH, MIN_CAPTURE_MEMORY, Mode,
    NonConvergence, Phase, Placing, RestoreMode, ResumePolicy, RunState, SnapshotMode,
};
use proptest::prelude::*;

fn any_resume() -> impl Strategy<Value = ResumePolicy> {
    prop::sample::select(ResumePolicy::NAMES.map(|(_, policy)| policy).to_vec())
}

fn any_huge_pages() -> impl Strategy<Value = HugePages> {
    prop::sample::select(HugePages::NAMES.map(|(_, choice)| choice).to_vec())
}

fn any_options() -> impl Strategy<Value = OutgoingOptions> {
    let policy = prop::sample::select(NonConvergence::NAMES.map(|(_, policy)| policy).to_vec());
    let compression = prop_oneof![
        Just(Compression::None),
        Just(Compression::Lz4),
        (1..=Compression::MAX_LEVEL).prop_map(Compression::Zstd),
    ];
    let mode = prop::sample::select(Mode::NAMES.map(|(_, mode)| mode).to_vec());
    let postcopy = (mode, any::<u32>(), any::<bool>(), any_resume(), any_huge_pages());
    let numbers = (1u16..=32, 0u64..1 << 40, any::<u64>(), any::<u32>(), 1u64..1 << 30);
    (numbers, policy, compression, postcopy).prop_map(
        |(
            (streams, downtime, bandwidth, max_passes, timeout),
            policy,
            compression,
            (mode, switch_after, release, resume, huge_pages),
        )| {
            OutgoingOptions {
                streams,
                downtime_limit: Duration::from_micros(downtime),
                bandwidth,
                max_passes,
                policy: if mode == Mode::Hybrid { policy } else { NonConvergence::Fail },
                compression,
                mode,
                switch_after,
                urgent_streams: 33 - streams,
                release,
                resume,
                peer_timeout: Duration::from_micros(timeout),
                hook_timeout: Duration::from_micros(timeout + 1),
                huge_pages,
            }
        },
    )
}

fn any_parameters() -> impl Strategy<Value = Parameters> {
    let option = prop::option::of::<std::ops::Range<u32>>;
    let policy = prop::sample::select(NonConvergence::NAMES.map(|(_, policy)| policy).to_vec());
    let bandwidth = prop::option::of(prop_oneof![Just(0), MIN_BANDWIDTH..]);
    let numbers = (option(0..1000), option(0..1000), option(0..100));
    (bandwidth, prop::option::of(policy), prop::option::of(0u64..1 << 40), numbers).prop_map(
        |(bandwidth, policy, downtime_limit, (max_passes, switch_after, throttle))| Parameters {
            bandwidth,
            downtime_limit: downtime_limit.map(Duration::from_micros),
            max_passes,
            policy,
            switch_after,
            throttle,
        },
    )
}

fn any_snapshot() -> impl Strategy<Value = SnapshotOptions> {
    let mode = prop::sample::select(SnapshotMode::NAMES.map(|(_, mode)| mode).to_vec());
    let numbers = (1u16..=64, any::<u64>(), MIN_CAPTURE_MEMORY.., 1u64..1 << 30);
    (mode, numbers, ".{0,60}", any::<[bool; 3]>()).prop_map(
        |(mode, (workers, bandwidth, capture_memory, timeout), base, flags)| {
            let [track, replace, cached] = flags;
            let hook_timeout = Duration::from_micros(timeout);
            SnapshotOptions {
                mode,
                workers,
                bandwidth,
                base,
                track,
                replace,
                cached,
                capture_memory,
                hook_timeout,
            }
        },
    )
}

fn any_restore() -> impl Strategy<Value = RestoreOptions> {
    let mode = prop::sample::select(RestoreMode::NAMES.map(|(_, mode)| mode).to_vec());
    let choices = (any_resume(), any_huge_pages(), any::<bool>());
    (mode, 1u16..=64, any::<u64>(), 1u64..1 << 30, ".{0,60}", choices).prop_map(
        |(mode, workers, bandwidth, timeout, working_set, (resume, huge_pages, clone))| {
            RestoreOptions {
                shared_base: clone && mode == RestoreMode::Lazy,
                resume,
                huge_pages,
                mode,
                workers,
                bandwidth,
                working_set: if mode == RestoreMode::Lazy { working_set } else { String::new() },
                hook_timeout: Duration::from_micros(timeout),
            }
        },
    )
}

fn any_ranges() -> impl Strategy<Value = Vec<BlockRange>> {
    let range = (any::<u32>(), any::<u64>(), any::<u64>())
        .prop_map(|(block, offset, length)| BlockRange { block, offset, length });
    prop::collection::vec(range, 0..40)
}

fn any_request() -> impl Strategy<Value = Request> {
    prop_oneof![
        (any::<u16>(), any::<u16>(), any::<u64>(), 1u64.., "[a-zé -]{0,60}").prop_map(
            |(version_min, version_max, features, number, name)| {
                let (agent, name) = match features & FEATURE_FENCE {
                    0 => (0, String::new()),
                    _ => (number, name),
                };
                Request::Hello { version_min, version_max, features, agent, name }
            }
        ),
        (any::<[u64; 5]>(), any::<u32>(), "[a-z]{1,255}", 0u32..2).prop_map(
            |(n, id, name, flags)| {
                Request::AddBlock {
                    geometry: BlockGeometry {
                        id,
                        name,
                        gpa: n[0],
                        length: n[1],
                        granularity: n[2],
                    },
                    fd_offset: n[3],
                    vmm_address: n[4],
                    flags,
                }
            }
        ),
        any::<u32>().prop_map(|id| Request::RemoveBlock { id }),
        (0u32..2, any_ranges()).prop_map(|(flags, ranges)| Request::Discard { flags, ranges }),
        any_ranges().prop_map(|ranges| Request::Free { ranges }),
        any_ranges().prop_map(|ranges| Request::Populate { ranges }),
        (1u32..8).prop_map(|bits| Request::SetTrackers {
            sources: Trackers::from_wire("sources", bits).unwrap()
        }),
        (".{0,60}", any_options())
            .prop_map(|(target, options)| Request::StartOutgoing { target, options }),
        any_parameters().prop_map(|parameters| Request::SetParameters { parameters }),
        (10u64..3_600_000)
            .prop_map(|ms| Request::Subscribe { interval: Duration::from_millis(ms) }),
        any::<bool>().prop_map(|force| Request::Resume { force }),
        (any::<[u8; 16]>(), ".{0,60}", any_options())
            .prop_map(|(session, address, options)| Request::Recover { session, address, options }),
        (".{0,60}", any_snapshot())
            .prop_map(|(path, options)| Request::StartSnapshot { path, options }),
        (".{0,60}", any_restore())
            .prop_map(|(path, options)| Request::StartRestore { path, options }),
        Just(Request::StartPostcopy),
        Just(Request::Cancel),
        Just(Request::QueryStatus),
        Just(Request::QueryAgent),
        (any::<Option<u64>>(), any::<bool>())
            .prop_map(|(target, ask_stats)| Request::Balloon { target, ask_stats }),
        any::<Option<u64>>().prop_map(|requested| Request::PluggedMemory { requested }),
        Just(Request::ConnectDevice { device: DeviceSpec::Balloon }),
        proptest::collection::vec(any::<u8>(), 0..200)
            .prop_map(|journal| Request::Continue { journal }),
        ".{0,60}".prop_map(|program| Request::Upgrade { program }),
        (".{1,60}", 12u32..64).prop_map(|(block, order)| Request::ConnectDevice {
            device: DeviceSpec::Mem { block, block_size: 1 << order }
        }),
        "/.{0,40}".prop_map(|path| Request::OpenBase { path }),
        Just(Request::StartIncoming {
            listen: "tcp:[::1]:0".into(),
            options: IncomingOptions::default()
        }),
    ]
}

proptest! {
    #[test]
    fn requests_survive_the_wire(request in any_request()) {
        let body = request.encode();
        prop_assert!(body.len() <= MAX_BODY);
        prop_assert_eq!(Request::decode(request.code(), &body), Some(Ok(request.clone())));
        let mut longer = body.clone();
        longer.push(0);
        prop_assert!(Request::decode(request.code(), &longer).unwrap().is_err(), "longer than its type");
        if let Some(shorter) = body.len().checked_sub(1) {
            prop_assert!(Request::decode(request.code(), &body[..shorter]).unwrap().is_err(), "shorter than its type");
        }
    }
}

#[test]
fn the_least_role_of_every_request_is_known() {
    let hello = |features| Request::Hello {
        version_min: 1,
        version_max: 1,
        features,
        agent: 1,
        name: String::new(),
    };
    let snapshot = |mode| Request::StartSnapshot {
        path: String::new(),
        options: SnapshotOptions { mode, ..SnapshotOptions::default() },
    };
    let geometry =
        BlockGeometry { id: 0, name: String::new(), gpa: 0, length: 4096, granularity: 4096 };
    // What only the VMM may send, and whether the first to send it becomes the VMM.
    let of_the_vmm = [
        (hello(FEATURE_FENCE), true),
        (Request::AddBlock { geometry, fd_offset: 0, vmm_address: 0, flags: 0 }, true),
        (Request::RemoveBlock { id: 0 }, true),
        (Request::Discard { flags: 0, ranges: vec![] }, true),
        (Request::Free { ranges: vec![] }, true),
        (Request::Populate { ranges: vec![] }, true),
        (Request::SetTrackers { sources: Trackers::HOOKS }, true),
        (Request::ConnectDevice { device: DeviceSpec::Balloon }, true),
        (Request::Continue { journal: vec![1] }, true),
        (Request::OpenBase { path: String::new() }, true),
        (snapshot(SnapshotMode::Stopped), false),
    ];
    let options = OutgoingOptions::default;
    let of_anybody = [
        hello(0),
        Request::StartOutgoing { target: String::new(), options: options() },
        Request::Cancel,
        Request::StartIncoming { listen: String::new(), options: IncomingOptions::default() },
        Request::SetParameters { parameters: Parameters::default() },
        Request::QueryStatus,
        Request::QueryAgent,
        Request::Balloon { target: None, ask_stats: true },
        Request::PluggedMemory { requested: None },
        Request::Upgrade { program: String::new() },
        Request::Grant,
        Request::Subscribe { interval: Duration::from_secs(1) },
        Request::Resume { force: true },
        Request::StartPostcopy,
        Request::Recover { session: [1; 16], address: String::new(), options: options() },
        snapshot(SnapshotMode::Background),
        snapshot(SnapshotMode::Paused),
        Request::StartRestore { path: String::new(), options: RestoreOptions::default() },
    ];
    for (request, claims) in &of_the_vmm {
        assert_eq!(request.required_role(), Role::Vmm, "{request:?}");
        assert_eq!(request.claims_memory(), *claims, "{request:?}");
    }
    for request in &of_anybody {
        assert_eq!(request.required_role(), Role::Operator, "{request:?}");
        assert!(!request.claims_memory(), "{request:?}");
    }
    let listed: Vec<u32> = of_the_vmm
        .iter()
        .map(|(request, _)| request)
        .chain(&of_anybody)
        .map(Request::code)
        .collect();
    for code in FIRST_NATIVE_REQUEST..code::EVENT {
        let known = Request::decode(code, &[]).is_some();
        assert_eq!(listed.contains(&code), known, "request {code:#x} is missing above");
    }
}

#[test]
fn a_compression_that_does_not_exist_is_refused_by_field() {
    let options = |which: u16, level: u16| {
        let mut body = OutgoingOptions::default().encode(Encoder::new()).finish();
        let at = body.len() - 2 - 8 - 8 - 4;
        body[at..at + 2].copy_from_slice(&which.to_le_bytes());
        body[at + 2..at + 4].copy_from_slice(&level.to_le_bytes());
        OutgoingOptions::decode(&mut Decoder::new(&body)).map(|options| options.compression)
    };
    assert_eq!(options(0, 0), Ok(Compression::None));
    assert_eq!(options(1, 0), Ok(Compression::Lz4));
    assert_eq!(options(2, 19), Ok(Compression::Zstd(19)));
    for (which, level) in [(0, 1), (1, 1), (2, 0), (2, 20), (2, 257)] {
        let error = options(which, level).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("compression_level is {level:#x}, allowed: ")),
            "{error}"
        );
    }
    let error = options(3, 1).unwrap_err().to_string();
    assert_eq!(error, "compression is 0x3, allowed: 0 none, 1 lz4, 2 zstd");
}

#[test]
fn parameters_that_are_not_allowed_are_refused_only_if_they_are_set() {
    let refused = |fields: u32, at: usize, value: u32| {
        let mut body = Parameters::default().encode(Encoder::new()).finish();
        body[..4].copy_from_slice(&fields.to_le_bytes());
        body[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Parameters::decode(&mut Decoder::new(&body)).err().map(|error| error.to_string())
    };
    for (bit, at, value, field) in [
        (0, 16, 1, "bandwidth is 0x1"),
        (3, 24, 5, "policy is 0x5"),
        (5, 32, 100, "throttle is 0x64"),
    ] {
        let error = refused(1 << bit, at, value).unwrap();
        assert!(error.starts_with(&format!("{field}, allowed: ")), "{error}");
        assert_eq!(refused(0, at, value), None);
    }
    assert!(refused(1 << 6, 0, 1 << 6).unwrap().starts_with("fields is 0x40, allowed: bits 0 to"));
}

#[test]
fn a_name_of_a_vm_fits_one_line() {
    let hello = |name: &str| {
        let request = Request::Hello {
            version_min: 1,
            version_max: 1,
            features: FEATURE_FENCE,
            agent: 1,
            name: name.into(),
        };
        Request::decode(code::HELLO, &request.encode()).unwrap()
    };
    assert!(hello(&"n".repeat(MAX_VM_NAME)).is_ok());
    let refused = |name: &str| hello(name).unwrap_err().to_string();
    assert_eq!(refused(&"n".repeat(129)), "name has 129 bytes, allowed are 128");
    assert_eq!(refused("vm\n1"), "name is \"vm\\n1\", allowed: a text without control characters");
}

#[test]
fn what_postcopy_needs_is_refused_by_field() {
    let refused = |options: OutgoingOptions| {
        let body = options.encode(Encoder::new()).finish();
        OutgoingOptions::decode(&mut Decoder::new(&body)).unwrap_err().to_string()
    };
    let hybrid = OutgoingOptions { mode: Mode::Hybrid, ..OutgoingOptions::default() };
    for (streams, urgent_streams) in [(1, 0), (63, 2), (64, u16::MAX)] {
        let error = refused(OutgoingOptions { streams, urgent_streams, ..hybrid.clone() });
        assert!(
            error.starts_with(&format!(
                "urgent_streams is {urgent_streams:#x}, allowed: at least 1"
            )),
            "{error}"
        );
    }
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let error =
            refused(OutgoingOptions { mode, policy: NonConvergence::Postcopy, ..hybrid.clone() });
        assert_eq!(error, "policy is 0x4, allowed: 4 postcopy only with mode 2 hybrid");
    }
}

/// The refusal of `request` after the bytes from `at` on, counted from those of its options, are
/// `bytes`.
fn refused_with(request: Request, at: usize, bytes: &[u8]) -> String {
    let mut body = request.encode();
    // After the path, which is empty.
    let at = 4 + at;
    body[at..at + bytes.len()].copy_from_slice(bytes);
    Request::decode(request.code(), &body).unwrap().unwrap_err().to_string()
}

#[test]
fn what_a_snapshot_cannot_be_started_with_is_refused_by_field() {
    let snapshot = |options| Request::StartSnapshot { path: String::new(), options };
    let refused = |at, bytes: &[u8]| refused_with(snapshot(SnapshotOptions::default()), at, bytes);
    assert_eq!(refused(0, &[3, 0]), "mode is 0x3, allowed: 0 background, 1 paused, 2 stopped");
    assert_eq!(refused(2, &[0, 0]), "workers is 0x0, allowed: 1 to 64");
    assert_eq!(refused(2, &[65, 0]), "workers is 0x41, allowed: 1 to 64");
    for (at, field) in [(4, "track"), (6, "replace"), (8, "cached")] {
        assert_eq!(refused(at, &[2, 0]), format!("{field} is 0x2, allowed: 0 or 1"));
        assert_eq!(refused(at, &[0, 1]), format!("{field} is 0x100, allowed: 0 or 1"));
    }
    for (value, named) in
        [(0, "0 s"), (25 * 3600 * 1_000_000, "90000 s"), (u64::MAX, "18446744073709551615 µs")]
    {
        let error = format!("hook_timeout is {named}, allowed: 1 microsecond to 24 hours");
        assert_eq!(refused(26, &value.to_le_bytes()), error);
    }
    for value in [0, MIN_CAPTURE_MEMORY - 1] {
        let error =
            format!("capture_memory is {value:#x}, allowed: at least 0x400000 (4 MiB) bytes");
        assert_eq!(refused(18, &value.to_le_bytes()), error);
    }
    let based = |length| {
        snapshot(SnapshotOptions { base: "b".repeat(length), ..SnapshotOptions::default() })
    };
    assert!(
        refused_with(based(MAX_ADDRESS + 1), 0, &[])
            .starts_with("base has 4097 bytes, allowed are 4096")
    );
    assert_eq!(refused_with(based(1), 38, &[0xff]), "base is not UTF-8");
}

#[test]
fn what_a_restore_cannot_be_started_with_is_refused_by_field() {
    let restore = |options| Request::StartRestore { path: String::new(), options };
    let refused = |at, bytes: &[u8]| refused_with(restore(RestoreOptions::default()), at, bytes);
    assert_eq!(
        refused(0, &[3, 0]),
        "mode is 0x3, allowed: 0 eager, 1 lazy, 2 lazy with a shared base"
    );
    assert_eq!(refused(2, &[0, 0]), "workers is 0x0, allowed: 1 to 64");
    assert_eq!(refused(2, &[65, 0]), "workers is 0x41, allowed: 1 to 64");
    for (value, named) in
        [(0, "0 s"), (25 * 3600 * 1_000_000, "90000 s"), (u64::MAX, "18446744073709551615 µs")]
    {
        let error = format!("hook_timeout is {named}, allowed: 1 microsecond to 24 hours");
        assert_eq!(refused(14, &value.to_le_bytes()), error);
    }
    let lazy = |length| {
        let working_set = "w".repeat(length);
        restore(RestoreOptions {
            mode: RestoreMode::Lazy,
            working_set,
            ..RestoreOptions::default()
        })
    };
    assert!(
        refused_with(lazy(MAX_ADDRESS + 1), 0, &[])
            .starts_with("working_set has 4097 bytes, allowed are 4096")
    );
    assert_eq!(refused(22, &[2, 0]), "huge_pages is 0x2, allowed: 0 auto, 1 never");
    assert_eq!(refused_with(lazy(1), 28, &[0xff]), "working_set is not UTF-8");
    assert_eq!(
        refused_with(lazy(1), 0, &[0, 0]),
        "mode is 0x0, allowed: 1 lazy with a working_set"
    );
}

#[test]
fn a_path_of_an_image_that_is_too_long_is_refused_by_field() {
    let path = "p".repeat(MAX_ADDRESS + 1);
    let (snapshot, restore) = (SnapshotOptions::default(), RestoreOptions::default());
    let requests = [
        Request::StartSnapshot { path: path.clone(), options: snapshot },
        Request::StartRestore { path, options: restore },
    ];
    for request in requests {
        let error =
            Request::decode(request.code(), &request.encode()).unwrap().unwrap_err().to_string();
        assert!(error.starts_with("path has 4097 bytes, allowed are 4096"), "{error}");
    }
}

#[test]
fn a_status_survives_the_wire() {
    let counters =
        Counters { passes: 3, throttle_percent: 99, wire_bytes: u64::MAX, ..Counters::default() };
    let trackers = Trackers::HOOKS | Trackers::WRITE_PROTECT;
    for guest in [None, Some(RunState::Running), Some(RunState::Paused)] {
        let (kind, phase, error) = (JobKind::Outgoing, Phase::Unconfirmed, Some("gone".into()));
        let status = JobStatus {
            job: 7,
            kind,
            phase,
            guest,
            arrived: guest.is_some(),
            trackers,
            counters,
            placing: Placing::Pages,
            placing_reason: guest.map(|_| "no memory".into()),
            error,
        };
        let body = status.encode(Encoder::new()).finish();
        let mut decoder = Decoder::new(&body);
        assert_eq!(JobStatus::decode(&mut decoder).unwrap(), status);
        decoder.finish().unwrap();
    }
    let unknown = Encoder::new().u64(7).u32(1).u32(4).u32(3).finish();
    let error = JobStatus::decode(&mut Decoder::new(&unknown)).unwrap_err().to_string();
    assert_eq!(error, "guest is 0x3, allowed: 0 not known, 1 running, 2 paused");
}

#[test]
fn an_error_that_says_nothing_is_the_empty_text_on_the_wire() {
    let without = JobStatus { job: 7, ..JobStatus::default() };
    let body = without.encode(Encoder::new()).finish();
    let empty = JobStatus { error: Some(String::new()), ..without.clone() };
    assert_eq!(empty.encode(Encoder::new()).finish(), body);
    assert_eq!(JobStatus::decode(&mut Decoder::new(&body)).unwrap(), without);
    assert_eq!(without.error_text(), "");
}

#[test]
fn unknown_codes_and_flags_are_told_apart_from_short_bodies() {
    assert!(Request::decode(0x1fff, &[]).is_none());
    let error = Request::decode(code::DISCARD, &Encoder::new().u32(2).u32(0).finish())
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, DecodeError::InvalidValue { field: "flags", value: 2, .. }));
    let error = Request::decode(code::DISCARD, &Encoder::new().u32(0).u32(u32::MAX).finish())
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, DecodeError::InvalidValue { field: "count", .. }));
}
