// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A postcopy through a relay, in which the guest waits for a page.

use pageferry_client::{
    Client, IncomingOptions, JobStatus, Mode, OutgoingOptions, Ownership, Phase, Punch,
};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::program;
use pageferry_tests::scenario::{
    Agent, Attached, Listening, Passing, Ram, RawClient, Relay, SOON, Touch, Wire, config, lock,
};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

pub const PAGES: u64 = 200;
/// Holes at the source. They are at the end, because a small hole between pages counts as content.
pub const HOLES: std::ops::Range<u64> = 196..PAGES;
/// A page that the source's guest discarded.
pub const DISCARDED: u64 = 60;
/// Pages that a guest waits for.
pub const WANTED: u64 = 170;
pub const WANTED_TOO: u64 = 180;
/// A timeout that a test waits for. It is longer than any delay on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Two streams that push, and one urgent stream.
pub fn postcopy() -> OutgoingOptions {
    OutgoingOptions {
        mode: Mode::Postcopy,
        streams: 2,
        urgent_streams: 1,
        ..OutgoingOptions::default()
    }
}

/// Number of the urgent stream of [`postcopy`].
pub const URGENT: u16 = 2;

pub fn stamp_of(page: u64) -> u64 {
    if HOLES.contains(&page) || page == DISCARDED { 0 } else { 1000 + page }
}

pub fn stamped() -> Ram {
    let ram = empty();
    (0..PAGES).filter(|page| !HOLES.contains(page)).for_each(|page| ram.write(page, 1000 + page));
    ram
}

pub fn empty() -> Ram {
    Ram::odd(PAGES).mapped()
}

/// A VMM and its agent, which outlives it.
pub struct Side {
    pub attached: Option<Attached>,
    pub agent: Agent,
}

impl Side {
    /// A side whose agent is in this process.
    pub fn near(ram: Ram) -> Self {
        Self::on(Agent::Stopped(Listening::start()), ram)
    }

    /// A side whose agent is a process, which can be killed.
    pub fn far(ram: Ram) -> Self {
        Self::on(Agent::spawn(), ram)
    }

    pub fn on(agent: Agent, ram: Ram) -> Self {
        Self { attached: Some(Attached::new(agent.socket(), ram)), agent }
    }

    /// Like [`Side::on`], with this request timeout of the VMM.
    pub fn hasty(agent: Agent, ram: Ram, request_timeout: Duration) -> Self {
        let config = pageferry_client::Config { request_timeout, ..config() };
        let (client, channel) = Client::connect(agent.socket(), config).unwrap();
        Self { attached: Some(Attached::over(client, channel, ram)), agent }
    }

    /// The status of the job, as an operator sees it.
    pub fn seen(&self) -> JobStatus {
        RawClient::connect(self.agent.socket()).status()
    }

    pub fn run(&self, what: &str, more: &[&str]) -> Output {
        run(self.agent.socket(), what, more)
    }

    /// Waits until the job is in this phase, as an operator sees it.
    pub fn reaches(&self, phase: Phase) -> JobStatus {
        let mut operator = RawClient::connect(self.agent.socket());
        let seen = || Some(operator.status()).filter(|status| status.phase == phase);
        wait_for(phase.name(), SOON, seen)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.seen()))
    }

    /// Drops the VMM. Returns its memory.
    pub fn drop_vmm(&mut self) -> Ram {
        let Attached { client, vmm: _vmm, ram } = self.attached.take().unwrap();
        drop(client);
        std::sync::Arc::into_inner(ram).unwrap()
    }
}

impl std::ops::Deref for Side {
    type Target = Attached;

    fn deref(&self) -> &Attached {
        self.attached.as_ref().unwrap()
    }
}

/// An operator's command.
pub fn operator(socket: &Path, what: &str, more: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.arg(what).arg("--socket").arg(socket).args(more).stdin(Stdio::null());
    command
}

/// Runs an operator's command to its end.
pub fn run(socket: &Path, what: &str, more: &[&str]) -> Output {
    operator(socket, what, more).output().unwrap()
}

/// A postcopy through a relay.
pub struct Scene {
    pub relay: Relay,
    pub source: Side,
    pub destination: Side,
    pub outgoing: u64,
    pub incoming: u64,
}

impl Scene {
    pub fn start(wire: Wire, options: &OutgoingOptions) -> Self {
        Self::between(wire, Side::near(stamped()), Side::near(empty()), options)
    }

