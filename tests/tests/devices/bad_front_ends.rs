// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Front-ends that break the protocol: the agent lives, and the next front-end is served.

use pageferry_protocol::control::Frame;
use pageferry_protocol::control::vhost_user::FrontendReq;
use pageferry_protocol::memory::{PAGE_SIZE, PageRange};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::files::{memfd, unsealed_memfd};
use pageferry_tests::front_end::balloon::pages;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{BalloonDriver, DeviceHost, FrontEnd, PATIENCE, Piece};
use pageferry_tests::memory::{Backing, BlockLayout, TestMemory};
use pageferry_tests::random::Random;
use rustix::fs::{MemfdFlags, ftruncate};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

const FIRST: u64 = FIRST_FREE_PAGE;
const PAGES: u64 = 1024;

/// The next front-end is served, and what it frees is freed.
#[track_caller]
fn next_one_is_served(host: &mut DeviceHost) {
    host.assert_alive();
    host.block(0).fill(PageRange::new(FIRST, 2), 5).unwrap();
    let mut balloon = host.balloon();
    balloon.inflate(&pages(FIRST, 1));
    assert!(host.block(0).is_hole(PageRange::new(FIRST, 1)).unwrap());
    assert!(!host.block(0).is_hole(PageRange::new(FIRST + 1, 1)).unwrap());
    assert!(host.balloon_now().driver);
}

#[test]
fn operators_see_when_the_front_end_is_gone() {
    let mut host = DeviceHost::ram(PAGES);
    assert_eq!(host.balloon_status(&[])["driver"], false);
    next_one_is_served(&mut host);
    wait_until("no driver", PATIENCE, || !host.balloon_now().driver).unwrap();
    assert_eq!(host.balloon_status(&[])["driver"], false);
}

#[test]
fn noise_does_no_harm() {
    let mut host = DeviceHost::ram(PAGES);
    let mut random = Random::new(7);
    for round in 0..100 {
        let mut stream = UnixStream::connect(host.balloon_socket()).unwrap();
        let mut bytes = vec![0; random.below(200) as usize];
        random.fill(&mut bytes);
        if round % 2 == 0 && bytes.len() >= 12 {
            // A header that is right, of a request that exists.
            let body = bytes.len() as u32 - 12;
            let request = random.below(50) as u32;
            let flags = if round % 4 == 0 { 1 } else { 1 | 8 };
            for (at, number) in [request, flags, body].into_iter().enumerate() {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&number.to_le_bytes());
            }
        }
        // The agent may have closed it.
        let _ = stream.write_all(&bytes);
    }
    next_one_is_served(&mut host);
}

#[test]
fn requests_with_the_wrong_descriptors_do_no_harm() {
    let mut host = DeviceHost::ram(PAGES);
    let table: Vec<u8> = [1u64, 0, PAGE_SIZE, 1 << 40, 0].iter().flat_map(number).collect();
    let requests = [
        (FrontendReq::SET_MEM_TABLE, table),
        (
            FrontendReq::ADD_MEM_REG,
            [0u64, 0, PAGE_SIZE, 1 << 40, 0].iter().flat_map(number).collect(),
        ),
        (FrontendReq::SET_VRING_KICK, number(&0).into()),
        (FrontendReq::SET_VRING_CALL, number(&0).into()),
        (FrontendReq::SET_VRING_ERR, number(&0).into()),
        (FrontendReq::SET_LOG_BASE, [PAGE_SIZE, 0].iter().flat_map(number).collect()),
        (FrontendReq::SET_BACKEND_REQ_FD, Vec::new()),
        (FrontendReq::SET_DEVICE_STATE_FD, number(&0).into()),
        (FrontendReq::GET_FEATURES, Vec::new()),
    ];
    for (request, body) in requests {
        for count in 0..4 {
            let front_end = FrontEnd::connect(&host.balloon_socket(), host.memory());
            let fds = (0..count).map(|_| memfd(PAGE_SIZE).unwrap()).collect();
            let frame = Frame { request: request.into(), flags: 0, body: body.clone(), fds };
            // It may be accepted, refused, or end the connection.
            let _ = front_end.send(&frame);
        }
        host.assert_alive();
    }
    next_one_is_served(&mut host);
}

fn number(number: &u64) -> [u8; 8] {
    number.to_le_bytes()
}

#[test]
fn half_a_message_holds_up_nobody_but_its_device() {
    let mut host = DeviceHost::ram(PAGES);
    for half in [1, 11, 12, 13, 50] {
        let mut stream = UnixStream::connect(host.balloon_socket()).unwrap();
        let mut message = [0; 100];
        message[0] = FrontendReq::SET_MEM_TABLE as u8;
        message[4] = 1;
        message[8] = 88;
        stream.write_all(&message[..half]).unwrap();
        host.assert_alive();
        drop(stream);
        next_one_is_served(&mut host);
    }
}

