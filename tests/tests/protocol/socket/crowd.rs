// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connections that are idle, that send requests all the time, and that do not read their replies.

use pageferry_client::Phase;
use pageferry_protocol::control::Frame;
use pageferry_protocol::control::frame::FrameHeader;
use pageferry_protocol::control::request::Request;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::on_drop::OnDrop;
use pageferry_tests::scenario::{Attached, Listening, Ram, SOON};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use zerocopy::IntoBytes;

/// Many requests for the status, one after the other.
fn requests() -> Vec<u8> {
    let Frame { request, flags, body, .. } =
        Frame::request(Request::QueryStatus.code(), Request::QueryStatus.encode());
    [FrameHeader::new(request, flags, body.len()).as_bytes(), &body].concat().repeat(1000)
}

#[test]
fn connections_that_never_read_delay_nobody() {
    let agent = Listening::start();
    let deaf: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = UnixStream::connect(&agent.path).unwrap();
            // The agent takes requests until its replies fill the socket, and then no more.
            stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
            while stream.write_all(&requests()).is_ok() {}
            stream
        })
        .collect();
    // Each request of the handshake has a deadline of 10 seconds. Before, the agent waited 5
    // seconds at each of these connections.
    let vmm = Attached::new(&agent.path, Ram::odd(16));
    for _ in 0..10 {
        vmm.client.status().unwrap();
        assert_eq!(agent.connect().status().phase, Phase::Idle);
    }
    drop(deaf);
}

#[test]
fn connections_that_never_stop_asking_delay_nobody() {
    let agent = Listening::start();
    let answered = AtomicU64::new(0);
    let flood: Vec<_> = (0..2).map(|_| UnixStream::connect(&agent.path).unwrap()).collect();
    std::thread::scope(|scope| {
        for stream in &flood {
            // Both threads end when the stream is shut down.
            scope.spawn(move || while (&mut &*stream).write_all(&requests()).is_ok() {});
            scope.spawn(|| {
                let mut bytes = vec![0; 1 << 16];
                while (&mut &*stream).read(&mut bytes).is_ok_and(|count| count > 0) {
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let vmm = Attached::new(&agent.path, Ram::odd(16));
        let before = answered.load(Ordering::Relaxed);
        for _ in 0..10 {
            vmm.client.status().unwrap();
            assert_eq!(agent.connect().status().phase, Phase::Idle);
        }
        let more = || answered.load(Ordering::Relaxed) > before;
        let outcome = wait_until("those that never stop asking to be answered, too", SOON, more);
        // Made before any check, so that the threads end also if one fails.
        flood.iter().for_each(|stream| stream.shutdown(std::net::Shutdown::Both).unwrap());
        outcome.unwrap();
    });
}

#[test]
fn idle_connections_keep_out_neither_a_vmm_nor_an_operator() {
    let agent = Listening::start();
    let mut idle: Vec<_> = (0..200).map(|_| agent.connect()).collect();
    let vmm = Attached::new(&agent.path, Ram::odd(16));
    let mut operator = agent.connect();
    assert_eq!(operator.status().phase, Phase::Idle);
    // Connections with requests stay, and so does the VMM, however many new ones come.
    for _ in 0..200 {
        idle.push(agent.connect());
        assert_eq!(operator.status().phase, Phase::Idle);
    }
    vmm.client.status().unwrap();
    assert!(idle[0].reply().is_err(), "the oldest silent connection made room");
}

#[test]
fn too_many_silent_connections_keep_out_no_vmm_or_operator() {
    let agent = Listening::start();
    let stop = AtomicBool::new(false);
    // Connections whose replies nobody reads, and those that made room for others.
    let crowd = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..160 {
            scope.spawn(|| {
                let requests = requests();
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut stream) = UnixStream::connect(&agent.path) else { continue };
                    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                    // Until the agent ends the connection: it takes no more requests, because its
                    // replies are not read.
                    while !stop.load(Ordering::Relaxed) {
                        if let Err(error) = stream.write_all(&requests) {
                            crowd.fetch_add(1, Ordering::Relaxed);
                            if error.kind() != std::io::ErrorKind::WouldBlock {
                                break;
                            }
                        }
                    }
                }
            });
        }
        let _stop = OnDrop(|| stop.store(true, Ordering::Relaxed));
        while crowd.load(Ordering::Relaxed) < 200 {
            std::thread::yield_now();
        }
        let vmm = Attached::new(&agent.path, Ram::odd(16));
        for _ in 0..20 {
            assert_eq!(agent.connect().status().phase, Phase::Idle);
            vmm.client.status().unwrap();
        }
    });
}
