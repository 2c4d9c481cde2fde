// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compressed pages: they are smaller on the wire and the same at the destination. Malformed ones
//! are refused with an error that names the block.

use crate::scene::{PAGES, Scene, empty};
use pageferry_agent::outgoing::compress::Compressor;
use pageferry_client::{Compression, JobStatus, OutgoingOptions, Phase};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::answer::{Accept, decode_error};
use pageferry_protocol::stream::hello::{FEATURE_LZ4, FEATURE_WHOLE, FEATURE_ZSTD};
use pageferry_protocol::stream::record::{FLAG_LZ4, FLAG_ZSTD, FLAGS_COMPRESSED};
use pageferry_protocol::stream::{Hello, Kind, RECORD_SIZE, RecordHeader, STREAM_VERSION};
use pageferry_tests::random::{Random, page_content, page_text};
use pageferry_tests::scenario::{
    At, Passing, Ram, SOON, Side, Wire, lock, migrates_next_time, passes, read_record,
};
use rustix::io::{pread, pwrite};
use std::io::Write;
use std::os::unix::net::UnixListener;

const BYTES: usize = PAGE_SIZE as usize;
/// Both methods, and zstd with a level that is not the default.
const METHODS: [(Compression, u16); 3] = [
    (Compression::Lz4, FLAG_LZ4),
    (Compression::Zstd(1), FLAG_ZSTD),
    (Compression::Zstd(7), FLAG_ZSTD),
];

fn write(side: &Side, page: u64, content: &[u8; BYTES]) {
    let ram = &side.ram;
    assert_eq!(pwrite(&ram.fd, content, ram.fd_offset + page * PAGE_SIZE).unwrap(), BYTES);
}

fn read(side: &Side, page: u64) -> [u8; BYTES] {
    let mut content = [0; BYTES];
    let ram = &side.ram;
    assert_eq!(pread(&ram.fd, &mut content, ram.fd_offset + page * PAGE_SIZE).unwrap(), BYTES);
    content
}

/// A guest whose pages hold text.
fn text() -> Side {
    let source = Side::new(Ram::odd(PAGES));
    (0..PAGES).for_each(|page| write(&source, page, &page_text(page)));
    source
}

/// Starts the migration from `source` to an empty destination.
fn start(source: Side, options: &OutgoingOptions) -> Scene {
    Scene::started_between(Wire::Unix, source, empty(), options)
}

/// Checks that the migration succeeds, and that the pages are the same on both sides.
fn finish(scene: &mut Scene) -> JobStatus {
    let status = scene.finish();
    let there = scene.destination().client.status().unwrap();
    // The destination counts all bytes except the commit.
    assert_eq!(there.counters.wire_bytes + RECORD_SIZE as u64, status.counters.wire_bytes);
    for page in 0..PAGES {
        assert!(read(&scene.source, page) == read(scene.destination(), page), "page {page}");
    }
    status
}

fn flags(scene: &Scene) -> Vec<u16> {
    let seen = scene.relay.seen.iter().filter(|record| record.kind == Kind::Data);
    seen.map(|record| record.header.flags()).collect()
}

fn with(compression: Compression) -> OutgoingOptions {
    OutgoingOptions { compression, streams: 2, ..passes(2) }
}

#[test]
fn text_is_smaller_on_the_wire_and_arrives_the_same() {
    let plain = finish(&mut start(text(), &with(Compression::None))).counters;
    assert!(plain.wire_bytes > PAGES * PAGE_SIZE);
    for (compression, flag) in METHODS {
        let mut scene = start(text(), &with(compression));
        // A second pass, of single pages.
        let record = scene.relay.until(|record| record.is(Kind::PassDone, 0));
        for page in (0..PAGES).step_by(17) {
            write(&scene.source, page, &page_text(page + 5000));
            scene.source.ram.write_and_mark(&scene.source.client, page, page);
        }
        scene.relay.pass(record);
        let counters = finish(&mut scene).counters;
        assert_eq!(counters.pages_sent, PAGES + PAGES.div_ceil(17));
        assert!(
            counters.wire_bytes < plain.wire_bytes / 2,
            "{compression:?}: {} bytes",
            counters.wire_bytes
        );
        assert!(
            flags(&scene).iter().all(|flags| *flags == flag),
            "{compression:?}: {:?}",
            flags(&scene)
        );
    }
}

