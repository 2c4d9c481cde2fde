// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every request wrong in each way: its size, its descriptors, its values.

use super::bodies::{self, PAGE, incoming, outgoing, outgoing_at, with_options};
use super::bytes::Body;
use super::frames::{ASK, Frames};
use super::vmm::{Host, PAGES, Vmm, ask, code, hello};
use pageferry_tests::files::memfd;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Codes of errors.
pub mod error {
    pub const INVALID: u32 = 1;
    pub const STATE: u32 = 2;
    pub const BUSY: u32 = 3;
    pub const NOT_FOUND: u32 = 4;
    pub const UNSUPPORTED: u32 = 5;
    pub const SYSTEM: u32 = 6;
    pub const DENIED: u32 = 7;
}

/// Checks that the request is refused with this error, and that the sentence has the word.
#[track_caller]
pub fn refused(
    control: &Frames, code: u32, body: &Body, fds: &[BorrowedFd<'_>], error: u32, word: &str,
) {
    match ask(control, code, body, fds) {
        Err((found, sentence)) if found == error && sentence.contains(word) => {}
        other => panic!("{code:#x}: expected error {error} with \"{word}\", not {other:?}"),
    }
}

/// A request with a proper body, and the number of its descriptors.
type Proper = (u32, Body, usize);

/// Every request with a body that has the right size.
pub fn proper() -> Vec<Proper> {
    vec![
        (code::HELLO, hello(2), 1),
        (code::HELLO, Body::new().u16(1).u16(1).u32(0).u64(0), 0),
        (code::ADD_BLOCK, bodies::block(2, PAGES * PAGE, 4, 0, "more"), 2),
        (code::REMOVE_BLOCK, Body::new().u32(1), 0),
        (code::DISCARD, bodies::range(0, 1, 1), 0),
        (code::POPULATE, bodies::range(0, 1, 1), 0),
        (code::FREE, bodies::range(0, 1, 1), 0),
        (code::SET_TRACKERS, Body::new().u32(2), 1),
        (code::SET_TRACKERS, Body::new().u32(4), 0),
        (code::START_OUTGOING, with_options("unix:/nowhere", &outgoing()), 0),
        (code::START_OUTGOING, with_options("fd", &outgoing()), 1),
        (code::START_INCOMING, with_options("unix:/nowhere/at/all", &incoming()), 0),
        (code::START_INCOMING, with_options("fd", &incoming()), 1),
        (code::CANCEL, Body::new(), 0),
        (code::SET_PARAMETERS, bodies::parameters(), 0),
        (code::QUERY_STATUS, Body::new(), 0),
        (code::QUERY_AGENT, Body::new(), 0),
        (code::BALLOON, Body::new().u32(1).u64(4096), 0),
        (code::PLUGGED_MEMORY, Body::new().u32(1).u64(4096), 0),
        (code::CONNECT_DEVICE, Body::new().u32(5).u32(0).u64(0).text(""), 1),
        (code::SUBSCRIBE, Body::new().u32(3_600_000), 0),
        (code::RESUME, Body::new().u32(1), 0),
        (code::START_POSTCOPY, Body::new(), 0),
        (code::RECOVER, with_session(&[0; 16], "unix:/nowhere", &outgoing()), 0),
        (code::CONTINUE, Body::new().text("a journal"), 1),
        (code::UPGRADE, Body::new().text("/nowhere/pageferry"), 0),
        (code::GRANT, Body::new(), 1),
        (code::OPEN_BASE, Body::new().text("/nowhere/image"), 0),
        (code::START_SNAPSHOT, with_options("/nowhere/image", &bodies::snapshot(1)), 0),
        (code::START_RESTORE, with_options("/nowhere/image", &bodies::restore(0)), 0),
    ]
}

fn with_session(session: &[u8; 16], address: &str, options: &Body) -> Body {
    Body::new().raw(session).text(address).raw(&options.0)
}

#[test]
fn wrong_sizes_and_numbers_of_descriptors_are_refused() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let files: Vec<OwnedFd> = (0..33).map(|_| memfd(PAGES * PAGE).unwrap()).collect();
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    for (code, body, count) in proper() {
        let longer = body.clone().raw(&[0]);
        refused(&vmm.control, code, &longer, &fds[..count], error::INVALID, "1 bytes longer");
        if let Some((_, rest)) = body.0.split_last() {
            let shorter = Body(body.0[..rest.len()].to_vec());
            refused(
                &vmm.control,
                code,
                &shorter,
                &fds[..count],
                error::INVALID,
                "body ends in field",
            );
            refused(
                &vmm.control,
                code,
                &Body::new(),
                &fds[..count],
                error::INVALID,
                "body ends in field",
            );
        }
        // It takes any number of them.
        if code == code::GRANT {
            continue;
        }
        // Each request names how many came and how many it takes.
        let words = format!("{} file descriptors", count + 1);
        refused(&vmm.control, code, &body, &fds[..count + 1], error::INVALID, &words);
        if count > 0 {
            let words = format!("{} file descriptors", count - 1);
            refused(&vmm.control, code, &body, &fds[..count - 1], error::INVALID, &words);
        }
    }
    // Nothing of this was done.
    assert_eq!(vmm.status().job, 0);
    assert_eq!(vmm.ask(code::DISCARD, &bodies::range(0, 1, 1), &[]).unwrap(), Body::new().u64(1).0);
    // More descriptors than a frame may have end the connection.
    let stranger = host.connect();
    stranger.send(code::QUERY_STATUS, ASK, &[], &fds);
    assert!(stranger.receive().is_none());
}

