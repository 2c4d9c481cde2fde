// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The TLS layer against rustls with its own buffers at the other end.

use super::super::stream::StreamSocket;
use super::received::Received;
use crate::trust::Token;
use rustix::io::IoSlice;
use rustls::{ClientConnection, Stream};
use std::fs::{Permissions, set_permissions, write};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

const FAR: Duration = Duration::from_secs(60);

fn token() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    write(&path, "0123456789abcdef0123456789abcdef").unwrap();
    set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    (folder, path)
}

/// Our side as the server, and a client with the buffers of rustls.
fn pair() -> (StreamSocket, ClientConnection, UnixStream) {
    let (_folder, path) = token();
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(FAR)).unwrap();
    let secured = crate::trust::Trust::by_token(&path).accept().unwrap();
    let ours = StreamSocket::new(ours.into(), FAR).unwrap().secured(Some(secured));
    let name = "localhost".try_into().unwrap();
    let client = ClientConnection::new(Token::new(&path).client().unwrap(), name).unwrap();
    (ours, client, theirs)
}

/// Bytes that differ from their neighbours.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|byte| (byte * 31 + byte / 251) as u8).collect()
}

/// Reads exactly this many bytes, into buffers of odd lengths.
fn read(socket: &StreamSocket, length: usize) -> Vec<u8> {
    let (mut all, mut sizes) = (Vec::new(), [1, 7, 4096, 20_000, 300_000].into_iter().cycle());
    while all.len() < length {
        let mut buffer = vec![0; sizes.next().unwrap()];
        let most = buffer.len().min(length - all.len());
        match socket.read(&mut buffer[..most]).unwrap() {
            Some(0) => panic!("ended after {} bytes", all.len()),
            Some(count) => all.extend_from_slice(&buffer[..count]),
            None => assert!(socket.wait(rustix::event::PollFlags::IN, None).unwrap()),
        }
    }
    all
}

/// Runs the peer on a thread of its own.
fn peer(
    mut client: ClientConnection, mut socket: UnixStream,
    run: impl FnOnce(&mut Stream<'_, ClientConnection, UnixStream>) + Send + 'static,
) -> JoinHandle<()> {
    spawn(move || run(&mut Stream::new(&mut client, &mut socket)))
}

#[test]
fn records_of_any_length_are_opened_across_key_updates() {
    let (ours, client, socket) = pair();
    let sent = bytes(700_000);
    let expected = sent.clone();
    let writes = peer(client, socket, move |stream| {
        let mut rest = &sent[..];
        for length in [1, 100, 33, 16_384, 5, 250_000, 1, 200_000].into_iter().cycle() {
            let (part, left) = rest.split_at(rest.len().min(length));
            stream.write_all(part).unwrap();
            stream.conn.refresh_traffic_keys().unwrap();
            rest = left;
            if rest.is_empty() {
                break;
            }
        }
        stream.flush().unwrap();
        // Keep the connection open until the other side has read all.
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
    });
    ours.shake_hands().unwrap();
    assert!(read(&ours, expected.len()) == expected);
    ours.write_all(&mut [IoSlice::new(&[1])]).unwrap();
    writes.join().unwrap();
}

#[test]
fn parts_of_any_length_arrive_in_order() {
    let (ours, client, socket) = pair();
    let lengths =
        [0, 1, 64, 262_144, 64, 16_383, 1, 16_384, 16_385, 0, 700_000, 8_000, 8_000, 8_000, 3];
    let parts: Vec<Vec<u8>> = lengths.into_iter().map(bytes).collect();
    let expected = parts.concat();
    let reads = peer(client, socket, move |stream| {
        let mut found = vec![0; expected.len()];
        stream.read_exact(&mut found).unwrap();
        assert!(found == expected);
    });
    ours.shake_hands().unwrap();
    let mut parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    ours.write_all(&mut parts).unwrap();
    reads.join().unwrap();
}

/// What was received and is not asked for yet must not be lost by a write.
#[test]
fn writes_leave_what_was_received_for_the_next_read() {
    let (ours, client, socket) = pair();
    let echo = peer(client, socket, |stream| {
        for number in 0..100u8 {
            stream.write_all(&[number; 50]).unwrap();
        }
        stream.flush().unwrap();
        let mut found = vec![0; 100];
        stream.read_exact(&mut found).unwrap();
        assert_eq!(found, (0..100).collect::<Vec<u8>>());
    });
    ours.shake_hands().unwrap();
    for number in 0..100u8 {
        assert_eq!(read(&ours, 49), [number; 49]);
        ours.write_all(&mut [IoSlice::new(&[number])]).unwrap();
        assert_eq!(read(&ours, 1), [number]);
    }
    echo.join().unwrap();
}

#[test]
fn a_peer_that_says_farewell_ends_the_stream_and_may_still_be_written_to() {
    let (ours, client, socket) = pair();
    let peer = peer(client, socket, |stream| {
        stream.write_all(b"last").unwrap();
        stream.conn.send_close_notify();
        stream.flush().unwrap();
        let mut found = [0; 3];
        stream.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"bye");
    });
    ours.shake_hands().unwrap();
    assert_eq!(read(&ours, 4), b"last");
    let mut buffer = [0; 8];
    while ours.read(&mut buffer).unwrap() != Some(0) {
        assert!(ours.wait(rustix::event::PollFlags::IN, None).unwrap());
    }
    ours.write_all(&mut [IoSlice::new(b"bye")]).unwrap();
    assert_eq!(ours.read(&mut buffer).unwrap(), Some(0));
    peer.join().unwrap();
}

/// A message of the handshake that never ends.
#[test]
fn a_stranger_fills_no_more_than_its_buffer() {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let mut received = Received::default();
    let fills = spawn(move || {
        // It fails once the other end is closed.
        while (&theirs).write_all(&[0; 4096]).is_ok() {}
    });
    let refused = loop {
        if let Err(refused) = received.make_room(true) {
            break refused;
        }
        received.receive(ours.as_fd()).unwrap();
    };
    assert!(refused.to_string().contains("TLS"), "{refused}");
    assert!(received.all().len() <= 72 << 10);
    drop(ours);
    fills.join().unwrap();
}
