// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames in pieces, in a row and broken, and the requests of vhost-user.

use super::bodies::{self, PAGE};
use super::bytes::{Body, u32_at};
use super::frames::{ANSWER, ASK, header};
use super::hook_thread::hook_pair;
use super::refusals::error;
use super::vmm::{Host, ask, code, status};
use pageferry_tests::files::memfd;
use std::os::fd::{AsFd, BorrowedFd};

#[test]
fn frames_come_in_pieces_and_broken_ones_end_the_connection() {
    let host = Host::start();
    let operator = host.connect();
    let query = header(code::QUERY_STATUS, ASK, 0);
    let unknown = [&header(0x1fff, ASK, 3)[..], &[1, 2, 3]].concat();
    for byte in query {
        operator.send_bytes(&[byte], &[]);
    }
    // Two more before the first answer is read. An answer is ignored.
    operator.send(code::QUERY_STATUS, ANSWER, &[], &[]);
    operator.send_bytes(&[&unknown[..], &query].concat(), &[]);
    let answers: Vec<(u32, u32)> = (0..3)
        .map(|_| operator.receive().unwrap())
        .map(|frame| (frame.code, u32_at(&frame.body, 0)))
        .collect();
    assert_eq!(answers, [(0x1014, 0), (0x1fff, error::UNSUPPORTED), (0x1014, 0)]);
    for broken in [header(code::QUERY_STATUS, 2, 0), header(code::QUERY_STATUS, ASK, 0x10_0001)] {
        let stranger = host.connect();
        stranger.send_bytes(&broken, &[]);
        assert!(stranger.receive().is_none());
    }
    assert_eq!(status(&operator).phase, 0, "other connections live");
}

#[test]
fn vhost_user_requests_are_answered_as_the_document_says() {
    /// Bit 3 of the flags: an answer is wanted.
    const ASK_ANSWER: u32 = ASK | 8;
    let host = Host::start();
    let control = host.connect();
    let (ram, more) = (memfd(4 * PAGE).unwrap(), memfd(4 * PAGE).unwrap());
    let log = memfd(PAGE).unwrap();
    let (ours, agents) = hook_pair();
    let region = |gpa: u64| Body::new().u64(gpa).u64(4 * PAGE).u64(0).u64(0).0;
    let number = |value: u64| Body::new().u64(value);
    let table = Body::new().u32(1).u32(0).raw(&region(0));
    let one_region = |gpa: u64| Body::new().u64(0).raw(&region(gpa));
    let log_at = |size: u64| Body::new().u64(size).u64(0);
    let done = number(0);
    let ram_fds = [ram.as_fd()];
    type Case<'a> = (u32, Body, Vec<BorrowedFd<'a>>, Body);
    let cases: Vec<Case<'_>> = vec![
        (1, Body::new(), vec![], number(0x1_4400_0000)),
        (2, number(0x1_4400_0000), vec![], done.clone()),
        (2, number(1), vec![], number(1)),
        (3, Body::new(), vec![], done.clone()),
        (4, Body::new(), vec![], done.clone()),
        (5, table.clone(), ram_fds.to_vec(), done.clone()),
        (5, table.clone(), vec![], number(1)),
        (6, log_at(PAGE), vec![log.as_fd()], log_at(PAGE)),
        (6, log_at(2 * PAGE), vec![log.as_fd()], Body::new().u64(0).u64(1)),
        (7, Body::new(), vec![log.as_fd()], done.clone()),
        (15, Body::new(), vec![], number(0x802a)),
        (16, number(0x802a), vec![], done.clone()),
        (16, number(1 << 10), vec![], number(1)),
        (17, Body::new(), vec![], number(0)),
        (21, Body::new(), vec![agents.as_fd()], done.clone()),
        (21, Body::new(), vec![log.as_fd()], number(1)),
        (36, Body::new(), vec![], number(509)),
        (37, one_region(1 << 30), vec![more.as_fd()], done.clone()),
        (37, one_region(0), vec![more.as_fd()], number(1)),
        (38, one_region(1 << 30), vec![], done.clone()),
        (38, one_region(1 << 30), vec![], number(4)),
        (8, Body::new(), vec![], number(5)),
        (11, Body::new(), vec![], number(5)),
        (99, Body::new(), vec![], number(5)),
    ];
    for (code, body, fds, expected) in cases {
        control.send(code, ASK_ANSWER, &body.0, &fds);
        let answer = control.receive().unwrap();
        assert_eq!(
            (answer.code, answer.flags, &answer.body),
            (code, ANSWER, &expected.0),
            "{code}"
        );
    }
    // Without bit 3 the same is answered only where vhost-user has an answer.
    control.send(2, ASK, &number(1).0, &[]);
    control.send(5, ASK, &table.0, &ram_fds);
    control.send(1, ASK, &[], &[]);
    assert_eq!(control.receive().unwrap().code, 1);
    // An operator is refused.
    let operator = host.connect();
    operator.send(38, ASK_ANSWER, &one_region(0).0, &[]);
    assert_eq!(operator.receive().unwrap().body, number(7).0);
    // The region is block 0.
    let discard = bodies::range(0, 0, 1).with(8, &[0]);
    assert_eq!(ask(&control, code::DISCARD, &discard, &[]).unwrap(), Body::new().u64(1).0);
    drop(ours);
}
