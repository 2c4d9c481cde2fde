// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The page stream over the VMMs' own transport: each VMM reads its agent's bytes and carries them
//! to the other VMM, in both directions. Also an agent that gets a connected socket.

use pageferry_client::{
    BlockRange, IncomingOptions, JobStatus, OutgoingOptions, PageStream, Phase, Punch, Record,
    Target,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_tests::scenario::{Ram, Side, assert_same};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

const PAGES: u64 = 300;

fn sides() -> (Side, Side) {
    let source = Side::new(Ram::odd(PAGES));
    for page in (0..PAGES).step_by(3) {
        source.ram.write(page, 5000 + page);
    }
    let discard =
        BlockRange { block: source.ram.id, offset: 30 * PAGE_SIZE, length: 60 * PAGE_SIZE };
    source.client.discard(&[discard], Punch::Yes).unwrap();
    (source, Side::new(Ram::odd(PAGES)))
}

/// The part of one VMM: copies from its agent to the wire, and from the wire to its agent. Returns
/// the kinds of records that its agent sent.
fn carry(stream: PageStream, wire: UnixStream) -> [JoinHandle<Vec<Kind>>; 2] {
    let (mut from_agent, mut to_agent) = stream.split();
    let (mut wire_out, mut wire_in) = (wire.try_clone().unwrap(), wire);
    let out = std::thread::spawn(move || {
        let mut kinds = Vec::new();
        // An agent closes its end when the job is done.
        while let Ok(Some(record)) = from_agent.recv() {
            kinds.push(record.kind());
            wire_out.write_all(record.as_bytes()).unwrap();
        }
        let _ = wire_out.shutdown(std::net::Shutdown::Write);
        kinds
    });
    let back = std::thread::spawn(move || {
        while let Ok(Some(record)) = Record::read_from(&mut wire_in) {
            if to_agent.send(&record).is_err() {
                break;
            }
        }
        Vec::new()
    });
    [out, back]
}

/// Migrates the guest between two agents that get these sockets. Returns the final status of the
/// source's job.
fn migrates(source: &Side, from: OwnedFd, destination: &Side, to: OwnedFd) -> JobStatus {
    let (incoming, outgoing) = (IncomingOptions::default(), OutgoingOptions::default());
    let incoming = destination.client.start_incoming(Target::Socket(to), &incoming).unwrap().job;
    let outgoing = source.client.start_outgoing(Target::Socket(from), &outgoing).unwrap().job;
    let (sent, received) = (source.wait(outgoing), destination.wait(incoming));
    assert_eq!(
        (sent.phase, received.phase),
        (Phase::Completed, Phase::Completed),
        "{} {}",
        sent.error_text(),
        received.error_text()
    );
    assert_same(&source.ram, &destination.ram);
    sent
}

#[test]
fn records_carried_by_the_vmms_migrate_the_guest() {
    let (source, destination) = sides();
    let (source_stream, source_socket) = PageStream::pair().unwrap();
    let (destination_stream, destination_socket) = PageStream::pair().unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    let carriers = [carry(source_stream, one), carry(destination_stream, other)];

    let sent = migrates(&source, source_socket, &destination, destination_socket);
    assert_eq!(sent.counters.discarded_pages, 60);

    let [[from_source, _], [from_destination, _]] = carriers;
    let from_source = from_source.join().unwrap();
    assert_eq!(from_source.first(), Some(&Kind::Hello));
    assert_eq!(from_source.last(), Some(&Kind::Commit));
    let from_destination = from_destination.join().unwrap();
    assert_eq!(from_destination.first(), Some(&Kind::Accept));
    assert_eq!(from_destination.last(), Some(&Kind::Resumed));
}

#[test]
fn two_agents_that_share_a_socket_pair_migrate_the_guest() {
    let (source, destination) = sides();
    let (one, other) = UnixStream::pair().unwrap();
    migrates(&source, one.into(), &destination, other.into());
}

#[test]
fn a_socket_takes_one_stream_and_must_be_connected() {
    let (source, _destination) = sides();
    let (one, _other) = UnixStream::pair().unwrap();
    let options = OutgoingOptions { streams: 2, ..OutgoingOptions::default() };
    let error = source.client.start_outgoing(Target::Socket(one.into()), &options).unwrap_err();
    assert!(error.to_string().contains("streams is 2"), "{error}");
    let file = rustix::fs::memfd_create("a file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let error = source
        .client
        .start_outgoing(Target::Socket(file), &OutgoingOptions::default())
        .unwrap_err();
    assert!(error.to_string().contains("not a socket"), "{error}");
}
