// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration between two scripted VMMs, with a relay between their agents.

use pageferry_client::{IncomingOptions, JobStatus, OutgoingOptions, Phase, Punch};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_tests::scenario::{Passing, Ram, Relay, Side, Wire};

pub const PAGES: u64 = 200;

/// Memory whose page `n` holds the stamp `1000 + n`.
pub fn stamped() -> Ram {
    Ram::odd(PAGES).stamped()
}

/// A VMM with such memory.
pub fn filled() -> Side {
    Side::new(stamped())
}

/// A VMM whose memory is one hole.
pub fn empty() -> Side {
    Side::new(Ram::odd(PAGES))
}

/// Two VMMs with a relay between their agents.
pub struct Scene {
    pub relay: Relay,
    pub source: Side,
    pub(super) destination: Option<Side>,
    /// The jobs, after the start.
    pub outgoing: u64,
    pub incoming: u64,
}

impl Scene {
    /// A scene between these two, not started yet.
    pub fn between(wire: Wire, source: Side, destination: Side) -> Self {
        let (relay, destination) = (Relay::over(wire), Some(destination));
        Self { relay, source, destination, outgoing: 0, incoming: 0 }
    }

    /// The source is [`filled`], and the destination [`empty`].
    pub fn new() -> Self {
        Self::between(Wire::Unix, filled(), empty())
    }

    /// A scene in which nothing is allocated on either side.
    pub fn empty(pages: u64) -> Self {
        let [source, destination] = [(), ()].map(|()| Side::new(Ram::odd(pages)));
        Self::between(Wire::Unix, source, destination)
    }

    /// Like [`Scene::new`], and starts the migration.
    pub fn started(wire: Wire, options: &OutgoingOptions) -> Self {
        Self::started_between(wire, filled(), empty(), options)
    }

    /// Like [`Scene::started`], between these two.
    pub fn started_between(
        wire: Wire, source: Side, destination: Side, options: &OutgoingOptions,
    ) -> Self {
        let mut scene = Self::between(wire, source, destination);
        scene.start(options);
        scene
    }

    /// Starts the migration. Both sides have the timeouts of `options`.
    pub fn start(&mut self, options: &OutgoingOptions) {
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = *options;
        let incoming = IncomingOptions { peer_timeout, hook_timeout, ..IncomingOptions::default() };
        self.incoming = self.relay.listen(&self.destination.as_ref().unwrap().client, &incoming);
        self.outgoing = self.relay.send(&self.source.client, options);
    }

    pub fn destination(&self) -> &Side {
        self.destination.as_ref().unwrap()
    }

    /// Passes all records on until the source's job ends.
    pub fn end(&mut self) -> JobStatus {
        self.relay.finish(&self.source.client, self.outgoing)
    }

    /// Passes records on until `pass` has arrived at the destination and the source does not know
    /// that yet. Then runs `what`.
    pub fn after_pass(&mut self, pass: u64, what: impl FnOnce(&Side)) {
        let record = self.relay.until(|record| record.is(Kind::PassDone, pass));
        what(&self.source);
        self.relay.pass(record);
    }

    /// Checks that the migration succeeds. Returns the final status of the source's job.
    pub fn finish(&mut self) -> JobStatus {
        let status = self.end();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        let there = self.destination().wait(self.incoming);
        assert_eq!(there.phase, Phase::Completed, "{}", there.error_text());
        status
    }

    pub fn discard(&self, first: u64, count: u64, punch: Punch) {
        discard(&self.source, first, count, punch);
    }

    pub fn carried(&self, page: u64) -> Vec<&Passing> {
        self.relay.seen.iter().filter(|record| record.carries(page)).collect()
    }

    /// Checks that the pages are discarded holes at the destination.
    #[track_caller]
    pub fn assert_discarded(&self, pages: std::ops::Range<u64>) {
        let bitmap = self.destination().client.discarded(self.destination().ram.id).unwrap();
        for page in pages {
            assert!(bitmap.contains(page), "page {page} is not discarded at the destination");
            assert!(
                self.destination().ram.is_hole(page),
                "page {page} is no hole at the destination"
            );
        }
    }

    /// Checks that the pages hold their first content, and are not discarded.
    #[track_caller]
    pub fn assert_untouched(&self, pages: impl Iterator<Item = u64>) {
        let bitmap = self.destination().client.discarded(self.destination().ram.id).unwrap();
        for page in pages {
            assert_eq!(self.destination().ram.stamp(page), 1000 + page, "page {page}");
            assert!(!bitmap.contains(page), "page {page} is discarded at the destination");
        }
    }
}

pub fn discard(side: &Side, first: u64, count: u64, punch: Punch) {
    side.client.discard(&[side.ram.range(first, count)], punch).unwrap();
}

pub fn populate(side: &Side, first: u64, count: u64) {
    side.client.populate(&[side.ram.range(first, count)]).unwrap();
}

/// True if the payload of the record has this stamp at the start of a page.
pub fn has_stamp(record: &Passing, stamp: u64) -> bool {
    record.kind == Kind::Data
        && record.payload.chunks(PAGE_SIZE as usize).any(|page| page[..8] == stamp.to_le_bytes())
}

pub fn free(side: &Side, first: u64, count: u64) {
    assert_eq!(side.client.free(&[side.ram.range(first, count)]).unwrap(), count);
}

/// Checks pages that were freed and not written since: they were never sent, and are holes at the
/// destination, but not discarded.
#[track_caller]
pub fn assert_freed(scene: &Scene, pages: std::ops::Range<u64>) {
    let bitmap = scene.destination().client.discarded(scene.destination().ram.id).unwrap();
    for page in pages {
        assert!(
            scene.destination().ram.is_hole(page) && scene.source.ram.is_hole(page),
            "page {page} is no hole"
        );
        assert!(!bitmap.contains(page), "page {page} is discarded at the destination");
    }
}
