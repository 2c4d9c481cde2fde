// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Recovery of a postcopy over TLS: only the peers with which it began may continue it.

use super::scene::{Host, PAGES};
use super::tokens::{ONE, OTHER, Tokens};
use pageferry_client::{Mode, OutgoingOptions, Parameters, Phase};
use pageferry_tests::certificates::{Authority, Wanted};
use pageferry_tests::deadline::wait_until;
use pageferry_tests::proxy::Proxy;
use pageferry_tests::require;
use pageferry_tests::scenario::{Ram, SOON, assert_same};
use std::path::Path;

const NAMES: [&str; 2] = ["localhost", "host-a"];
/// In bytes per second: the pages take so long that the connections can be cut before.
const SLOWLY: u64 = 64 << 10;

fn options() -> OutgoingOptions {
    OutgoingOptions {
        mode: Mode::Postcopy,
        streams: 2,
        bandwidth: SLOWLY,
        ..OutgoingOptions::default()
    }
}

/// A postcopy whose connections were cut, and both sides of which are paused.
struct Paused {
    source: Host,
    destination: Host,
    proxy: Proxy,
    jobs: [u64; 2],
}

impl Paused {
    fn new(source: Host, destination: Host) -> Self {
        let (incoming, port) = destination.listen();
        let proxy = Proxy::to(&format!("tcp:127.0.0.1:{port}")).unwrap();
        let client = &source.attached.client;
        let target = pageferry_client::Target::Address(address_of(&proxy));
        let outgoing = client.start_outgoing(target, &options()).unwrap().job;
        let paused = Self { source, destination, proxy, jobs: [outgoing, incoming] };
        paused.reach(Phase::Postcopy);
        paused.proxy.cut();
        paused.reach(Phase::PostcopyPaused);
        paused
    }

    fn phases(&self) -> [Phase; 2] {
        [&self.source, &self.destination].map(|side| side.attached.client.status().unwrap().phase)
    }

    #[track_caller]
    fn reach(&self, phase: Phase) {
        wait_until(phase.name(), SOON, || self.phases() == [phase; 2])
            .unwrap_or_else(|_| panic!("{:?}", self.phases()));
    }

    /// Recovers, and waits until the source is paused again, for this reason.
    #[track_caller]
    fn is_refused(&self, why: &str) {
        let client = &self.source.attached.client;
        client.recover(None, &options()).unwrap();
        let said = || client.status().unwrap().error_text().to_owned();
        wait_until("the refusal", SOON, || said().contains(why))
            .unwrap_or_else(|_| panic!("{}", said()));
        self.reach(Phase::PostcopyPaused);
    }

    /// Recovers, and checks that all memory arrives.
    #[track_caller]
    fn completes(self) {
        let client = &self.source.attached.client;
        client.recover(None, &options()).unwrap();
        self.reach(Phase::Postcopy);
        client.set_parameters(&Parameters::bandwidth(0)).unwrap();
        for (side, job) in [&self.source, &self.destination].into_iter().zip(self.jobs) {
            let status = side.attached.client.wait(job, SOON).unwrap();
            assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        }
        assert_same(&self.source.attached.ram, &self.destination.attached.ram);
    }
}

fn address_of(proxy: &Proxy) -> String {
    let port = proxy.address().rsplit_once(':').unwrap().1;
    format!("tls:localhost:{port}")
}

fn source(certificates: &Path) -> Host {
    Host::new(Ram::odd(PAGES).mapped().stamped(), certificates, &[])
}

fn destination(certificates: &Path) -> Host {
    Host::new(Ram::odd(PAGES).mapped(), certificates, &[])
}