#[test]
fn values_that_are_not_allowed_are_refused_by_field() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let memory = memfd(PAGES * PAGE).unwrap();
    let bitmap = memfd(PAGES / 8).unwrap();
    let (two, one) = ([memory.as_fd(), bitmap.as_fd()], [memory.as_fd()]);
    let outgoing_with = |offset: usize, bytes: &[u8]| {
        with_options("unix:/nowhere", &outgoing().with(offset, bytes))
    };
    let long = format!("unix:{}", "x".repeat(4096));
    let cases: Vec<(u32, Body, &[BorrowedFd<'_>], u32, &str)> = vec![
        (
            code::HELLO,
            Body::new().u16(7).u16(9).u32(0).u64(0),
            &[],
            error::UNSUPPORTED,
            "version 7 to 9",
        ),
        (code::HELLO, hello(0), &one, error::INVALID, "agent is 0x0"),
        (code::HELLO, hello(2), &one, error::STATE, "fence"),
        (0x1006, Body::new(), &[], error::UNSUPPORTED, "0x1006"),
        (code::EVENT, Body::new(), &[], error::UNSUPPORTED, "0x1100"),
        (
            code::ADD_BLOCK,
            bodies::block(2, PAGES * PAGE, 4, 0, "more").with(4, &[4]),
            &two,
            error::INVALID,
            "flags is 0x4",
        ),
        (
            code::ADD_BLOCK,
            bodies::block(2, 0, 4, 0, "more"),
            &two,
            error::INVALID,
            "overlaps block 1",
        ),
        (
            code::ADD_BLOCK,
            bodies::block(1, 1 << 30, 4, 0, "x"),
            &two,
            error::INVALID,
            "id is taken",
        ),
        (
            code::ADD_BLOCK,
            bodies::block(2, 1 << 30, 4, 0, "ram"),
            &two,
            error::INVALID,
            "\"ram\" is taken",
        ),
        (
            code::ADD_BLOCK,
            bodies::block(2, 1 << 30, 4, 0, ""),
            &two,
            error::INVALID,
            "name of 0 bytes",
        ),
        (code::ADD_BLOCK, bodies::block(2, 1, 4, 0, "x"), &two, error::INVALID, "gpa 0x1"),
        (
            code::ADD_BLOCK,
            bodies::block(2, 1 << 30, 65, 0, "x"),
            &two,
            error::INVALID,
            "is shorter",
        ),
        (code::REMOVE_BLOCK, Body::new().u32(9), &[], error::NOT_FOUND, "block 9"),
        (code::DISCARD, bodies::range(2, 0, 1), &[], error::INVALID, "flags is 0x2"),
        (code::DISCARD, bodies::range(1, PAGES, 1), &[], error::INVALID, "range 0 of block 1"),
        (code::DISCARD, Body::new().u32(0).u32(43_691), &[], error::INVALID, "43690"),
        (code::POPULATE, bodies::range(1, 0, 1), &[], error::INVALID, "flags is 0x1"),
        (code::POPULATE, bodies::range(0, 0, 1).with(8, &[9]), &[], error::INVALID, "block 9"),
        (code::FREE, bodies::range(1, 0, 1), &[], error::INVALID, "flags is 0x1"),
        (code::FREE, bodies::range(0, 0, u64::MAX >> 12), &[], error::INVALID, "range 0"),
        (code::SET_TRACKERS, Body::new().u32(0), &[], error::INVALID, "sources is 0x0"),
        (code::SET_TRACKERS, Body::new().u32(8), &[], error::INVALID, "sources is 0x8"),
        // A file that is not /proc/self/pagemap.
        (code::SET_TRACKERS, Body::new().u32(2), &one, error::INVALID, "pagemap"),
        (code::START_OUTGOING, outgoing_with(0, &[0, 0]), &[], error::INVALID, "streams is 0x0"),
        (code::START_OUTGOING, outgoing_with(0, &[65, 0]), &[], error::INVALID, "streams is 0x41"),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::MODE, &[3]),
            &[],
            error::INVALID,
            "mode is 0x3",
        ),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::SWITCH_AFTER, &[1]),
            &[],
            error::INVALID,
            "switch_after is 0x1",
        ),
        (code::START_OUTGOING, outgoing_with(10, &[1]), &[], error::INVALID, "release is 0x1"),
        (code::START_OUTGOING, outgoing_with(10, &[2]), &[], error::INVALID, "release is 0x2"),
        (code::START_OUTGOING, outgoing_with(12, &[2]), &[], error::INVALID, "resume is 0x2"),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::BANDWIDTH, &[1]),
            &[],
            error::INVALID,
            "bandwidth is 0x1",
        ),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::POLICY, &[5]),
            &[],
            error::INVALID,
            "policy is 0x5",
        ),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::POLICY, &[4]),
            &[],
            error::INVALID,
            "policy is 0x4",
        ),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::COMPRESSION, &[3]),
            &[],
            error::INVALID,
            "compression is 0x3",
        ),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::COMPRESSION, &[2, 0, 20]),
            &[],
            error::INVALID,
            "compression_level is 0x14",
        ),
        (
            code::START_OUTGOING,
            outgoing_with(outgoing_at::HOOK_TIMEOUT, &[0; 8]),
            &[],
            error::INVALID,
            "hook_timeout is 0 s",
        ),
        (
            code::START_OUTGOING,
            with_options("ftp:x", &outgoing()),
            &[],
            error::INVALID,
            "tcp:HOST:PORT",
        ),
        (
            code::START_OUTGOING,
            with_options(&long, &outgoing()),
            &[],
            error::INVALID,
            "target has 4101",
        ),
        (
            code::START_OUTGOING,
            with_options("unix:/x", &outgoing()).with(4, &[0xff]),
            &[],
            error::INVALID,
            "target is not UTF-8",
        ),
        (
            code::START_OUTGOING,
            with_options("fd", &outgoing().with(outgoing_at::MODE, &[1])),
            &one,
            error::INVALID,
            "",
        ),
        (code::START_INCOMING, with_options("tcp:x", &incoming()), &[], error::INVALID, "no port"),
        (
            code::START_INCOMING,
            with_options("fd", &incoming()),
            &one,
            error::INVALID,
            "not a socket",
        ),
        (
            code::START_INCOMING,
            with_options("unix:/x", &incoming().with(0, &[0; 8])),
            &[],
            error::INVALID,
            "peer_timeout is 0 s",
        ),
        (
            code::START_INCOMING,
            with_options("unix:/x", &incoming().with(16, &[2])),
            &[],
            error::INVALID,
            "resume is 0x2",
        ),
        (
            code::START_INCOMING,
            with_options("unix:/nowhere/at/all", &incoming()),
            &[],
            error::SYSTEM,
            "/nowhere/at/all",
        ),
        (code::CANCEL, Body::new(), &[], error::NOT_FOUND, "no job"),
        (code::SET_PARAMETERS, bodies::parameters(), &[], error::NOT_FOUND, "no job"),
        (
            code::SET_PARAMETERS,
            bodies::parameters().with(0, &[1 << 6]),
            &[],
            error::INVALID,
            "fields is 0x40",
        ),
        (
            code::SET_PARAMETERS,
            bodies::parameters().with(0, &[1 << 5]).with(32, &[100]),
            &[],
            error::INVALID,
            "throttle is 0x64",
        ),
        (code::SUBSCRIBE, Body::new().u32(9), &[], error::INVALID, "interval is 0x9"),
        (code::SUBSCRIBE, Body::new().u32(3_600_001), &[], error::INVALID, "interval"),
        (code::RESUME, Body::new().u32(2), &[], error::INVALID, "force is 0x2"),
        (code::RESUME, Body::new().u32(1), &[], error::STATE, "not handed over"),
        (code::START_POSTCOPY, Body::new(), &[], error::NOT_FOUND, "no outgoing migration"),
        (
            code::RECOVER,
            with_session(&[0; 16], "", &outgoing()),
            &[],
            error::NOT_FOUND,
            "no job is paused",
        ),
        (
            code::RECOVER,
            with_session(&[7; 16], "", &outgoing()),
            &[],
            error::INVALID,
            "address is empty",
        ),
        (
            code::RECOVER,
            with_session(&[7; 16], "ftp:x", &outgoing()),
            &[],
            error::INVALID,
            "tcp:HOST",
        ),
        (
            code::START_SNAPSHOT,
            with_options("/x", &bodies::snapshot(3)),
            &[],
            error::INVALID,
            "mode is 0x3",
        ),
        (
            code::START_SNAPSHOT,
            with_options("/x", &bodies::snapshot(1).with(2, &[65])),
            &[],
            error::INVALID,
            "workers is 0x41",
        ),
        (
            code::START_SNAPSHOT,
            with_options("x", &bodies::snapshot(1)),
            &[],
            error::INVALID,
            "path is",
        ),
        (
            code::START_RESTORE,
            with_options("/x", &bodies::restore(3)),
            &[],
            error::INVALID,
            "mode is 0x3",
        ),
        (
            code::START_RESTORE,
            with_options("/nowhere/image", &bodies::restore(0)),
            &[],
            error::INVALID,
            "cannot open /nowhere/image",
        ),
        (
            code::START_RESTORE,
            with_options("x", &bodies::restore(0)),
            &[],
            error::INVALID,
            "path is",
        ),
        (
            code::START_RESTORE,
            Body::new().text("/x").raw(&bodies::restore(0).0[..24]).text("/set"),
            &[],
            error::INVALID,
            "mode is 0x0",
        ),
    ];
    for (code, body, fds, error, word) in cases {
        refused(&vmm.control, code, &body, fds, error, word);
    }
    assert_eq!(vmm.status().job, 0, "no job was started");
}
