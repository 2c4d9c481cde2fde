// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A peer that sends wrong records. The error names the field and the value, both sides pause, and
//! they continue when the right record arrives.
//!
//! The relay replaces a right record by a wrong one.

use super::scene::{
    DISCARDED, HOLES, PAGES, Scene, TIMEOUT, URGENT, WANTED, WANTED_TOO, postcopy, stamp_of,
};
use pageferry_client::{OutgoingOptions, Ownership, Parameters, Phase};
use pageferry_protocol::memory::{BlockTable, PAGE_SIZE, PageRange};
use pageferry_protocol::stream::answer::{Accept, decode_error};
use pageferry_protocol::stream::payload::{Totals, decode_bitmap, encode_bitmap, encode_runs};
use pageferry_protocol::stream::{Hello, Kind, RecordHeader};
use pageferry_tests::require;
use pageferry_tests::scenario::{Passing, Wire, read_record};
use std::io::Write;
use std::os::unix::net::UnixStream;

const BLOCK: u32 = 3;

/// A wrong record, which replaces a right one.
type Lie = (RecordHeader, Vec<u8>);

fn about(kind: Kind, block: u32, first: u64, count: u64, payload: Vec<u8>) -> Lie {
    (
        RecordHeader::new(kind, 0, block, PageRange::new(first, count), payload.len())
            .with_checksum(&payload),
        payload,
    )
}

fn plain(kind: Kind) -> Lie {
    about(kind, 0, 0, 0, Vec::new())
}

fn data(block: u32, first: u64) -> Lie {
    about(Kind::Data, block, first, 1, vec![9; PAGE_SIZE as usize])
}

fn tell(scene: &mut Scene, mut instead: Passing, (header, payload): Lie) {
    (instead.header, instead.payload) = (header, payload);
    scene.relay.pass(instead);
}

fn assert_says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "\"{word}\" is missing in: {error}");
    }
}

#[test]
fn what_a_destination_claims_to_have_is_checked() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::start(Wire::Unix, &OutgoingOptions { peer_timeout: TIMEOUT, ..postcopy() });
    let touch = scene.until_cut();
    let received = |first, count, words: &[u64]| {
        about(Kind::Received, BLOCK, first, count, encode_bitmap(words.iter().copied()))
    };
    let all = [u64::MAX, u64::MAX, u64::MAX, 0xff];
    type Case = (&'static [&'static str], Box<dyn Fn(Vec<u64>) -> Lie>);
    let lie = |words, tell: fn(Vec<u64>) -> Lie| -> Case { (words, Box::new(tell)) };
    let cases: Vec<Case> = vec![
        (
            &["payload length 0x18 for 200 pages", "0x20"],
            Box::new(move |_| received(0, PAGES, &all[..3])),
        ),
        (&["last word is 0x1ff", "no bit after the last page"], {
            Box::new(move |_| received(0, PAGES, &[all[0], all[1], all[2], 0x1ff]))
        }),
        (&["bitmap of block 4", "expected is block 3"], {
            Box::new(move |_| about(Kind::Received, 4, 0, PAGES, encode_bitmap(all)))
        }),
        (
            &["block 3 from page 0x40", "from page 0x0"],
            Box::new(move |_| received(64, 136, &all[1..])),
        ),
        (&["received record", "first page"], Box::new(move |_| received(0, 256, &[0; 4]))),
        (&["received record", "page count is 0x0"], Box::new(move |_| received(0, 0, &[]))),
        // The rest never arrives, and the first side whose timeout ends reports that.
        (&[], Box::new(move |_| received(0, 64, &all[..1]))),
        lie(&["lacks 0x1 pages from page 0xc4 of block 3", "never missing"], |mut true_words| {
            true_words[3] &= !(1 << (HOLES.start - 192));
            about(Kind::Received, BLOCK, 0, PAGES, encode_bitmap(true_words))
        }),
        lie(&["from page 0x3c of block 3", "never missing"], |mut true_words| {
            true_words[0] &= !(1 << DISCARDED);
            about(Kind::Received, BLOCK, 0, PAGES, encode_bitmap(true_words))
        }),
        lie(&["Complete record", "what the destination has"], |_| plain(Kind::Complete)),
        lie(&["PassDone record", "what the destination has"], |_| plain(Kind::PassDone)),
    ];
    for (words, lie) in cases {
        scene.recover();
        let record = scene.relay.until(|record| record.kind == Kind::Received);
        let truth = decode_bitmap(&record.payload, record.header.range(), PAGES)
            .unwrap()
            .map(|(_, word)| word);
        let lie = lie(truth.collect());
        tell(&mut scene, record, lie);
        let (source, _) = scene.assert_paused();
        assert_says(source.error_text(), words);
        assert!(touch.waits());
        // Drops the rest of this recovery.
        scene.relay.cut();
    }
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