    pub fn between(wire: Wire, source: Side, destination: Side, options: &OutgoingOptions) -> Self {
        let mut relay = Relay::over(wire);
        source.client.discard(&[source.ram.range(DISCARDED, 1)], Punch::Yes).unwrap();
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = *options;
        let incoming = relay.listen(
            &destination.client,
            &IncomingOptions { peer_timeout, hook_timeout, ..IncomingOptions::default() },
        );
        let outgoing = relay.send(&source.client, options);
        Self { relay, source, destination, outgoing, incoming }
    }

    /// The guest is about to run at the destination, and waits for [`WANTED`]. The relay holds back
    /// the request, and the record that the state is loaded.
    pub fn until_asked(&mut self) -> (Passing, Passing, Touch) {
        let loaded = self.relay.until(|record| record.kind == Kind::Loaded);
        let touch = self.destination.ram.touch(WANTED);
        let request = self.relay.until(|record| record.kind == Kind::Request);
        assert_eq!(request.header.range().first, WANTED);
        (loaded, request, touch)
    }

    /// The guest runs at the destination and waits for [`WANTED`]. Neither the request nor any page
    /// has been passed on.
    pub fn until_runs(&mut self) -> (Passing, Touch) {
        let (loaded, request, touch) = self.until_asked();
        self.relay.pass(loaded);
        let resumed = self.relay.until(|record| record.kind == Kind::Resumed);
        self.relay.pass(resumed);
        assert!(touch.waits());
        (request, touch)
    }

    /// Cuts all connections right after the guest started at the destination. It waits for
    /// [`WANTED`], and both sides pause.
    pub fn until_cut(&mut self) -> Touch {
        let (_request, touch) = self.until_runs();
        self.relay.cut();
        self.assert_paused();
        touch
    }

    /// Passes records on until both sides are paused. Returns their status, the source's first.
    pub fn assert_paused(&mut self) -> (JobStatus, JobStatus) {
        let paused = |side: &Side| {
            let status = side.seen();
            assert!(!status.phase.is_final(), "{status:?}");
            status.phase == Phase::PostcopyPaused
        };
        let (source, destination) = (&self.source, &self.destination);
        self.relay.pump("the pause", || paused(source) && paused(destination));
        let seen = (self.source.seen(), self.destination.seen());
        for status in [&seen.0, &seen.1] {
            assert!(status.error.is_some(), "{status:?}");
        }
        seen
    }

    /// Recovers the source at the same address.
    pub fn recover(&self) {
        self.source.client.recover(None, &OutgoingOptions::default()).unwrap();
    }

    /// Passes records on until both jobs completed, and checks all memory.
    pub fn assert_completes(&mut self) {
        self.assert_completes_but(&[]);
    }

    /// The same, with these pages discarded at the destination.
    pub fn assert_completes_but(&mut self, discarded: &[u64]) {
        let (source, destination) = (&self.source, &self.destination);
        let over = |side: &Side| side.seen().phase.is_final();
        self.relay.pump("the end", || over(source) && over(destination));
        for side in [source, destination] {
            let status = side.seen();
            assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
            assert!(status.error.is_none());
        }
        assert_arrived_but(destination, discarded);
        assert!(source.attached.as_ref().is_none_or(|source| source.vmm.is_paused()));
    }
}

/// Checks that all the guest's memory is here, and that no access waits any more.
pub fn assert_arrived(destination: &Attached) {
    assert_arrived_but(destination, &[]);
}

fn assert_arrived_but(destination: &Attached, discarded: &[u64]) {
    for page in 0..PAGES {
        let stamp = if discarded.contains(&page) { 0 } else { stamp_of(page) };
        assert_eq!(destination.ram.stamp(page), stamp, "page {page}");
    }
    for page in HOLES.chain([DISCARDED]) {
        assert_eq!(destination.ram.touch(page).found().unwrap(), 0);
    }
    assert_eq!(destination.vmm.resumes(), 1);
    assert_eq!(destination.client.ownership(), Ownership::Ours);
    let asked = lock(&destination.vmm.asked);
    assert_eq!((asked.pending, asked.complete), (1, 1));
    assert!(asked.losses.is_empty());
}

/// Checks that the mapping is not registered any more, so that a touch returns at once.
pub fn assert_not_registered(destination: &Attached) {
    destination.ram.touch(WANTED_TOO).found().unwrap();
    let asked = lock(&destination.vmm.asked);
    assert_eq!(asked.pending, asked.complete, "memory is still announced as missing");
}
