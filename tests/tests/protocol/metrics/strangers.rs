// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clients of the metrics that are slow, silent, many or wrong. Meanwhile a guest moves, and a
//! scraper gets its answers.

use super::Side;
use pageferry_client::{IncomingOptions, OutgoingOptions, Phase};
use pageferry_tests::random::Random;
use pageferry_tests::scenario::Scrape;
use pageferry_tests::scenario::scrape::exchange;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const PAGES: u64 = 1024;
/// Longest head of a request that the agent reads, in bytes.
const MAX_HEAD: usize = 4096;
/// Longest exchange, and some time for a busy machine.
const EXCHANGE: Duration = Duration::from_secs(15);

/// Moves a guest while `bother` has the metrics of its agent. Then checks that the agent has no
/// more descriptors than before, and still answers.
fn while_a_guest_moves(bother: impl FnOnce(&Path) + Send) {
    let folder = tempfile::tempdir().unwrap();
    let mut source = Side::new(folder.path(), "source", PAGES);
    let destination = Side::new(folder.path(), "destination", PAGES);
    (0..PAGES).for_each(|page| source.vmm.ram.write(page, page + 1));
    source.scrape();
    let memory = source.agent.process().resident_bytes().unwrap();
    let path = folder.path().join("stream");
    let incoming = destination.vmm.listen(&path, &IncomingOptions::default());
    let slow = OutgoingOptions { bandwidth: 16 << 20, ..OutgoingOptions::default() };
    let metrics = source.metrics.clone();
    std::thread::scope(|scope| {
        let bothers = scope.spawn(move || bother(&metrics));
        let outgoing = source.vmm.send(&path, &slow);
        let status = source.vmm.wait(outgoing);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        assert_eq!(destination.vmm.wait(incoming).phase, Phase::Completed);
        bothers.join().unwrap();
    });
    assert_eq!(source.scrape().phase(), "completed");
    let grown = source.agent.process().resident_bytes().unwrap().saturating_sub(memory);
    // A job alone takes some megabytes, for its buffers and the stacks of its threads.
    assert!(grown < 64 << 20, "the agent took {grown} bytes more");
}

fn connect(metrics: &Path) -> UnixStream {
    let stream = UnixStream::connect(metrics).unwrap();
    stream.set_read_timeout(Some(EXCHANGE)).unwrap();
    stream
}

#[test]
fn a_request_that_comes_byte_by_byte_is_cut_off() {
    while_a_guest_moves(|metrics| {
        let mut slow = connect(metrics);
        // The time between two bytes, in which the server may end the connection.
        slow.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let bytes = b"GET /metrics HTTP/1.1\r\nX: ".iter().chain(std::iter::repeat(&b'x'));
        let mut written = 0;
        for byte in bytes.take(MAX_HEAD) {
            if slow.write_all(&[*byte]).is_err() {
                break;
            }
            written += 1;
            match slow.read(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => break,
            }
        }
        assert!(written < MAX_HEAD, "it was cut off for its size, and not for its time");
    });
}

#[test]
fn a_thousand_silent_connections_keep_no_scraper_out() {
    while_a_guest_moves(|metrics| {
        let mut silent = Vec::new();
        for count in 0..1000 {
            silent.push(connect(metrics));
            if count % 100 == 0 {
                Scrape::of(metrics);
            }
        }
        Scrape::of(metrics);
        // The oldest made room for the others.
        let mut oldest = &silent[0];
        assert_eq!(oldest.read(&mut [0]).unwrap_or(0), 0);
    });
}

#[test]
fn connections_that_never_read_keep_no_scraper_out() {
    while_a_guest_moves(|metrics| {
        let deaf: Vec<_> = (0..50)
            .map(|_| {
                let mut stream = connect(metrics);
                let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
                stream
            })
            .collect();
        Scrape::of(metrics);
        drop(deaf);
    });
}

#[test]
fn garbage_and_heads_without_end_are_refused() {
    while_a_guest_moves(|metrics| {
        let mut random = Random::new(7);
        for length in [1, 100, 5_000, 100_000] {
            let mut bytes = vec![0; length];
            random.fill(&mut bytes);
            // Otherwise it could be the start of a method.
            bytes[0] = 0;
            let answer = exchange(metrics, &bytes);
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{answer}");
        }
        for head in [
            format!("GET /{}", "x".repeat(4096)),
            format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(60_000)),
            format!("GET /metrics HTTP/1.1\r\n{}", "X: y\r\n".repeat(1000)),
        ] {
            let answer = exchange(metrics, head.as_bytes());
            assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        }
    });
}

#[test]
fn a_client_that_has_shut_down_its_side_is_answered_or_dropped() {
    while_a_guest_moves(|metrics| {
        for (request, answered) in
            [("GET /metrics HTTP/1.1\r\n\r\n", true), ("GET /metr", false), ("", false)]
        {
            let mut stream = connect(metrics);
            stream.write_all(request.as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            // Within the time limit of the socket.
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer.ends_with("# EOF\n"), answered, "{request}");
        }
    });
}