/// Sends bytes on the test's own connection. Returns the answer.
fn answer_to(mut stream: UnixStream, bytes: &[u8]) -> Option<String> {
    stream.set_read_timeout(Some(pageferry_tests::scenario::SOON)).unwrap();
    stream.write_all(bytes).unwrap();
    let (kind, _, payload) = read_record(&stream)?;
    assert_eq!(kind, Kind::Reject);
    Some(decode_error(&payload).unwrap().sentence)
}

#[test]
fn a_stranger_is_not_taken_for_the_source_of_a_paused_postcopy() {
    if !require::uffd() {
        return;
    }
    let mut scene =
        Scene::start(Wire::Unix, &OutgoingOptions { peer_timeout: TIMEOUT, ..postcopy() });
    let touch = scene.until_cut();
    let place = scene.relay.place();
    let connect = || UnixStream::connect(place.strip_prefix("unix:").unwrap()).unwrap();
    let first = scene.relay.seen.iter().find(|record| record.kind == Kind::Hello).unwrap();
    let session = Hello::decode(&first.payload).unwrap();
    let record = |hello: &Hello| {
        let payload = hello.encode();
        let header = RecordHeader::plain(Kind::Hello, 0, payload.len()).with_checksum(&payload);
        [header.to_wire().as_slice(), &payload].concat()
    };
    let recover = pageferry_protocol::stream::hello::HELLO_RECOVER;
    let still_paused =
        |scene: &Scene| assert_eq!(scene.destination.seen().phase, Phase::PostcopyPaused);
    // Garbage, no bytes, the wrong session, and the right session without the flag.
    answer_to(connect(), &[0xee; 500]);
    drop(connect());
    let wrong = Hello { session: [7; 16], flags: recover, ..session.clone() };
    assert_says(
        &answer_to(connect(), &record(&wrong)).unwrap(),
        &["paused here", "not its source"],
    );
    let new = Hello { flags: 0, ..session.clone() };
    assert_says(&answer_to(connect(), &record(&new)).unwrap(), &["paused here", "not its source"]);
    still_paused(&scene);
    // The right session with other memory, or with too few streams.
    let other = Hello {
        flags: recover,
        streams: 2,
        urgent: 1,
        blocks: BlockTable::new(),
        ..session.clone()
    };
    let (mut primary, mut second) = (connect(), connect());
    primary.write_all(&record(&other)).unwrap();
    second.write_all(&record(&Hello { stream: 1, ..other })).unwrap();
    assert_says(&answer_to(primary, &[]).unwrap(), &["0 blocks"]);
    still_paused(&scene);
    let few = Hello { flags: recover, ..session };
    assert_says(&answer_to(connect(), &record(&few)).unwrap(), &["silent for "]);
    still_paused(&scene);
    // A connection that is still open does not keep the true source out.
    let mut waits = connect();
    waits.write_all(&record(&few)).unwrap();
    assert!(touch.waits());
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}