#[test]
fn kick_that_blocks_two_queues_holds_up_nobody_else() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    balloon.driver.stop();
    // Not EFD_NONBLOCK: a read waits when the other queue has taken the kick.
    let shared = EventFd::new(EFD_CLOEXEC).unwrap();
    for index in [0, 1] {
        balloon.driver.queues.get_mut(&index).unwrap().kick = shared.try_clone().unwrap();
        let queue = &balloon.driver.queues[&index];
        // It may be refused.
        let _ = balloon.driver.front_end.start_queue(index, queue, 0);
    }
    for index in [0, 1] {
        balloon.driver.queue(index).put(&[Piece::readable(FIRST * PAGE_SIZE, 4)]);
        balloon.driver.queue(index).kick();
    }
    host.assert_alive();
    drop(balloon);
    next_one_is_served(&mut host);
}

#[test]
fn call_that_is_full_and_blocks_holds_up_nobody_else() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    balloon.driver.stop();
    let full = EventFd::new(EFD_CLOEXEC).unwrap();
    full.write(u64::MAX - 1).unwrap();
    balloon.driver.queues.get_mut(&0).unwrap().call = full;
    let queue = &balloon.driver.queues[&0];
    let _ = balloon.driver.front_end.start_queue(0, queue, 0);
    let queue = balloon.driver.queue(0);
    queue.put(&[Piece::readable(FIRST * PAGE_SIZE, 4)]);
    queue.kick();
    host.assert_alive();
    drop(balloon);
    next_one_is_served(&mut host);
}

/// Memory on a file that can shrink.
fn shrinkable(pages: u64) -> (Arc<TestMemory>, Arc<File>) {
    let file = unsealed_memfd("shrinks", pages * PAGE_SIZE, MemfdFlags::empty()).unwrap();
    let file = Arc::new(File::from(file));
    let backing = Backing::File(file.clone());
    let layout = BlockLayout { backing, ..BlockLayout::ram(pages * PAGE_SIZE) };
    (Arc::new(TestMemory::new(vec![layout]).unwrap()), file)
}

/// The device looks at queues in memory that is not there any more.
fn survives_a_file_that_shrinks(host: &mut DeviceHost, mut balloon: BalloonDriver, file: &File) {
    for index in 0..5 {
        balloon.driver.queue(index).put(&[Piece::readable(FIRST * PAGE_SIZE, 64)]);
    }
    ftruncate(file, 0).unwrap();
    for queue in balloon.driver.queues.values() {
        queue.kick();
    }
    host.assert_alive();
    // Addresses are looked at, too.
    let queue = &balloon.driver.queues[&0];
    let _ = balloon.driver.front_end.start_queue(0, queue, 0);
    host.assert_alive();
}

#[test]
fn memory_of_the_front_end_may_shrink() {
    let mut host = DeviceHost::ram(PAGES);
    let (memory, file) = shrinkable(PAGES);
    let balloon = BalloonDriver::of(&host.balloon_socket(), &memory);
    survives_a_file_that_shrinks(&mut host, balloon, &file);
    next_one_is_served(&mut host);
}

#[test]
fn memory_of_the_guest_may_shrink() {
    let (memory, file) = shrinkable(PAGES);
    let mut host = DeviceHost::over(memory);
    let balloon = host.balloon();
    survives_a_file_that_shrinks(&mut host, balloon, &file);
}

#[test]
fn dirty_log_that_shrinks_does_no_harm() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    let size = PAGES / 8;
    let log = unsealed_memfd("log", size, MemfdFlags::empty()).unwrap();
    if balloon.driver.front_end.set_log(&log, size).is_ok() {
        ftruncate(&log, 0).unwrap();
        balloon.driver.queue(0).put(&[Piece::readable(FIRST * PAGE_SIZE, 64)]);
        balloon.driver.queue(0).kick();
        host.assert_alive();
    }
    drop(balloon);
    next_one_is_served(&mut host);
}

#[test]
fn dirty_log_that_is_too_small_does_no_harm() {
    let mut host = DeviceHost::ram(PAGES);
    for (size, said) in [(0, 4096), (1, 1), (4096, 1 << 40)] {
        let balloon = host.balloon();
        let log = memfd(size).unwrap();
        let _ = balloon.driver.front_end.set_log(&log, said);
        balloon.driver.queues[&0].kick();
        drop(balloon);
        next_one_is_served(&mut host);
    }
}

#[test]
fn table_may_be_replaced_while_buffers_are_handled() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    let driver = &mut balloon.driver;
    let (front_end, queue) = (&driver.front_end, driver.queues.get_mut(&1).unwrap());
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                front_end.set_memory();
            }
            ends.store(true, Ordering::Relaxed);
        });
        let mut buffers = 0;
        while !ends.load(Ordering::Relaxed) {
            queue.round_trip(&[Piece::readable(FIRST * PAGE_SIZE, 4096)]);
            buffers += 1;
        }
        assert!(buffers > 0);
    });
    drop(balloon);
    next_one_is_served(&mut host);
}

#[test]
fn front_end_may_vanish_in_the_middle_of_a_buffer() {
    let mut host = DeviceHost::ram(PAGES);
    for _ in 0..30 {
        let mut balloon = host.balloon();
        for index in 0..5 {
            let queue = balloon.driver.queue(index);
            queue.put(&[Piece::readable(FIRST * PAGE_SIZE, 1 << 20), Piece::writable(0, 0)]);
            queue.kick();
        }
    }
    next_one_is_served(&mut host);
}

