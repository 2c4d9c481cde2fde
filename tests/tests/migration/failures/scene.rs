// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The moments at which a migration is interrupted, and what must hold after that.

use crate::scene::{PAGES, Scene, filled};
use pageferry_client::{IncomingOptions, JobStatus, OutgoingOptions, Ownership, Phase};
use pageferry_protocol::stream::Kind;
use pageferry_tests::scenario::{
    Agent, Attached, Passing, Ram, Relay, Side, TooEarly, WIRES, Wire, moves_to,
};

/// Writes the stamps of [`stamped`](super::super::scene::stamped).
pub fn stamp(ram: &Ram) {
    for page in 0..PAGES {
        ram.write(page, 1000 + page);
    }
}

impl Scene {
    /// Passes records on until one is wanted. Returns that one without passing it on.
    pub fn reach(&mut self, wanted: impl FnMut(&Passing) -> bool) -> Result<Passing, TooEarly> {
        let source = &self.source;
        reach(&mut self.relay, source, wanted)
    }

    /// Drops the destination's VMM and agent.
    pub fn kill_destination(&mut self) {
        self.relay.reset();
        drop(self.destination.take());
    }

    /// Checks that the source's job failed, and that its guest runs.
    pub fn assert_source_failed(&self) -> JobStatus {
        let status = self.source.wait(self.outgoing);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        assert!(status.error.is_some());
        assert!(!self.source.vmm.is_paused(), "the guest is paused");
        assert_eq!(self.source.client.ownership(), Ownership::Ours);
        status
    }

    /// Checks that the destination's job failed, and that nothing runs there.
    pub fn assert_destination_failed(&self) -> JobStatus {
        let status = self.destination().wait(self.incoming);
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        assert!(status.error.is_some() && !status.arrived, "{status:?}");
        assert_eq!(self.destination().vmm.resumes(), 0);
        assert_ne!(self.destination().client.ownership(), Ownership::Ours);
        status
    }

    /// Checks that these two sides can migrate without the relay.
    pub fn assert_both_migrate_next_time(&self) {
        moves_to(&self.source, self.destination());
    }
}

pub type Moment = (&'static str, fn(&Passing) -> bool);

/// Records at which a migration is interrupted, one for each phase. The record itself is not
/// delivered.
pub const MOMENTS: [Moment; 11] = [
    ("before the hello", |record| record.kind == Kind::Hello),
    ("before the accept", |record| record.kind == Kind::Accept),
    ("at the start of pass 0", |record| record.kind == Kind::Data),
    ("in pass 0", |record| record.carries(PAGES - 1)),
    ("at the end of pass 0", |record| record.is(Kind::PassEnd, 0) && record.to_destination),
    ("between the passes", |record| record.is(Kind::PassDone, 0)),
    ("after the state", |record| record.kind == Kind::State),
    ("at the end of the last pass", |record| record.is(Kind::PassDone, 2)),
    ("before the end", |record| record.kind == Kind::End),
    ("before loaded", |record| record.kind == Kind::Loaded),
    ("in the last pass", |record| record.is(Kind::PassEnd, 2)),
];

/// A migration through a relay to an agent process.
pub struct FarScene {
    pub relay: Relay,
    pub source: Side,
    pub there: Attached,
    pub agent: Agent,
    pub outgoing: u64,
}

impl FarScene {
    pub fn start(wire: Wire, options: &OutgoingOptions) -> Self {
        let agent = Agent::spawn();
        let there = Attached::new(agent.socket(), Ram::odd(PAGES));
        let (mut relay, source) = (Relay::over(wire), filled());
        relay.listen(&there.client, &IncomingOptions::default());
        let outgoing = relay.send(&source.client, options);
        Self { relay, source, there, agent, outgoing }
    }

    /// Passes all records on until the source's job ends.
    pub fn end(&mut self) -> JobStatus {
        self.relay.finish(&self.source.client, self.outgoing)
    }

    /// As [`Scene::reach`].
    pub fn reach(&mut self, wanted: impl FnMut(&Passing) -> bool) -> Result<Passing, TooEarly> {
        reach(&mut self.relay, &self.source, wanted)
    }
}

fn reach(
    relay: &mut Relay, source: &Attached, wanted: impl FnMut(&Passing) -> bool,
) -> Result<Passing, TooEarly> {
    let over = || source.client.status().unwrap().phase.is_final();
    let record = relay.until_unless(over, wanted);
    record.ok_or_else(|| TooEarly(source.client.status().unwrap().error_text().to_owned()))
}

/// Runs `test` for every moment and over every wire.
pub fn at_every_moment(what: &str, test: impl Fn(Wire, Moment)) {
    for wire in WIRES {
        for moment in MOMENTS {
            eprintln!("{wire:?}: {what} {}", moment.0);
            test(wire, moment);
        }
    }
}