#[test]
fn pages_that_do_not_shrink_are_sent_raw_beside_others() {
    for (compression, flag) in METHODS {
        let source = text();
        // Some single pages, and all pages of one word of the bitmap.
        let noisy = |page: u64| page % 10 == 3 || (64..128).contains(&page);
        for page in (0..PAGES).filter(|page| noisy(*page)) {
            write(&source, page, &page_content(7, page));
        }
        (64..128).for_each(|page| write(&source, page, &page_content(7, page)));
        let mut scene = start(source, &with(compression));
        finish(&mut scene);
        let flags = flags(&scene);
        assert!(flags.contains(&0) && flags.contains(&flag), "{compression:?}: {flags:?}");
    }
}

#[test]
fn a_stray_page_is_compressed_too_and_stays_discarded() {
    let source = text();
    source.client.discard(&[source.ram.range(60, 10)], pageferry_client::Punch::Yes).unwrap();
    let mut scene = start(source, &with(Compression::Zstd(1)));
    let record = scene.relay.until(|record| record.is(Kind::PassDone, 0));
    scene.source.write(63, 5);
    scene.relay.pass(record);
    assert_eq!(finish(&mut scene).counters.stray_pages, 1);
    assert!(flags(&scene).contains(&(FLAG_ZSTD | pageferry_protocol::stream::record::FLAG_STRAY)));
    assert!(scene.destination().client.discarded(scene.destination().ram.id).unwrap().contains(63));
}

fn pack(compression: Compression, bytes: &[u8]) -> Vec<u8> {
    let mut compressor = Compressor::new(compression).unwrap().unwrap();
    compressor.begin(bytes.len());
    assert_ne!(compressor.add(bytes).1, 0, "it shrinks");
    compressor.output().to_vec()
}

/// Replaces the first compressed record by the result of `tamper`. Checks that both jobs fail with
/// all `words`, that the guest keeps running, and that the next attempt succeeds.
#[track_caller]
fn assert_refused(
    compression: Compression, words: &[&str], tamper: impl Fn(&Passing) -> (u16, Vec<u8>),
) {
    let mut scene = start(text(), &OutgoingOptions { compression, ..passes(1) });
    let mut record = scene.relay.until(|record| record.kind == Kind::Data);
    let (flags, payload) = tamper(&record);
    let block = record.header.block();
    record.header =
        RecordHeader::new(Kind::Data, flags, block, record.header.range(), payload.len())
            .with_checksum(&payload);
    record.payload = payload;
    scene.relay.pass(record);
    let status = scene.end();
    let there = scene.destination().wait(scene.incoming);
    for (side, status) in [("source", &status), ("destination", &there)] {
        assert_eq!(status.phase, Phase::Failed, "{side}");
        for word in words {
            assert!(
                status.error_text().contains(word),
                "\"{word}\" is missing at the {side}: {}",
                status.error_text()
            );
        }
    }
    assert!(!scene.source.vmm.is_paused(), "the guest keeps running");
    assert_eq!(scene.destination().vmm.resumes(), 0);
    migrates_next_time(&scene.source);
}