#[test]
fn renewed_certificates_recover_and_those_of_another_host_do_not() {
    if !require::uffd() {
        return;
    }
    let authority = Authority::new("ca");
    let (ours, theirs) = (authority.folder(NAMES), authority.folder(NAMES));
    let paused = Paused::new(source(ours.path()), destination(theirs.path()));
    let server = || authority.sign(Wanted::new("localhost"));
    // The source knows the number of the session, and shows itself as another trusted host.
    authority.fill(ours.path(), &server(), &authority.sign(Wanted::new("host-b")));
    paused.is_refused("a migration is paused here that began over TLS with another peer");
    // Its own certificate, renewed, with a new key.
    authority.fill(ours.path(), &server(), &authority.sign(Wanted::new("host-a")));
    paused.completes();
}

#[test]
fn source_recovers_to_its_own_destination_alone() {
    if !require::uffd() {
        return;
    }
    let authority = Authority::new("ca");
    let (ours, theirs) = (authority.folder(NAMES), authority.folder(NAMES));
    let paused = Paused::new(source(ours.path()), destination(theirs.path()));
    let client = || authority.sign(Wanted::new("host-a"));
    // Another trusted host that has the name of the address, too.
    let other = authority.sign_names(&["localhost", "host-c"]);
    authority.fill(theirs.path(), &other, &client());
    paused.is_refused("the migration began over TLS with another peer");
    let renewed = authority.sign(Wanted::new("localhost"));
    authority.fill(theirs.path(), &renewed, &client());
    paused.completes();
}

/// It is written where the next agent finds it.
#[test]
fn next_agent_of_the_destination_knows_the_source_again() {
    if !require::uffd() {
        return;
    }
    let authority = Authority::new("ca");
    let (ours, theirs) = (authority.folder(NAMES), authority.folder(NAMES));
    let there = Host::supervised(Ram::odd(PAGES).mapped(), theirs.path());
    let mut paused = Paused::new(source(ours.path()), there);
    let client = &paused.destination.attached.client;
    let lost = client.agent_pid();
    paused.destination.kill_agent();
    let is_next = || client.agent_pid() != lost && client.status().is_ok_and(|it| it.job != 0);
    wait_until("the next agent", SOON, is_next).unwrap();
    paused.jobs[1] = client.status().unwrap().job;
    paused.reach(Phase::PostcopyPaused);
    let server = || authority.sign(Wanted::new("localhost"));
    authority.fill(ours.path(), &server(), &authority.sign(Wanted::new("host-b")));
    paused.is_refused("a migration is paused here that began over TLS with another peer");
    authority.fill(ours.path(), &server(), &authority.sign(Wanted::new("host-a")));
    paused.completes();
}

#[test]
fn migration_that_began_over_tls_does_not_go_on_in_plain_text() {
    if !require::uffd() {
        return;
    }
    let authority = Authority::new("ca");
    let (ours, theirs) = (authority.folder(NAMES), authority.folder(NAMES));
    let paused = Paused::new(source(ours.path()), destination(theirs.path()));
    let listen = "tcp:127.0.0.1:0";
    let started = paused.destination.attached.client.recover(Some(listen), &options()).unwrap();
    let client = &paused.source.attached.client;
    client.recover(Some(&started.address), &options()).unwrap();
    let said = || client.status().unwrap().error_text().to_owned();
    wait_until("the refusal", SOON, || said().contains("began over TLS"))
        .unwrap_or_else(|_| panic!("{}", said()));
    paused.reach(Phase::PostcopyPaused);
    paused.completes();
}

/// The operator gives both sides another token: who has it is trusted.
#[test]
fn token_may_change_before_a_recovery() {
    if !require::uffd() {
        return;
    }
    let tokens = Tokens::new();
    let (ours, theirs) = (tokens.file("ours", ONE), tokens.file("theirs", ONE));
    let source = Host::with_token(Ram::odd(PAGES).mapped().stamped(), &ours);
    let destination = Host::with_token(Ram::odd(PAGES).mapped(), &theirs);
    let paused = Paused::new(source, destination);
    tokens.file("theirs", OTHER);
    paused.is_refused("the peer has another token");
    tokens.file("ours", OTHER);
    paused.completes();
}
