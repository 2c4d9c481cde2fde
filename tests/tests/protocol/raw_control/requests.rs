// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests that are carried out, and those that this sender may not send, or not now.

use super::bodies::{self, PAGE, Status, incoming, outgoing, outgoing_at, phase, with_options};
use super::bytes::{Body, u16_at, u32_at, u64_at};
use super::frames::ASK;
use super::refusals::{error, proper, refused};
use super::vmm::{Fence, Host, PAGES, Ram, Vmm, ask, ask_frame, code, hello, status};
use pageferry_tests::files::memfd;
use pageferry_tests::require;
use std::os::fd::{AsFd, BorrowedFd};

#[test]
fn memory_is_added_discarded_freed_populated_and_removed() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let pages = |count: u64| Body::new().u64(count).0;
    assert_eq!(vmm.ask(code::DISCARD, &bodies::range(1, 1, 2), &[]).unwrap(), pages(2));
    assert_eq!(vmm.ask(code::DISCARD, &bodies::range(1, 2, 2), &[]).unwrap(), pages(1));
    assert_eq!(vmm.ram.pages()[..6], [0, 0, 0, 0, 4, 0], "1 to 3 are punched");
    assert!((0..PAGES).all(|page| vmm.ram.is_discarded(page) == (1..4).contains(&page)));
    let two = Body::new().u32(0).u32(2);
    let two = two.u32(1).u32(0).u64(PAGE).u64(PAGE).u32(1).u32(0).u64(9 * PAGE).u64(PAGE);
    assert_eq!(vmm.ask(code::POPULATE, &two, &[]).unwrap(), pages(1), "9 was populated");
    assert!(!vmm.ram.is_discarded(1) && vmm.ram.is_marked(1));
    assert!(!vmm.ram.is_marked(20));
    assert_eq!(vmm.ask(code::FREE, &bodies::range(0, 3, 18), &[]).unwrap(), pages(17));
    assert!(vmm.ram.is_marked(20), "a free is a write of zeroes");
    assert_eq!(vmm.ram.pages()[4], 0);
    // A discarded block, for which the VMM has no mapping.
    let (memory, bitmap) = (memfd(2 * PAGE).unwrap(), memfd(8).unwrap());
    let block = bodies::block(7, PAGES * PAGE, 2, 0, "unplugged").with(4, &[1]);
    let answer = vmm.ask(code::ADD_BLOCK, &block, &[memory.as_fd(), bitmap.as_fd()]).unwrap();
    assert_eq!(answer, Body::new().u64(PAGE).u32(1).0);
    let mut bits = [0; 8];
    rustix::io::pread(&bitmap, &mut bits, 0).unwrap();
    assert_eq!(bits, 3u64.to_le_bytes());
    vmm.does(code::REMOVE_BLOCK, &Body::new().u32(7));
    refused(
        &vmm.control,
        code::REMOVE_BLOCK,
        &Body::new().u32(7),
        &[],
        error::NOT_FOUND,
        "block 7",
    );
    // Write-protect scanning, if this machine has it.
    if require::uffd() {
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        vmm.ask(code::SET_TRACKERS, &Body::new().u32(2), &[pagemap.as_fd()]).unwrap();
        assert_eq!(vmm.status().trackers, 2);
    }
}

