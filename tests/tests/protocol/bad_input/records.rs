// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Wrong records after the hello: the job fails with the field in its error, and the next job
//! accepts a guest.

use super::scene::{FakeSource, PAGES, Scene, hello};
use pageferry_client::Phase;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_protocol::stream::payload::{Totals, encode_runs};
use pageferry_protocol::stream::record::{FLAG_LZ4, FLAG_STRAY, FLAG_ZSTD};
use pageferry_protocol::stream::{Kind, RECORD_SIZE, RecordHeader};
use pageferry_tests::scenario::lock;
use std::io::Write;

/// Checks that a source that does `what` after its hello makes the job fail with an error that has
/// `words`, and that the next job accepts a guest.
#[track_caller]
fn assert_fails(words: &[&str], what: impl FnOnce(&mut FakeSource)) {
    let scene = Scene::new();
    let job = scene.listen();
    let mut source = FakeSource::accepted(&scene);
    what(&mut source);
    // Read to the end. The source may have closed the connection itself.
    let _ = source.stream.shutdown(std::net::Shutdown::Write);
    let status = scene.destination.wait(job);
    assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
    for word in words {
        assert!(
            status.error_text().contains(word),
            "\"{word}\" is missing in: {}",
            status.error_text()
        );
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
    let zero = |first: u64, count: u64| {
        RecordHeader::new(Kind::Zero, 0, 3, PageRange::new(first, count), 0)
    };
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
        source.send(
            RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), u32::MAX as usize),
            &[],
        );
    });
    assert_fails(&["payload length 0x10", "1 pages"], |source| {
        source.send(RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), 16), &[0; 16]);
    });
    assert_fails(&["checksum"], |source| {
        let payload = vec![1; PAGE_SIZE as usize];
        let header = RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), payload.len())
            .with_checksum(&payload);
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
        let header = RecordHeader::new(Kind::Data, 0, 3, PageRange::new(0, 1), payload.len())
            .with_checksum(&payload);
        source.stream.write_all(&header.to_wire()).unwrap();
        source.stream.write_all(&payload[..96]).unwrap();
    });
    assert_fails(&["cut inside a record"], |source| {
        source.stream.write_all(&[1; RECORD_SIZE / 2]).unwrap()
    });
    assert_fails(&["closed the connection"], |_| {});
}

#[test]
fn bad_compressed_pages_fail_the_job() {
    let data = |flags: u16, count: u64, length: usize| {
        move |source: &mut FakeSource| {
            let header = RecordHeader::new(Kind::Data, flags, 3, PageRange::new(0, count), length);
            source.send(header, &vec![1; length]);
        }
    };
    // The hello of this source offers no features.
    assert_fails(&["block 3", "flag 0x2, lz4, was not negotiated"], data(FLAG_LZ4, 1, 100));
    assert_fails(
        &["block 3", "flag 0x4, zstd, was not negotiated"],
        data(FLAG_ZSTD | FLAG_STRAY, 1, 100),
    );
    assert_fails(&["flags 0x6", "exclude each other"], data(FLAG_LZ4 | FLAG_ZSTD, 1, 100));
    assert_fails(&["payload length 0x1000 for 1 compressed pages"], data(FLAG_ZSTD, 1, 4096));
    assert_fails(&["payload length 0x0 for 1 compressed pages"], data(FLAG_LZ4, 1, 0));
    assert_fails(&["payload length 0x64 for 0 compressed pages"], data(FLAG_LZ4, 0, 100));
    assert_fails(&["for 1025 compressed pages", "1 to 1024 pages"], data(FLAG_LZ4, 1025, 100));
    assert_fails(&["Zero", "flags 0x2"], |source| {
        source.send(RecordHeader::new(Kind::Zero, FLAG_LZ4, 3, PageRange::new(0, 1), 0), &[]);
    });
}

#[test]
fn a_wrong_count_fails_the_job() {
    let whole = Totals {
        data_pages: 2,
        zero_pages: 0,
        discarded_pages: 0,
        stray_pages: 0,
        passes: 1,
        remaining_pages: 0,
    };
    let sent = |source: &mut FakeSource| {
        source.data(3, 0, 2);
        source.end_pass(0);
    };
    let wrong = [
        (Totals { data_pages: 3, ..whole }, ["data_pages", "is 3", "2 here"]),
        (Totals { zero_pages: 5, ..whole }, ["zero_pages", "is 5", "0 here"]),
        (
            Totals { discarded_pages: u64::MAX, ..whole },
            ["discarded_pages", "18446744073709551615", "0 here"],
        ),
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
    assert!(status.error_text().contains("closed the connection"), "{}", status.error_text());
    assert_eq!(scene.destination.vmm.resumes(), 0);
    scene.assert_takes_a_guest(scene.listen());
}