#[test]
fn two_hundred_front_ends_leave_nothing_behind() {
    let mut host = DeviceHost::ram(PAGES);
    let id = host.agent.process().id();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{id}/{what}")).unwrap().count();
    next_one_is_served(&mut host);
    let (fds, tasks) = (count("fd"), count("task"));
    for _ in 0..200 {
        let mut balloon = host.balloon();
        balloon.inflate(&pages(FIRST, 2));
        balloon.send_stats(&[(4, 1)]);
    }
    wait_until("all threads' ends", PATIENCE, || count("task") <= tasks)
        .unwrap_or_else(|error| panic!("{error}: {tasks} before, {} after", count("task")));
    wait_until("all descriptors' ends", PATIENCE, || count("fd") <= fds)
        .unwrap_or_else(|error| panic!("{error}: {fds} before, {} after", count("fd")));
}

#[test]
fn state_that_never_ends_is_an_error_in_bounded_time() {
    use vhost::vhost_user::message::VhostTransferStateDirection::LOAD;
    let mut host = DeviceHost::ram(PAGES);
    let balloon = host.balloon();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut writer = File::from(writer);
    assert!(balloon.driver.front_end.move_state(LOAD, reader).unwrap().is_none());
    writer.write_all(&[1; 3]).unwrap();
    let check = Frame::request(FrontendReq::CHECK_DEVICE_STATE.into(), Vec::new());
    balloon.driver.front_end.send(&check).unwrap();
    // It is silent, and the agent must not wait for it for ever.
    let mut answer = [0; 20];
    let mut raw: &UnixStream = &balloon.driver.front_end.raw;
    raw.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    raw.read_exact(&mut answer).unwrap();
    assert_ne!(answer[12..], [0; 8], "an error");
    drop((balloon, writer));
    next_one_is_served(&mut host);
}

#[test]
fn state_of_any_content_is_refused_or_loaded() {
    use vhost::vhost_user::message::VhostTransferStateDirection::{LOAD, SAVE};
    let mut host = DeviceHost::ram(PAGES);
    let balloon = host.balloon();
    balloon
        .driver
        .front_end
        .frontend
        .set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::empty());
    let front_end = &balloon.driver.front_end;
    let save = || {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        front_end.move_state(SAVE, writer).unwrap();
        let mut state = Vec::new();
        File::from(reader).read_to_end(&mut state).unwrap();
        check(front_end).unwrap();
        state
    };
    let load = |state: &[u8]| {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        front_end.move_state(LOAD, reader).unwrap();
        // The agent may have had enough before all is read.
        let _ = File::from(writer).write_all(state);
        check(front_end)
    };
    let state = save();
    load(&state).unwrap();
    assert_eq!(save(), state);
    for wrong in [&state[1..], &[][..], &vec![7; 100_000]] {
        load(wrong).unwrap_err();
    }
    assert_eq!(save(), state, "a state that is refused changes nothing");
    check(front_end).unwrap_err();
    drop(balloon);
    next_one_is_served(&mut host);
}

/// CHECK_DEVICE_STATE.
fn check(front_end: &FrontEnd) -> Result<(), vhost::Error> {
    use vhost::vhost_user::VhostUserFrontend;
    front_end.frontend.check_device_state()
}

/// A front-end that holds on to the agent in its own way. What it returns lives until the end.
type Holds = fn(&DeviceHost) -> Box<dyn std::any::Any>;

#[test]
fn agent_ends_when_it_is_asked_whatever_a_front_end_does() {
    let holds: [Holds; 4] = [
        |host| Box::new(host.balloon()),
        |host| {
            let mut stream = UnixStream::connect(host.balloon_socket()).unwrap();
            stream.write_all(&[1; 7]).unwrap();
            Box::new(stream)
        },
        |host| {
            let mut balloon = host.balloon();
            // Nobody reads its calls, and it keeps all queues full.
            for queue in balloon.driver.queues.values_mut() {
                queue.call.write(u64::MAX - 1).unwrap();
                while queue.free_descriptors() > 0 {
                    queue.put(&[Piece::readable(FIRST * PAGE_SIZE, 1 << 20)]);
                }
                queue.kick();
            }
            Box::new(balloon)
        },
        |host| {
            use vhost::vhost_user::message::VhostTransferStateDirection::LOAD;
            let balloon = host.balloon();
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            balloon.driver.front_end.move_state(LOAD, reader).unwrap();
            let check = Frame::request(FrontendReq::CHECK_DEVICE_STATE.into(), Vec::new());
            balloon.driver.front_end.send(&check).unwrap();
            Box::new((balloon, writer))
        },
    ];
    for (at, holds) in holds.iter().enumerate() {
        let mut host = DeviceHost::ram(PAGES);
        let held = holds(&host);
        host.agent.process().terminate().unwrap();
        let ended = host.agent.process().wait(PATIENCE);
        assert!(ended.is_ok(), "front-end {at}: {ended:?}");
        drop(held);
    }
}
