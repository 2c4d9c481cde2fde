// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Folders of certificates that cannot be used, and files that change while an agent runs.

use super::scene::{Host, moves};
use pageferry_client::{Error, IncomingOptions, OutgoingOptions, Phase, Target};
use pageferry_tests::certificates::{Authority, Wanted};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::process::program;
use pageferry_tests::scenario::{Ram, SOON, Side};
use std::fs::{Permissions, remove_file, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// What an agent says that does not start with this folder.
#[track_caller]
fn refused(folder: &Path) -> String {
    let mut command = Command::new(program());
    let socket = folder.join("agent.sock");
    let output =
        command.args(["agent", "--socket"]).arg(socket).arg("--tls").arg(folder).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_folder_that_cannot_be_used_is_refused_at_the_start() {
    let authority = Authority::new("ca");
    let folder = authority.folder(["localhost", "host-a"]);
    let at = |name: &str| folder.path().join(name);
    let key = at("client-key.pem");
    set_permissions(&key, Permissions::from_mode(0o640)).unwrap();
    let said = refused(folder.path());
    assert!(said.contains("has mode 640, but nobody except its owner may read a key"), "{said}");
    set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    write(at("server-cert.pem"), "nothing").unwrap();
    let said = refused(folder.path());
    assert!(said.contains("server-cert.pem\" has no certificate"), "{said}");
    // A key of another certificate.
    write(at("server-cert.pem"), authority.sign(Wanted::new("localhost")).certificate).unwrap();
    let said = refused(folder.path());
    assert!(
        said.contains("server-key.pem\" is not the key of ") && said.contains("exchange both"),
        "{said}"
    );
    for (kind, content, why) in [
        ("ENCRYPTED PRIVATE KEY", "MAAA", "needs a password"),
        ("PRIVATE KEY", "MAAA", "the key is none of ECDSA P-256"),
        ("PRIVATE KEY", "*", "server-key.pem\" has no private key"),
    ] {
        let key = format!("-----BEGIN {kind}-----\n{content}\n-----END {kind}-----\n");
        write(at("server-key.pem"), key).unwrap();
        let said = refused(folder.path());
        assert!(said.contains(why), "{why}: {said}");
    }
    remove_file(at("ca-cert.pem")).unwrap();
    let said = refused(folder.path());
    assert!(said.contains("cannot read") && said.contains("ca-cert.pem"), "{said}");
}

#[test]
fn an_agent_says_at_its_start_that_its_certificates_have_expired() {
    let authority = Authority::new("ca");
    let folder = tempfile::tempdir().unwrap();
    let [server, client] = ["localhost", "host-a"]
        .map(|name| authority.sign(Wanted { until: 2020, ..Wanted::new(name) }));
    authority.fill(folder.path(), &server, &client);
    let mut host = Host::destination(folder.path());
    for name in ["client", "server"] {
        let said = host.agent().process().wait_for_line(&format!("{name}-cert.pem"), SOON).unwrap();
        assert!(said.contains("the certificate expired"), "{said}");
    }
    let mut right = Host::destination(authority.folder(["localhost", "host-a"]).path());
    right.agent().process().wait_for_line("listening on", SOON).unwrap();
    let said = right.agent().process().lines();
    assert!(!said.iter().any(|line| line.contains("-cert.pem")), "{said:?}");
}

#[test]
fn an_agent_without_certificates_refuses_the_address() {
    let side = Side::new(Ram::odd(10));
    let sentence = |error| match error {
        Error::Refused { sentence, .. } => sentence,
        other => panic!("{other:?}"),
    };
    let address = || Target::Address("tls:localhost:1".into());
    let refused = side.client.start_outgoing(address(), &OutgoingOptions::default()).unwrap_err();
    assert!(sentence(refused).contains("start the agent with --tls FOLDER"));
    let refused = side.client.start_incoming(address(), &IncomingOptions::default()).unwrap_err();
    assert!(sentence(refused).contains("start the agent with --tls FOLDER"));
}

#[test]
fn a_certificate_is_renewed_while_the_agent_waits() {
    let (authority, next) = (Authority::new("ca"), Authority::new("next"));
    let names = ["localhost", "host-a"];
    let (theirs, ours) = (authority.folder(names), next.folder(names));
    let (source, destination) = (Host::source(ours.path()), Host::destination(theirs.path()));
    let waits = destination.listen();
    let address = format!("tls:localhost:{}", waits.1);
    let status = source.send(&address, &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    let [server, client] = names.map(|name| next.sign(Wanted::new(name)));
    next.fill(theirs.path(), &server, &client);
    moves(&source, &destination, waits, &OutgoingOptions::default());
}

/// The source reads its new certificates when it is asked to try again, and answers others
/// meanwhile.
#[test]
fn a_certificate_is_renewed_before_the_source_tries_again() {
    let (authority, old) = (Authority::new("ca"), Authority::new("old"));
    let names = ["localhost", "host-a"];
    let (theirs, ours) = (authority.folder(names), old.folder(names));
    let (source, destination) = (Host::source(ours.path()), Host::destination(theirs.path()));
    let waits = destination.listen();
    let address = format!("tls:localhost:{}", waits.1);
    let status = source.send(&address, &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    let [server, client] = names.map(|name| authority.sign(Wanted::new(name)));
    authority.fill(ours.path(), &server, &client);
    moves(&source, &destination, waits, &OutgoingOptions::default());
}

/// A source that comes in the middle of a renewal is refused, and the agent waits on.
#[test]
fn a_folder_that_cannot_be_used_for_a_moment_ends_no_wait() {
    let authority = Authority::new("ca");
    let names = ["localhost", "host-a"];
    let (theirs, ours) = (authority.folder(names), authority.folder(names));
    let (source, destination) = (Host::source(ours.path()), Host::destination(theirs.path()));
    let waits = destination.listen();
    // The certificate is new, and the key is not.
    let [server, client] = names.map(|name| authority.sign(Wanted::new(name)));
    write(theirs.path().join("server-cert.pem"), &server.certificate).unwrap();
    let address = format!("tls:localhost:{}", waits.1);
    let status = source.send(&address, &OutgoingOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    source.assert_keeps_guest();
    let waiting = || destination.attached.client.status().unwrap();
    wait_until("the reason at the destination", SOON, || {
        waiting().error_text().contains("server-cert.pem")
    })
    .unwrap_or_else(|_| panic!("{}", waiting().error_text()));
    assert_eq!(waiting().phase, Phase::Connecting);
    authority.fill(theirs.path(), &server, &client);
    moves(&source, &destination, waits, &OutgoingOptions::default());
}
