// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first record of a stream: strangers are dropped, and a source that does not match is
//! rejected with a reason.

use super::geometry;
use super::scene::{FakeSource, PAGES, Scene, hello};
use pageferry_client::{IncomingOptions, JobStatus, OutgoingOptions, Phase, Target};
use pageferry_protocol::memory::{BlockGeometry, BlockTable, PAGE_SIZE};
use pageferry_protocol::stream::answer::Accept;
use pageferry_protocol::stream::hello::{
    FEATURE_LZ4, FEATURE_POSTCOPY, FEATURE_ZSTD, FEATURES, HELLO_RECOVER,
};
use pageferry_protocol::stream::{Hello, Kind, RecordHeader};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{Ram, SOON, Side, passes};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

#[test]
fn other_protocols_are_dropped_and_the_source_is_served() {
    let scene = Scene::new();
    let job = scene.listen();
    for garbage in [vec![0xee; 500], b"GET / HTTP/1.1\r\nHost: localhost:7000\r\n\r\n".to_vec()] {
        let mut stranger = FakeSource::connect(&scene);
        stranger.stream.write_all(&garbage).unwrap();
        // With or without a reject, the connection ends.
        let mut rest = Vec::new();
        let _ = stranger.stream.shutdown(std::net::Shutdown::Write);
        stranger.stream.read_to_end(&mut rest).unwrap();
    }
    // A stranger that claims a large hello, one that begins with another record, and one that
    // disconnects at once.
    let mut stranger = FakeSource::connect(&scene);
    let header =
        RecordHeader::plain(Kind::Hello, 0, u32::MAX as usize).with_checksum(&[]).to_wire();
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
    let job = scene.listen_for(Duration::from_secs(5));
    let mut silent = FakeSource::connect(&scene);
    let mut slow = FakeSource::connect(&scene);
    let bytes = hello().encode();
    let header = RecordHeader::plain(Kind::Hello, 0, bytes.len()).with_checksum(&bytes).to_wire();
    slow.stream.write_all(&header[..20]).unwrap();
    // Both are rejected at their timeout.
    assert!(silent.sentence(Kind::Reject).contains("silent"));
    assert!(slow.sentence(Kind::Reject).contains("silent"));
    let _other = FakeSource::connect(&scene);
    scene.assert_takes_a_guest(job);
}