#[test]
fn false_pages_pause_the_destination_until_recovered() {
    if !require::uffd() {
        return;
    }
    let totals = Totals { data_pages: 77, ..Totals::default() }.encode();
    let mut broken = data(BLOCK, 5);
    broken.1[100] ^= 1;
    let cases: Vec<(&[&str], u16, Lie)> = vec![
        (&["block 99", "does not exist"], 0, data(99, 0)),
        (&["pages 0xc8 + 0x1 of block 3", "0xc8"], 0, data(BLOCK, PAGES)),
        (
            &["of block 3", "0xffffffffffffffff"],
            0,
            about(Kind::Zero, BLOCK, 1, u64::MAX, Vec::new()),
        ),
        (
            &["Request record", "pages, or the end"],
            0,
            about(Kind::Request, BLOCK, 0, 1, Vec::new()),
        ),
        (&["Commit record"], 0, plain(Kind::Commit)),
        (&["Complete record"], 0, plain(Kind::Complete)),
        (&["PassEnd record"], 0, plain(Kind::PassEnd)),
        (&["Remaining record"], 0, about(Kind::Remaining, BLOCK, 0, 64, encode_bitmap([1]))),
        (
            &["Discard record"],
            0,
            about(Kind::Discard, BLOCK, 0, 0, encode_runs(&[PageRange::new(0, 1)])),
        ),
        (&["totals differ", "data_pages is 77"], 0, about(Kind::End, 0, 0, 0, totals)),
        (&["end record"], 0, about(Kind::End, 0, 0, 0, vec![1; 3])),
        (&["checksum"], 0, broken),
        (&["block 99", "does not exist"], URGENT, data(99, 0)),
        (&["pages 0xc8 + 0x1 of block 3"], URGENT, data(BLOCK, PAGES)),
        (
            &["End record", "pages, or the end"],
            URGENT,
            about(Kind::End, 0, 0, 0, Totals::default().encode()),
        ),
        (&["Request record"], URGENT, about(Kind::Request, BLOCK, 0, 1, Vec::new())),
    ];
    for (words, stream, lie) in cases {
        eprintln!("{words:?} on stream {stream}");
        let mut scene = Scene::start(Wire::Unix, &OutgoingOptions { streams: 2, ..postcopy() });
        let (loaded, request, touch) = scene.until_asked();
        let is_there = |record: &Passing| {
            record.kind == Kind::Data && (record.stream == URGENT) == (stream == URGENT)
        };
        let answer = (stream == URGENT).then(|| {
            scene.relay.pass(request);
            scene.relay.until(is_there)
        });
        scene.relay.pass(loaded);
        let resumed = scene.relay.until(|record| record.kind == Kind::Resumed);
        scene.relay.pass(resumed);
        let record = answer.unwrap_or_else(|| scene.relay.until(is_there));
        tell(&mut scene, record, lie);
        let (_, destination) = scene.assert_paused();
        assert_says(destination.error_text(), words);
        scene.recover();
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    }
}

#[test]
fn a_false_request_pauses_the_source_until_recovered() {
    if !require::uffd() {
        return;
    }
    let request = |block, first, count| about(Kind::Request, block, first, count, Vec::new());
    let cases: Vec<(&[&str], Lie)> = vec![
        (&["block 99", "does not exist"], request(99, 0, 1)),
        (&["pages 0xc8 + 0x1 of block 3", "0xc8"], request(BLOCK, PAGES, 1)),
        (&["0xffffffffffffffff"], request(BLOCK, 1, u64::MAX)),
        (&["Data record where a request was expected"], data(BLOCK, WANTED)),
        (&["Complete record where a request"], plain(Kind::Complete)),
        (&["Loaded record where a request"], plain(Kind::Loaded)),
        (&["Placed record where a request"], {
            about(Kind::Placed, BLOCK, 0, 1, encode_runs(&[PageRange::new(0, 1)]))
        }),
    ];
    for (words, lie) in cases {
        eprintln!("{words:?}");
        let mut scene = Scene::start(Wire::Unix, &postcopy());
        let (request, touch) = scene.until_runs();
        // The job must not end before the wrong record arrives.
        let _end = scene.relay.until(|record| record.kind == Kind::End && record.stream == 0);
        tell(&mut scene, request, lie);
        let (source, _) = scene.assert_paused();
        assert_says(source.error_text(), words);
        scene.recover();
        scene.assert_completes();
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    }
}

