// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What arrives over TLS, and what becomes of a connection that somebody disturbs.

use super::scene::{Host, PAGES, moves};
use pageferry_client::{Compression, IncomingOptions, Mode, OutgoingOptions, Phase, Target};
use pageferry_tests::certificates::Authority;
use pageferry_tests::require;
use pageferry_tests::scenario::{Ram, SOON};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::spawn;

const NAMES: [&str; 2] = ["localhost", "host-a"];

#[test]
fn guests_move_in_every_mode() {
    let certificates = Authority::new("ca").folder(NAMES);
    let modes = [Mode::Precopy, Mode::Postcopy, Mode::Hybrid];
    for mode in modes.into_iter().filter(|mode| *mode == Mode::Precopy || require::uffd()) {
        for (streams, compression) in [(1, Compression::None), (4, Compression::Lz4)] {
            let source = Host::source(certificates.path());
            let ram = Ram::odd(PAGES);
            let ram = if mode == Mode::Precopy { ram } else { ram.mapped() };
            let destination = Host::new(ram, certificates.path(), &[]);
            let waits = destination.listen();
            let options = OutgoingOptions { mode, streams, compression, ..Default::default() };
            moves(&source, &destination, waits, &options);
        }
    }
}

#[test]
fn peers_that_do_not_speak_tls_are_told_apart() {
    let certificates = Authority::new("ca").folder(NAMES);
    let (source, mut destination) =
        (Host::source(certificates.path()), Host::destination(certificates.path()));
    // In plain text to TLS, garbage, and silence.
    let waits = destination.listen();
    let status = source.send(&format!("tcp:localhost:{}", waits.1), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
    assert!(status.error_text().contains("waits over TLS (tls:)"), "{}", status.error_text());
    destination.agent().process().wait_for_line("does not speak TLS", SOON).unwrap();
    source.assert_keeps_guest();
    let mut strangers = Vec::new();
    for stranger in 0..50 {
        let mut socket = TcpStream::connect(("127.0.0.1", waits.1)).unwrap();
        let bytes: Vec<u8> = (0..stranger * 100).map(|byte| (byte * 7) as u8).collect();
        let _ = socket.write_all(&bytes);
        strangers.push(socket);
    }
    moves(&source, &destination, waits, &OutgoingOptions::default());

    // TLS to plain text.
    let (source, mut destination) =
        (Host::source(certificates.path()), Host::destination(certificates.path()));
    let listen = Target::Address("tcp:127.0.0.1:0".into());
    let client = &destination.attached.client;
    let plain = client.start_incoming(listen, &IncomingOptions::default()).unwrap();
    let port = plain.address.rsplit_once(':').unwrap().1;
    let status = source.send(&format!("tls:localhost:{port}"), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("does not speak TLS"), "{}", status.error_text());
    destination.agent().process().wait_for_line("the other side speaks TLS", SOON).unwrap();
    source.assert_keeps_guest();
}

/// Passes bytes on, and changes the one with this number.
fn pass(mut from: TcpStream, mut to: TcpStream, changed: Option<usize>) {
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(changed) = changed
            && (passed..passed + count).contains(&changed)
        {
            buffer[changed - passed] ^= 1;
        }
        passed += count;
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn a_byte_that_was_changed_on_its_way_ends_the_migration() {
    let certificates = Authority::new("ca").folder(NAMES);
    // In the handshake, in the hello, and among the pages.
    for changed in [300, 8_000, 500_000] {
        let (source, destination) =
            (Host::source(certificates.path()), Host::destination(certificates.path()));
        let waits = destination.listen();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy = spawn(move || {
            let (ours, _) = listener.accept().unwrap();
            let theirs = TcpStream::connect(("127.0.0.1", waits.1)).unwrap();
            let back = (theirs.try_clone().unwrap(), ours.try_clone().unwrap());
            let back = spawn(move || pass(back.0, back.1, None));
            pass(ours, theirs, Some(changed));
            back.join().unwrap();
        });
        let status = source.send(&format!("tls:localhost:{port}"), &OutgoingOptions::default());
        assert_eq!(status.phase, Phase::Failed, "byte {changed}: {}", status.error_text());
        source.assert_keeps_guest();
        proxy.join().unwrap();
        assert_eq!(destination.attached.vmm.resumes(), 0);
        let _ = destination.attached.client.cancel();
        let ended = destination.attached.client.wait(waits.0, SOON).unwrap();
        assert!(matches!(ended.phase, Phase::Failed | Phase::Cancelled), "{:?}", ended.phase);
    }
}