/// Each stranger stays to read its reject. If the destination waited for one after another, the
/// right source would give up long before its turn.
#[test]
fn many_wrong_sources_do_not_delay_the_right_one() {
    let scene = Scene::new();
    let job = scene.listen();
    let crowd: Vec<FakeSource> = (0..200)
        .map(|number: u8| {
            let mut source = FakeSource::connect(&scene);
            source.hello(&Hello { session: [number; 16], blocks: BlockTable::new(), ..hello() });
            source
        })
        .collect();
    let source = Side::new(Ram::odd(PAGES));
    let options = OutgoingOptions { peer_timeout: Duration::from_secs(5), ..passes(1) };
    let outgoing = source.send(&scene.path(), &options);
    let status = source.wait(outgoing);
    assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    assert_eq!(scene.destination.wait(job).phase, Phase::Completed);
    drop(crowd);
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
fn known_features_are_accepted_of_those_offered() {
    let scene = Scene::new();
    let newer = 1 << 63 | FEATURE_ZSTD;
    // A block that is not mapped cannot be filled while the guest runs.
    const KNOWN: u64 = FEATURES & !FEATURE_POSTCOPY;
    let all = !FEATURE_POSTCOPY;
    for (offered, known) in
        [(0, 0), (FEATURE_LZ4, FEATURE_LZ4), (newer, FEATURE_ZSTD), (all, KNOWN)]
    {
        let job = scene.listen();
        let mut source = FakeSource::connect(&scene);
        source.hello(&Hello { features: offered, ..hello() });
        let (kind, payload) = source.next();
        assert_eq!((kind, Accept::decode(&payload).unwrap().features), (Kind::Accept, known));
        drop(source);
        scene.destination.wait(job);
    }
    // Only features that all streams offer count.
    let job = scene.listen();
    let mut sources = [0u16, 1].map(|stream| {
        let mut source = FakeSource::connect(&scene);
        let features = if stream == 0 { KNOWN } else { FEATURE_LZ4 };
        let blocks = if stream == 0 { hello().blocks } else { BlockTable::new() };
        source.hello(&Hello { features, stream, streams: 2, blocks, ..hello() });
        source
    });
    let (_, payload) = sources[0].next();
    assert_eq!(Accept::decode(&payload).unwrap().features, FEATURE_LZ4);
    drop(sources);
    scene.destination.wait(job);
    scene.assert_takes_a_guest(scene.listen());
}

#[test]
fn a_source_with_other_blocks_is_rejected_by_field() {
    let right = || geometry(3, 0x7000, PAGES * PAGE_SIZE);
    let table = |blocks: Vec<BlockGeometry>| {
        let mut table = BlockTable::new();
        blocks.into_iter().for_each(|block| table.insert(block, 8).unwrap());
        table
    };
    // Words that both sides read, and words that only the operator of this side reads.
    let cases: [(BlockTable, &[&str], &str); 7] = [
        (
            table(vec![BlockGeometry { name: "other".into(), ..right() }]),
            &["block 3", "name", "other"],
            "block3",
        ),
        (
            table(vec![BlockGeometry { gpa: 0x9000, ..right() }]),
            &["block 3", "gpa", "0x9000"],
            "0x7000",
        ),
        (
            table(vec![BlockGeometry { length: 0x1000, ..right() }]),
            &["block 3", "length", "4 KiB"],
            "160 KiB",
        ),
        (
            table(vec![BlockGeometry { granularity: 0x2000, ..right() }]),
            &["block 3", "granularity", "8 KiB"],
            "4 KiB",
        ),
        (table(vec![BlockGeometry { id: 4, ..right() }]), &["block 4", "does not exist"], ""),
        (table(vec![]), &["0 blocks"], "this side 1"),
        (table(vec![right(), geometry(5, 0x100_0000, 0x1000)]), &["block 5", "does not exist"], ""),
    ];
    let scene = Scene::new();
    let job = scene.listen();
    for (blocks, words, own) in cases {
        let mut source = FakeSource::connect(&scene);
        source.hello(&Hello { blocks, ..hello() });
        let sentence = source.sentence(Kind::Reject);
        assert!(
            own.is_empty() || !sentence.contains(own),
            "a stranger reads the table: {sentence}"
        );
        // The job continues to wait, and its operator reads why the source was refused.
        let mut status = scene.destination.client.status().unwrap();
        let noted =
            |status: &JobStatus| words.iter().all(|word| status.error_text().contains(word));
        wait_until("the note", SOON, || {
            status = scene.destination.client.status().unwrap();
            noted(&status)
        })
        .unwrap_or_else(|_| panic!("{words:?} is missing in: {}", status.error_text()));
        assert_eq!((status.job, status.phase), (job, Phase::Connecting));
        assert!(
            status.error_text().contains(own),
            "\"{own}\" is missing in: {}",
            status.error_text()
        );
        for word in words {
            assert!(sentence.contains(word), "\"{word}\" is missing in: {sentence}");
        }
    }
    scene.assert_takes_a_guest(job);
    assert_eq!(
        scene.destination.client.status().unwrap().error,
        None,
        "what is over is not told any more"
    );
}

#[test]
fn a_wrong_source_costs_no_descriptor_and_blocks_no_other() {
    let mut scene = Scene::far();
    let job = scene.listen();
    let descriptors = format!("/proc/{}/fd", scene.agent.id());
    let open = || std::fs::read_dir(&descriptors).unwrap().count();
    // The primary of another source has connected, and its second stream has not.
    let mut half = FakeSource::connect(&scene);
    half.hello(&Hello { streams: 2, session: [9; 16], ..hello() });
    let before = open();
    for _ in 0..300 {
        let mut source = FakeSource::connect(&scene);
        source.hello(&Hello { blocks: BlockTable::new(), ..hello() });
        assert!(source.sentence(Kind::Reject).contains("0 blocks"));
    }
    // The agent may not have accepted the first connection when it counted them.
    wait_until("the connections closed", SOON, || open() < before + 10).unwrap();
    let mut second = FakeSource::connect(&scene);
    second.hello(&Hello {
        stream: 1,
        streams: 2,
        session: [9; 16],
        blocks: BlockTable::new(),
        ..hello()
    });
    assert_eq!(half.next().0, Kind::Accept);
    drop((half, second));
    assert_eq!(scene.destination.wait(job).phase, Phase::Failed);
    scene.assert_takes_a_guest(scene.listen());
}

#[test]
fn a_source_that_does_not_fit_ends_a_job_that_has_one_socket() {
    let scene = Scene::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let job = scene
        .destination
        .client
        .start_incoming(Target::Socket(theirs.into()), &IncomingOptions::default());
    let mut source = FakeSource { stream: ours };
    source.hello(&Hello { blocks: BlockTable::new(), ..hello() });
    let sentence = source.sentence(Kind::Reject);
    assert!(sentence.contains("0 blocks"), "{sentence}");
    let status = scene.destination.wait(job.unwrap().job);
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("this side 1"), "{}", status.error_text());
}

#[test]
fn postcopy_without_a_mapping_is_refused_by_name() {
    let scene = Scene::new();
    let job = scene.listen();
    let mut sources = [0u16, 1].map(|stream| {
        let mut source = FakeSource::connect(&scene);
        let blocks = if stream == 0 { hello().blocks } else { BlockTable::new() };
        source.hello(&Hello {
            features: FEATURE_POSTCOPY,
            stream,
            streams: 2,
            urgent: 1,
            blocks,
            ..hello()
        });
        source
    });
    let sentence = sources[0].sentence(Kind::Reject);
    assert!(sentence.contains("block 3 has no vmm_address"), "{sentence}");
    scene.assert_takes_a_guest(job);
}

#[test]
fn nobody_recovers_what_is_not_paused() {
    let scene = Scene::new();
    let job = scene.listen();
    let mut source = FakeSource::connect(&scene);
    source.hello(&Hello { flags: HELLO_RECOVER, ..hello() });
    let sentence = source.sentence(Kind::Reject);
    assert!(sentence.contains("no migration is paused here"), "{sentence}");
    scene.assert_takes_a_guest(job);
}
