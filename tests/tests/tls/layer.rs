// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stream over TLS of which both directions are used at once.

use pageferry_agent::transport::{RecordReader, RecordWriter, StreamSocket};
use pageferry_agent::trust::Trust;
use pageferry_protocol::stream::Kind;
use pageferry_tests::certificates::Authority;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::on_drop::OnDrop;
use pageferry_tests::scenario::SOON;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::IoSlice;
use std::os::unix::net::UnixStream;
use std::thread::{scope, spawn};

/// The two ends of a stream, which trust each other.
fn pair() -> [StreamSocket; 2] {
    let folder = Authority::new("ca").folder(["localhost", "host-a"]);
    let trust = Trust::in_folder(folder.path(), &[]).unwrap();
    let (source, destination) = UnixStream::pair().unwrap();
    let socket = |end: UnixStream| StreamSocket::new(end.into(), SOON).unwrap();
    let source = socket(source).secured(Some(trust.connect("localhost").unwrap()));
    let destination = socket(destination).secured(Some(trust.accept().unwrap()));
    let other = source.clone();
    let shakes = spawn(move || other.shake_hands().unwrap());
    destination.shake_hands().unwrap();
    shakes.join().unwrap();
    [source, destination]
}

fn has_room(socket: &StreamSocket) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec::default())).unwrap() > 0
}

/// What was received with the record before wakes nobody.
#[test]
fn records_are_read_while_what_is_written_does_not_get_through() {
    let [source, destination] = pair();
    let writer = RecordWriter::new(source.clone());
    for number in 0..20 {
        writer.write_plain(Kind::PassEnd, number).unwrap();
    }
    scope(|scope| {
        let writing = destination.clone();
        // It ends when the stream does.
        scope.spawn(move || writing.write_all(&mut [IoSlice::new(&vec![0; 64 << 20])]));
        let _ends = OnDrop(|| destination.shut_down());
        wait_until("the stream to be full", SOON, || !has_room(&destination)).unwrap();
        let mut reader = RecordReader::new(destination.clone());
        for number in 0..20 {
            assert_eq!(reader.read().unwrap().header.number(), number);
        }
    });
}