#[test]
fn an_operator_may_send_what_the_document_says() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let operator = host.connect();
    let hello = Body::new().u16(1).u16(3).u32(0).u64(!1);
    let answer = ask(&operator, code::HELLO, &hello, &[]).unwrap();
    assert_eq!(answer.len(), 22);
    assert_eq!((u16_at(&answer, 0), u64_at(&answer, 2)), (1, 8), "version and features");
    assert_eq!((u32_at(&answer, 10), u32_at(&answer, 14)), (0x10_0000, 43_690));
    let files = [memfd(PAGES * PAGE).unwrap(), memfd(PAGE).unwrap()];
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let only_the_vmm = [
        code::ADD_BLOCK,
        code::REMOVE_BLOCK,
        code::DISCARD,
        code::POPULATE,
        code::FREE,
        code::SET_TRACKERS,
        code::OPEN_BASE,
    ];
    for (code, body, count) in proper() {
        if only_the_vmm.contains(&code) || (code == code::HELLO && count == 1) {
            refused(&operator, code, &body, &fds[..count], error::DENIED, "start another agent");
        }
    }
    let stopped = with_options("/nowhere/image", &bodies::snapshot(2));
    refused(&operator, code::START_SNAPSHOT, &stopped, &[], error::DENIED, "only the VMM");
    refused(&operator, code::CANCEL, &Body::new(), &[], error::NOT_FOUND, "no job");
    assert_eq!(status(&operator).trackers, 4);
    // It may start jobs: this one fails, because there is no such folder.
    let image = with_options("/nowhere/image", &bodies::snapshot(1));
    ask(&operator, code::START_SNAPSHOT, &image, &[]).unwrap();
    assert_eq!(vmm.end().phase, phase::FAILED);
    drop(vmm);
    // The next connection that hands over memory is the VMM.
    let next = Vmm::attach(&host);
    assert_eq!(next.status().trackers, 0);
}

#[test]
fn a_job_is_watched_limited_and_cancelled() {
    let host = Host::start();
    let vmm = Vmm::with_guest(&host);
    let watcher = host.connect();
    ask(&watcher, code::SUBSCRIBE, &Body::new().u32(3_600_000), &[]).unwrap();
    let event = || {
        let frame = watcher.receive().unwrap();
        assert_eq!((frame.code, frame.flags), (code::EVENT, ASK));
        Status::read(&frame.body)
    };
    assert_eq!((event().job, vmm.status().phase), (0, 0));
    // A source that connects and is never greeted: its job stays in this phase.
    let path = host.path("peer");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let target = format!("unix:{}", path.display());
    let hybrid = outgoing().with(outgoing_at::MODE, &[2]);
    let (job, address) = vmm.start(code::START_OUTGOING, &with_options(&target, &hybrid), &[]);
    assert_eq!((job, address), (1, target.clone()));
    let _peer = listener.accept().unwrap();
    let busy = with_options(&target, &outgoing());
    refused(&vmm.control, code::START_OUTGOING, &busy, &[], error::BUSY, "job 1");
    refused(&vmm.control, code::REMOVE_BLOCK, &Body::new().u32(1), &[], error::BUSY, "job 1");
    refused(&vmm.control, code::SET_TRACKERS, &Body::new().u32(4), &[], error::BUSY, "job 1");
    // Only the bandwidth, which is the field at 16.
    let limits = bodies::parameters().with(16, &[0, 0, 1]);
    vmm.does(code::SET_PARAMETERS, &limits);
    vmm.does(code::START_POSTCOPY, &Body::new());
    vmm.does(code::CANCEL, &Body::new());
    let ended = vmm.end();
    assert_eq!((ended.job, ended.kind, ended.phase), (1, 1, phase::CANCELLED), "{}", ended.error);
    assert!(!ended.error.is_empty());
    // The watcher was told, and so was the VMM on its hook socket.
    while event().phase != phase::CANCELLED {}
    vmm.wait_for_event(phase::CANCELLED);
    // Precopy cannot switch, and its policy cannot be postcopy.
    let path = host.path("second");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let target = format!("unix:{}", path.display());
    vmm.start(code::START_OUTGOING, &with_options(&target, &outgoing()), &[]);
    let _peer = listener.accept().unwrap();
    refused(&vmm.control, code::START_POSTCOPY, &Body::new(), &[], error::STATE, "precopy");
    let postcopy = bodies::parameters().with(0, &[8]).with(24, &[4]);
    refused(
        &vmm.control,
        code::SET_PARAMETERS,
        &postcopy,
        &[],
        error::INVALID,
        "policy is postcopy",
    );
    vmm.ask(code::CANCEL, &Body::new(), &[]).unwrap();
    assert_eq!(vmm.end().job, 2);
    // A guest that is on its way here must find the memory as it is.
    let listen = with_options(&format!("unix:{}", host.path("here").display()), &incoming());
    vmm.start(code::START_INCOMING, &listen, &[]);
    refused(&vmm.control, code::POPULATE, &bodies::range(0, 1, 1), &[], error::BUSY, "job 3");
    vmm.wait_for_phase(phase::CONNECTING);
    vmm.ask(code::CANCEL, &Body::new(), &[]).unwrap();
    assert_eq!((vmm.end().kind, vmm.end().phase), (2, phase::CANCELLED));
}