#[test]
fn a_false_report_of_the_destination_releases_nothing() {
    if !require::uffd() {
        return;
    }
    let runs = |kind, runs: &[PageRange]| about(kind, BLOCK, 0, 1, encode_runs(runs));
    let last = PageRange::new(WANTED_TOO, 1);
    let cases: Vec<(&[&str], bool, Lie)> = vec![
        (
            &["says that it has page 0xb4 of block 3", "was not sent"],
            true,
            runs(Kind::Placed, &[last]),
        ),
        (&["placed record", "run is 0xc8"], true, runs(Kind::Placed, &[PageRange::new(PAGES, 1)])),
        (
            &["placed record", "payload length is 0x3"],
            true,
            about(Kind::Placed, BLOCK, 0, 1, vec![0; 3]),
        ),
        (&["Placed record where"], false, runs(Kind::Placed, &[last])),
        (&["discard record", "run is 0x5"], false, runs(Kind::Discard, &[PageRange::new(5, 0)])),
        (&["block 99"], false, about(Kind::Discard, 99, 0, 1, encode_runs(&[last]))),
        (
            &["Received record where"],
            false,
            about(Kind::Received, BLOCK, 0, 64, encode_bitmap([1])),
        ),
        (&["Resumed record where"], false, plain(Kind::Resumed)),
        (&["says that it has page", "of block 3", "was not sent"], false, plain(Kind::Complete)),
    ];
    pageferry_tests::scenario::at_once(&cases, |(words, release, lie)| {
        // So slow that the last pages are not sent for a long time.
        let slow =
            OutgoingOptions { bandwidth: 256 << 10, streams: 1, release: *release, ..postcopy() };
        let mut scene = Scene::start(Wire::Unix, &slow);
        let (_request, touch) = scene.until_runs();
        // This makes the destination send a record on the primary: discarded pages need not be
        // sent.
        scene
            .destination
            .client
            .discard(&[scene.destination.ram.range(1, 1)], pageferry_client::Punch::Yes)
            .unwrap();
        let said =
            scene.relay.until(|record| record.kind == Kind::Discard && !record.to_destination);
        tell(&mut scene, said, lie.clone());
        let (source, _) = scene.assert_paused();
        assert_says(source.error_text(), words);
        assert_eq!(source.counters.released_pages, 0);
        scene.source.client.set_parameters(&Parameters::bandwidth(0)).unwrap();
        scene.recover();
        scene.assert_completes_but(&[1]);
        assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
    });
}

