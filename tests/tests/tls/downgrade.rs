// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Peers that speak TLS 1.2, or are made to seem so: they are refused by name, and get nothing.

use super::scene::{Host, moves};
use pageferry_client::{OutgoingOptions, Phase};
use pageferry_tests::certificates::Authority;
use pageferry_tests::scenario::SOON;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::spawn;

/// The alert `protocol_version`.
const ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 70];
const SAID: &str = "the peer does not offer TLS 1.3";
/// TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, and the first one of TLS 1.3.
const SUITES: [[u8; 2]; 2] = [[0xc0, 0x2b], [0x13, 1]];

/// Bytes behind their length, which has two bytes.
fn sized(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
}

/// A message of a handshake of TLS 1.2, in a record.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let version_and_random = [&[3, 3][..], &[7; 32]].concat();
    let body = [&version_and_random, body].concat();
    [&[22, 3, 1][..], &sized(&[&[kind, 0][..], &sized(&body)].concat())].concat()
}

/// A hello of a source. It offers also what only TLS 1.3 has.
fn client_hello() -> Vec<u8> {
    // Groups, forms of points and signatures.
    let extensions = [0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0, 0, 13, 0, 4, 0, 2, 4, 3];
    let (suites, compression) = (sized(&SUITES.concat()), [1, 0]);
    message(1, &[&[0][..], &suites, &compression, &sized(&extensions)].concat())
}

/// The answer to a hello with this session.
fn server_hello(session: &[u8]) -> Vec<u8> {
    message(2, &[&[session.len() as u8][..], session, &SUITES[1], &[0], &sized(&[])].concat())
}

#[test]
fn a_source_of_an_older_version_is_refused_by_name() {
    let certificates = Authority::new("ca").folder(["localhost", "host-a"]);
    let mut destination = Host::destination(certificates.path());
    let listening = destination.listen();
    let mut stream = TcpStream::connect(("127.0.0.1", listening.1)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(&client_hello()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, ALERT);
    destination.agent().process().wait_for_line(SAID, SOON).unwrap();
    let source = Host::source(certificates.path());
    moves(&source, &destination, listening, &OutgoingOptions::default());
}

#[test]
fn a_destination_of_an_older_version_gets_nothing() {
    let certificates = Authority::new("ca").folder(["localhost", "host-a"]);
    let source = Host::source(certificates.path());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut header = [0; 5];
        stream.read_exact(&mut header).unwrap();
        let mut hello = vec![0; u16::from_be_bytes([header[3], header[4]]).into()];
        stream.read_exact(&mut hello).unwrap();
        // Behind the kind, the length, the version and the random number.
        let session = &hello[39..39 + usize::from(hello[38])];
        stream.write_all(&server_hello(session)).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let _ = stream.shutdown(Shutdown::Both);
        answer
    });
    let status = source.send(&format!("tls:localhost:{port}"), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains(SAID), "{}", status.error_text());
    source.assert_keeps_guest();
    assert_eq!(server.join().unwrap(), ALERT);
}