#[test]
fn jobs_need_memory_hooks_and_trackers() {
    let host = Host::start();
    let control = host.connect();
    let start = with_options("unix:/nowhere", &outgoing());
    refused(&control, code::START_OUTGOING, &start, &[], error::STATE, "there is no memory");
    let ram = Ram::new();
    let fds = [ram.file.as_fd(), ram.discards.as_fd()];
    ask(&control, code::ADD_BLOCK, &bodies::block(1, 0, PAGES, 0, "ram"), &fds).unwrap();
    refused(&control, code::START_OUTGOING, &start, &[], error::STATE, "SET_BACKEND_REQ_FD");
    refused(
        &control,
        code::SET_TRACKERS,
        &Body::new().u32(1),
        &[],
        error::STATE,
        "SET_BACKEND_REQ_FD",
    );
    drop(control);
    let vmm = Vmm::attach(&host);
    refused(&vmm.control, code::START_OUTGOING, &start, &[], error::STATE, "no tracker");
    let track = with_options("/nowhere/image", &bodies::snapshot(1).with(4, &[1]));
    refused(&vmm.control, code::START_SNAPSHOT, &track, &[], error::STATE, "no tracker");
}

#[test]
fn a_request_that_is_refused_makes_nobody_the_vmm() {
    let host = Host::start();
    let strangers: Vec<_> = (0..4).map(|_| host.connect()).collect();
    let (memory, bitmap) = (memfd(PAGE).unwrap(), memfd(PAGE).unwrap());
    let fds = [memory.as_fd(), bitmap.as_fd()];
    // A block that is larger than its file, a range of no block, no such block, no fence word.
    let block = bodies::block(1, 0, PAGES, 0, "ram");
    refused(&strangers[0], code::ADD_BLOCK, &block, &fds, error::INVALID, "is shorter");
    let range = bodies::range(0, 1, 1);
    refused(&strangers[1], code::DISCARD, &range, &[], error::INVALID, "block 1");
    let id = Body::new().u32(1);
    refused(&strangers[2], code::REMOVE_BLOCK, &id, &[], error::NOT_FOUND, "block 1");
    let pipe = rustix::pipe::pipe().unwrap();
    refused(&strangers[3], code::HELLO, &hello(1), &[pipe.0.as_fd()], error::INVALID, "fence");
    // The strangers are still connected.
    assert_eq!(Vmm::with_guest(&host).status().trackers, 4);
}

#[test]
fn an_agent_that_was_given_up_does_nothing_more() {
    let host = Host::start();
    let control = host.connect();
    let (ram, fence) = (Ram::new(), Fence::new());
    let (body, fds) = ask_frame(&control, code::HELLO, &hello(3), &[fence.file.as_fd()]).unwrap();
    assert_eq!((body.len(), u64_at(&body, 2), fds.len()), (22, 1, 1));
    let block = bodies::block(1, 0, PAGES, 0, "ram");
    let fds = [ram.file.as_fd(), ram.discards.as_fd()];
    refused(&control, code::ADD_BLOCK, &block, &fds, error::STATE, "has given it up");
    fence.admit(3);
    ask(&control, code::ADD_BLOCK, &block, &fds).unwrap();
    fence.admit(4);
    refused(&control, code::DISCARD, &bodies::range(1, 0, 1), &[], error::STATE, "number 4");
    assert!(!ram.is_discarded(0));
}