#[test]
fn a_payload_that_is_not_its_pages_fails_both_jobs_by_name() {
    for (compression, flag) in METHODS {
        let method = compression.name();
        let pages = |record: &Passing| record.header.range().count as usize;
        assert_refused(compression, &["block 3", method, "hold", "expected"], |record| {
            (flag, pack(compression, &vec![7; (pages(record) - 1) * BYTES]))
        });
        assert_refused(compression, &["block 3", method, "cannot be decompressed to"], |record| {
            (flag, pack(compression, &vec![7; pages(record) * BYTES + 1]))
        });
        // Decompresses to hundreds of times the size of the pages.
        assert_refused(compression, &["block 3", method, "cannot be decompressed to"], |_| {
            (flag, pack(compression, &vec![0; 16 << 20]))
        });
        assert_refused(compression, &["block 3", method], |_| (flag, vec![0xfe; 5000]));
        assert_refused(compression, &["block 3", method], |record| {
            (flag, record.payload[..record.payload.len() - 1].to_vec())
        });
        assert_refused(compression, &["flags 0x6", "exclude each other"], |record| {
            (FLAGS_COMPRESSED, record.payload.clone())
        });
    }
}

#[test]
fn a_flag_not_negotiated_fails_both_jobs_by_name() {
    let cases = [
        (Compression::None, Compression::Lz4, FLAG_LZ4, "flag 0x2, lz4, was not negotiated"),
        (Compression::None, Compression::Zstd(1), FLAG_ZSTD, "flag 0x4, zstd, was not negotiated"),
        (Compression::Lz4, Compression::Zstd(1), FLAG_ZSTD, "flag 0x4, zstd, was not negotiated"),
        (Compression::Zstd(1), Compression::Lz4, FLAG_LZ4, "flag 0x2, lz4, was not negotiated"),
    ];
    for (negotiated, used, flag, words) in cases {
        assert_refused(negotiated, &[words, "block 3"], |record| {
            (flag, pack(used, &vec![7; record.header.range().bytes() as usize]))
        });
    }
}

#[test]
fn refused_compression_ends_the_job_before_tracking() {
    for (compression, offered, others) in [
        (Compression::Lz4, FEATURE_LZ4, FEATURE_ZSTD),
        (Compression::Zstd(3), FEATURE_ZSTD, FEATURE_LZ4),
    ] {
        for accepted in [0, others] {
            let source = text();
            source.vmm.on(At::StartTracking, || panic!("tracking starts"));
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("older");
            let listener = UnixListener::bind(&path).unwrap();
            let job = source.send(&path, &OutgoingOptions { compression, ..passes(1) });
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            let (kind, _, payload) = read_record(&stream).unwrap();
            let hello = Hello::decode(&payload).unwrap();
            assert_eq!((kind, hello.features), (Kind::Hello, offered | FEATURE_WHOLE));
            let payload =
                Accept { version: STREAM_VERSION, features: accepted, host_pages: Vec::new() }
                    .encode();
            let header =
                RecordHeader::plain(Kind::Accept, 0, payload.len()).with_checksum(&payload);
            stream.write_all(&[header.to_wire().as_slice(), &payload].concat()).unwrap();
            let (kind, _, payload) = read_record(&stream).unwrap();
            assert_eq!(kind, Kind::Error);
            let status = source.wait(job);
            assert_eq!(status.phase, Phase::Failed);
            for sentence in [status.error_text(), &decode_error(&payload).unwrap().sentence] {
                assert!(
                    sentence.contains(&format!("compression is {}", compression.name())),
                    "{sentence}"
                );
            }
            assert!(!lock(&source.vmm.asked).tracking);
            source.vmm.off(At::StartTracking);
            migrates_next_time(&source);
        }
    }
}

#[test]
fn random_pages_arrive_whatever_the_compression() {
    let mut random = Random::new(9);
    for compression in
        [Compression::None, Compression::Lz4, Compression::Zstd(1), Compression::Zstd(19)]
    {
        let source = Side::new(Ram::odd(PAGES));
        for page in (0..PAGES).filter(|page| page % 3 != 1) {
            // Noise up to a random offset, and zeroes after it.
            let mut content = page_content(3, page);
            content[random.below(PAGE_SIZE) as usize..].fill(0);
            write(&source, page, &content);
        }
        start(source, &with(compression)).finish();
    }
}
