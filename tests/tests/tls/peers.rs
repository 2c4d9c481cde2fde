// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Peers that are not trusted. The guest runs on, and the destination waits for the right one.

use super::scene::{Host, PAGES, moves};
use pageferry_client::{OutgoingOptions, Phase};
use pageferry_tests::certificates::{Authority, Wanted, self_signed};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::scenario::{Ram, SOON};
use std::path::Path;

const NAMES: [&str; 2] = ["localhost", "host-a"];

/// The source is refused with these words, and so it is said at the destination, whose guest then
/// comes from another source.
#[track_caller]
fn source_is_refused(wrong: &Path, right: &Path, destination: &Host, here: &str, there: &str) {
    let waits = destination.listen();
    let source = Host::source(wrong);
    let status = source.send(&format!("tls:localhost:{}", waits.1), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains(here), "{}", status.error_text());
    source.assert_keeps_guest();
    let says = || destination.attached.client.status().unwrap().error_text().to_owned();
    wait_until("the reason at the destination", SOON, || says().contains(there))
        .unwrap_or_else(|_| panic!("{}", says()));
    moves(&Host::source(right), destination, waits, &OutgoingOptions::default());
}

/// The source is refused, and so it is said at the destination.
#[track_caller]
fn source_is_refused_at(source: &Path, destination: &Host, there: &str) {
    let (_, port) = destination.listen();
    let source = Host::source(source);
    let status = source.send(&format!("tls:localhost:{port}"), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains("its ca-crl.pem has expired"), "{}", status.error_text());
    source.assert_keeps_guest();
    let says = || destination.attached.client.status().unwrap().error_text().to_owned();
    wait_until("the reason at the destination", SOON, || says().contains(there))
        .unwrap_or_else(|_| panic!("{}", says()));
}

/// The source does not trust the destination.
#[track_caller]
fn destination_is_refused(source: &Path, wrong: &Path, name: &str, here: &str) {
    let (source, destination) = (Host::source(source), Host::destination(wrong));
    let (_, port) = destination.listen();
    let status = source.send(&format!("tls:{name}:{port}"), &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error_text().contains(here), "{}", status.error_text());
    source.assert_keeps_guest();
    let waiting = destination.attached.client.status().unwrap();
    assert_eq!(waiting.phase, Phase::Connecting, "{}", waiting.error_text());
}

#[test]
fn a_source_that_is_not_trusted_is_refused_by_name() {
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    let right = authority.folder(NAMES);
    let server = authority.sign(Wanted::new("localhost"));
    let folder = || tempfile::tempdir().unwrap();
    // It trusts the destination, and shows something wrong.
    let showing = |client| {
        let wrong = folder();
        authority.fill(wrong.path(), &server, &client);
        wrong
    };
    let cases = [
        (
            showing(other.sign(Wanted::new("host-a"))),
            "is not signed by an authority of ca-cert.pem",
        ),
        (
            showing(self_signed(Wanted::new("host-a"))),
            "is not signed by an authority of ca-cert.pem",
        ),
        (
            showing(authority.sign(Wanted { until: 2020, ..Wanted::new("host-a") })),
            "the peer's certificate expired",
        ),
    ];
    for (wrong, there) in &cases {
        let destination = Host::destination(right.path());
        source_is_refused(
            wrong.path(),
            right.path(),
            &destination,
            "the peer has refused the certificate",
            there,
        );
    }
    let revoked = showing(authority.sign(Wanted { serial: 66, ..Wanted::new("host-a") }));
    let knows = authority.folder(NAMES);
    authority.revoke(knows.path(), 66);
    let destination = Host::destination(knows.path());
    source_is_refused(
        revoked.path(),
        right.path(),
        &destination,
        "the peer has refused the certificate",
        "is revoked by ca-crl.pem",
    );
    // Without a list of now, nobody knows who is revoked.
    let late = authority.folder(NAMES);
    authority.revoke_until(late.path(), 67, 2020);
    let destination = Host::destination(late.path());
    let words = "cannot be checked: ca-crl.pem expired";
    source_is_refused_at(right.path(), &destination, words);
    // One that the authority has signed, and that is somebody else.
    let stranger = authority.folder(["localhost", "host-c"]);
    let destination = Host::new(Ram::odd(PAGES), right.path(), &["--tls-peer", "host-a"]);
    let words = "the peer's certificate is for host-c, and --tls-peer allows host-a";
    source_is_refused(stranger.path(), right.path(), &destination, words, words);
}

#[test]
fn a_destination_that_is_not_trusted_gets_nothing() {
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    let right = authority.folder(NAMES);
    let client = authority.sign(Wanted::new("host-a"));
    let showing = |server| {
        let wrong = tempfile::tempdir().unwrap();
        authority.fill(wrong.path(), &server, &client);
        wrong
    };
    let from = right.path();
    let wrong = showing(other.sign(Wanted::new("localhost")));
    destination_is_refused(
        from,
        wrong.path(),
        "localhost",
        "is not signed by an authority of ca-cert.pem",
    );
    let wrong = showing(self_signed(Wanted::new("localhost")));
    destination_is_refused(
        from,
        wrong.path(),
        "localhost",
        "is not signed by an authority of ca-cert.pem",
    );
    let wrong = showing(authority.sign(Wanted { until: 2020, ..Wanted::new("localhost") }));
    destination_is_refused(from, wrong.path(), "localhost", "the peer's certificate expired");
    // It is for another host.
    let wrong = showing(authority.sign(Wanted::new("host-b")));
    let words = "is for host-b, and not for localhost";
    destination_is_refused(from, wrong.path(), "localhost", words);
    destination_is_refused(from, from, "127.0.0.1", "and not for 127.0.0.1");
    let knows = authority.folder(NAMES);
    authority.revoke(knows.path(), 66);
    let wrong = showing(authority.sign(Wanted { serial: 66, ..Wanted::new("localhost") }));
    destination_is_refused(knows.path(), wrong.path(), "localhost", "is revoked by ca-crl.pem");
}
