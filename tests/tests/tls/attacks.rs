// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What somebody between the agents can do: end a migration, and nothing else. The guest runs at
//! one side or waits there, both sides say why, and what is paused can be recovered.
//!
//! The tests print their seed. `PAGEFERRY_SEED` sets it.

use super::middle::{DEEDS, Deed, Middle, Plan};
use super::scene::{Host, PAGES};
use pageferry_client::{
    IncomingOptions, JobStatus, Mode, OutgoingOptions, Ownership, Parameters, Phase, Target,
};
use pageferry_tests::certificates::Authority;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::random::Random;
use pageferry_tests::require;
use pageferry_tests::scenario::{Ram, SOON, assert_same};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const NAMES: [&str; 2] = ["localhost", "host-a"];
/// Both sides wait for this long for a record that somebody has dropped. It is longer than any
/// delay on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Numbers that follow from the seed; others for each test.
fn random(test: u64) -> Random {
    let given = std::env::var("PAGEFERRY_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("PAGEFERRY_SEED={seed}");
    Random::derive(seed, test)
}

/// Two agents, and somebody between them.
struct Scene {
    // Dropped first, so that the agents see the end of their connections.
    middle: Middle,
    source: Host,
    destination: Host,
    incoming: u64,
    port: u16,
    options: OutgoingOptions,
    _certificates: tempfile::TempDir,
}

impl Scene {
    fn new(authority: &Authority, mode: Mode) -> Self {
        let certificates = authority.folder(NAMES);
        let source = Host::source(certificates.path());
        let ram = Ram::odd(PAGES);
        let ram = if mode == Mode::Precopy { ram } else { ram.mapped() };
        let destination = Host::new(ram, certificates.path(), &[]);
        let listen = Target::Address("tls:127.0.0.1:0".into());
        let waits = IncomingOptions { peer_timeout: TIMEOUT, ..IncomingOptions::default() };
        let started = destination.attached.client.start_incoming(listen, &waits).unwrap();
        let port = started.address.rsplit_once(':').unwrap().1.parse().unwrap();
        let postcopy = mode != Mode::Precopy;
        let options = OutgoingOptions {
            mode,
            streams: if postcopy { 1 } else { 2 },
            urgent_streams: 1,
            // Slow enough for its connections to be cut before all is there.
            bandwidth: if postcopy { 1 << 20 } else { 0 },
            peer_timeout: TIMEOUT,
            ..OutgoingOptions::default()
        };
        let middle = Middle::before(port);
        let (incoming, _certificates) = (started.job, certificates);
        Self { middle, source, destination, incoming, port, options, _certificates }
    }

    fn send(&self) -> u64 {
        let target = Target::Address(format!("tls:localhost:{}", self.middle.port));
        self.source.attached.client.start_outgoing(target, &self.options).unwrap().job
    }

    fn recover(&self) {
        let address = format!("tls:localhost:{}", self.middle.port);
        self.source.attached.client.recover(Some(&address), &self.options).unwrap();
    }

    /// Waits until both jobs have ended or are paused. A destination that still waits for a source
    /// is cancelled.
    fn rest(&self) -> [JobStatus; 2] {
        let rests = |status: &JobStatus| {
            status.phase.is_final()
                || matches!(status.phase, Phase::PostcopyPaused | Phase::Unconfirmed)
        };
        let wait = |host: &Host| {
            let status = || host.attached.client.status().ok().filter(rests);
            wait_for("the end of a job, or its pause", 4 * SOON, status).unwrap_or_else(|error| {
                panic!(
                    "{error}: {:?}",
                    [&self.source, &self.destination].map(|host| { host.attached.client.status() })
                )
            })
        };
        let source = wait(&self.source);
        if source.phase.is_final() && self.destination.attached.vmm.resumes() == 0 {
            // Refused if the job ends by itself.
            let _ = self.destination.attached.client.cancel();
        }
        [source, wait(&self.destination)]
    }

    /// The guest runs at one side at most. It runs at the source unless that has given it up.
    fn assert_one_owner(&self, [source, destination]: &[JobStatus; 2]) {
        let said = format!("{source:?}\n{destination:?}");
        let runs_here = !self.source.attached.vmm.is_paused();
        let runs_there = self.destination.attached.vmm.resumes() > 0;
        assert!(!(runs_here && runs_there), "{said}");
        match source.phase {
            Phase::Failed => {
                assert!(runs_here, "{said}");
                assert_eq!(self.source.attached.client.ownership(), Ownership::Ours, "{said}");
                assert!(!source.error_text().is_empty(), "{said}");
                // It may have been cancelled above.
                assert!(!destination.error_text().is_empty(), "{said}");
            }
            Phase::Completed => {
                assert!(runs_there && !runs_here, "{said}");
                assert_same(&self.source.attached.ram, &self.destination.attached.ram);
            }
            Phase::Unconfirmed | Phase::PostcopyPaused => {
                assert!(!runs_here && !source.error_text().is_empty(), "{said}");
            }
            other => panic!("{other:?}: {said}"),
        }
    }

    /// Recovers without a disturbance, and checks that all arrives.
    fn assert_recovers(&self, outgoing: u64) {
        self.middle.plans(None);
        self.recover();
        // Refused if all is there already.
        let _ = self.source.attached.client.set_parameters(&Parameters::bandwidth(0));
        self.source.completes(outgoing);
        self.destination.completes(self.incoming);
        assert_eq!(self.destination.attached.vmm.resumes(), 1);
        assert_same(&self.source.attached.ram, &self.destination.attached.ram);
    }
}

#[test]
fn a_disturbed_migration_leaves_the_guest_at_one_side() {
    let authority = Authority::new("ca");
    let mut random = random(0);
    for deed in DEEDS.into_iter().cycle().take(4 * DEEDS.len()) {
        let scene = Scene::new(&authority, Mode::Precopy);
        let plan = Plan::at_any_moment(deed, &mut random);
        scene.middle.plans(Some(plan));
        scene.send();
        let ends = scene.rest();
        eprintln!("{plan:?}, came by: {}: {:?}", scene.middle.has_acted(), ends[0].phase);
        scene.assert_one_owner(&ends);
        let is_harmless = deed == Deed::Delay || !scene.middle.has_acted();
        assert!(!is_harmless || ends[0].phase == Phase::Completed, "{plan:?}: {ends:?}");
    }
}

#[test]
fn a_disturbed_postcopy_and_its_disturbed_recovery_are_recovered() {
    if !require::uffd() {
        return;
    }
    let authority = Authority::new("ca");
    let mut random = random(1);
    for deed in DEEDS.into_iter().cycle().take(3 * DEEDS.len()) {
        let scene = Scene::new(&authority, Mode::Postcopy);
        scene.middle.plans(None);
        let outgoing = scene.send();
        scene.source.reaches(Phase::Postcopy);
        scene.destination.reaches(Phase::Postcopy);
        scene.middle.cut();
        let ends = scene.rest();
        scene.assert_one_owner(&ends);
        assert_eq!(ends[0].phase, Phase::PostcopyPaused, "{ends:?}");
        let plan = Plan::at_any_moment(deed, &mut random);
        scene.middle.plans(Some(plan));
        scene.recover();
        let _ = scene.source.attached.client.set_parameters(&Parameters::bandwidth(0));
        let ends = scene.rest();
        eprintln!("{plan:?}, came by: {}: {:?}", scene.middle.has_acted(), ends[0].phase);
        scene.assert_one_owner(&ends);
        let is_harmless = deed == Deed::Delay || !scene.middle.has_acted();
        assert!(!is_harmless || ends[0].phase == Phase::Completed, "{plan:?}: {ends:?}");
        if ends[0].phase == Phase::PostcopyPaused {
            scene.assert_recovers(outgoing);
        }
        assert_eq!(scene.destination.attached.vmm.resumes(), 1);
    }
}

/// Over plain TCP this would continue the migration: the session number is all that it takes.
#[test]
fn a_recovery_that_somebody_recorded_is_not_taken_again() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::new(&Authority::new("ca"), Mode::Postcopy);
    scene.middle.plans(None);
    let outgoing = scene.send();
    scene.source.reaches(Phase::Postcopy);
    scene.destination.reaches(Phase::Postcopy);
    scene.middle.cut();
    assert_eq!(scene.rest()[0].phase, Phase::PostcopyPaused);
    // The recovery that is recorded.
    scene.middle.plans(None);
    scene.recover();
    scene.destination.reaches(Phase::Postcopy);
    scene.middle.cut();
    let [_, paused] = scene.rest();
    // A handshake that was not answered soon may have been tried again.
    let mut heard = scene.middle.heard();
    heard.retain(|bytes| bytes.len() > 500);
    assert!(heard.len() >= 2, "{}", heard.len());
    let replayed = heard.iter().map(|bytes| {
        let mut socket = TcpStream::connect(("127.0.0.1", scene.port)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        // It may be closed before all is sent.
        let _ = socket.write_all(bytes);
        socket
    });
    for mut socket in replayed.collect::<Vec<_>>() {
        // It is closed by the other end.
        let mut rest = Vec::new();
        let ended = socket.read_to_end(&mut rest);
        assert!(!matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock));
    }
    let status = scene.destination.attached.client.status().unwrap();
    assert_eq!(
        (status.phase, status.error_text(), status.counters.remaining_pages),
        (Phase::PostcopyPaused, paused.error_text(), paused.counters.remaining_pages)
    );
    scene.assert_recovers(outgoing);
}