#[test]
fn a_lie_before_the_commit_fails_both_and_the_guest_runs() {
    if !require::uffd() {
        return;
    }
    let remaining = |block, first, count, words: &[u64]| {
        about(Kind::Remaining, block, first, count, encode_bitmap(words.iter().copied()))
    };
    let end = |number: u64| {
        let payload = Totals::default().encode();
        (RecordHeader::plain(Kind::End, number, payload.len()).with_checksum(&payload), payload)
    };
    let to_destination: Vec<(Kind, &[&str], Lie)> = vec![
        (Kind::Remaining, &["block 99"], remaining(99, 0, 64, &[1])),
        (Kind::Remaining, &["block 3", "0xc8"], remaining(BLOCK, 192, 64, &[1])),
        (
            Kind::Remaining,
            &["remaining record", "first page is 0x1"],
            remaining(BLOCK, 1, 64, &[1]),
        ),
        (
            Kind::Remaining,
            &["remaining record", "last word is 0x100"],
            remaining(BLOCK, 192, 8, &[0x100]),
        ),
        (Kind::Remaining, &["remaining record", "page count is 0x0"], remaining(BLOCK, 0, 0, &[])),
        (Kind::Remaining, &["payload length 0x8 for 100 pages"], {
            about(Kind::Remaining, BLOCK, 0, 100, vec![0; 8])
        }),
        (Kind::Remaining, &["totals differ", "remaining_pages"], remaining(BLOCK, 0, 64, &[1])),
        (Kind::State, &["Complete record"], plain(Kind::Complete)),
        (Kind::State, &["Commit record"], plain(Kind::Commit)),
        (Kind::End, &["end with number 2"], end(2)),
        (Kind::End, &["one stream says that postcopy follows"], end(0)),
        (Kind::Commit, &["Complete record where the commit"], plain(Kind::Complete)),
        (Kind::Commit, &["Data record where the commit"], data(BLOCK, 0)),
    ];
    for (at, words, lie) in to_destination {
        eprintln!("{at:?}: {words:?}");
        let mut scene = Scene::start(Wire::Unix, &postcopy());
        // The end of the other stream, because the totals of the primary are compared when all
        // streams have ended.
        let record = scene
            .relay
            .until(|record| record.kind == at && (at != Kind::End || record.stream == 1));
        tell(&mut scene, record, lie);
        let (source, there) = (&scene.source, &scene.destination);
        let over = |phase: Phase| phase.is_final() || phase == Phase::PostcopyPaused;
        scene.relay.pump("the end", || over(source.seen().phase) && there.seen().phase.is_final());
        let status = there.seen();
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        assert_says(status.error_text(), words);
        assert_eq!(there.vmm.resumes(), 0);
        super::scene::assert_not_registered(there);
        if at == Kind::Commit {
            // The source has sent the commit.
            assert_eq!(source.seen().phase, Phase::PostcopyPaused);
            continue;
        }
        // The source has the reason, too.
        assert_eq!(source.seen().phase, Phase::Failed, "{}", source.seen().error_text());
        assert_says(source.seen().error_text(), words);
        assert!(!source.vmm.is_paused());
        assert_eq!(source.client.ownership(), Ownership::Ours);
    }
    let to_source: Vec<(Kind, &[&str], Lie)> = vec![
        (Kind::Loaded, &["Complete record", "loaded the state"], plain(Kind::Complete)),
        (Kind::Loaded, &["Resumed record", "loaded the state"], plain(Kind::Resumed)),
        (
            Kind::Loaded,
            &["Request record", "loaded the state"],
            about(Kind::Request, BLOCK, 0, 1, Vec::new()),
        ),
        (Kind::Accept, &["accept record"], about(Kind::Accept, 0, 0, 0, vec![1; 5])),
        (Kind::Accept, &["Loaded record", "an accept or reject"], plain(Kind::Loaded)),
    ];
    for (at, words, lie) in to_source {
        eprintln!("{at:?}: {words:?}");
        let mut scene = Scene::start(Wire::Unix, &postcopy());
        let record = scene.relay.until(|record| record.kind == at);
        tell(&mut scene, record, lie);
        let (source, there) = (&scene.source, &scene.destination);
        scene
            .relay
            .pump("the end", || source.seen().phase.is_final() && there.seen().phase.is_final());
        assert_eq!(source.seen().phase, Phase::Failed);
        assert_says(source.seen().error_text(), words);
        assert!(!source.vmm.is_paused());
        assert_eq!(there.vmm.resumes(), 0);
        super::scene::assert_not_registered(there);
    }
}

#[test]
fn a_destination_with_other_page_sizes_is_not_recovered() {
    if !require::uffd() {
        return;
    }
    let mut scene = Scene::start(Wire::Unix, &OutgoingOptions { release: true, ..postcopy() });
    let touch = scene.until_cut();
    scene.recover();
    let record = scene.relay.until(|record| record.kind == Kind::Accept);
    let accept = Accept::decode(&record.payload).unwrap();
    let lie = Accept { host_pages: vec![2 << 20], ..accept }.encode();
    tell(&mut scene, record, about(Kind::Accept, 0, 0, 0, lie));
    let (source, _) = scene.assert_paused();
    assert_says(source.error_text(), &["block 3", "0x200000 bytes", "0x1000 before"]);
    assert_eq!(source.counters.released_pages, 0);
    scene.recover();
    scene.assert_completes();
    assert_eq!(touch.found().unwrap(), stamp_of(WANTED));
}
