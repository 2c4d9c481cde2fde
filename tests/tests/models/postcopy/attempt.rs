// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One migration of the model, record by record. Between two records the guest acts, connections
//! are cut, and an operator cancels or recovers.

use super::Plan;
use super::guest::Guest;
use super::sides::{Arrived, Destination, Source};
use super::steps::{discard, free, populate, punch, touch};
use super::wire::{Passing, Relay};
use crate::source::{Page, keep_busy, pages_of, some_pages, step};
use pageferry_client::{Error, IncomingOptions, Mode, Ownership, Phase, Target};
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::control::request::Request;
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_protocol::stream::Kind;
use pageferry_protocol::stream::record::FLAGS_COMPRESSED;
use pageferry_tests::random::Random;
use pageferry_tests::scenario::{RawClient, SOON};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// A bit in the stamps that a VMM writes to memory that its guest gave back.
const OTHERS: u64 = 1 << 63;

/// Longest time for an attempt in which records are sent all the time.
const LONGEST: Duration = Duration::from_secs(300);

/// How an attempt ended.
pub enum Outcome {
    /// The guest is complete at the destination.
    Moved(Box<Moved>),
    /// The guest runs at the source.
    Stayed,
}

/// A guest that has moved.
pub struct Moved {
    pub guest: Guest,
    /// Pages that were missing when the guest moved, and that it did not discard.
    pub placed: BTreeSet<Page>,
}

/// The state of one migration, which the thread that passes the records owns.
struct Attempt<'a> {
    chance: &'a mut Random,
    plan: &'a Plan,
    source: &'a Source,
    destination: &'a Destination,
    relay: Relay,
    guest: Option<Guest>,
    /// Missing pages that the guest did not discard.
    missing: BTreeSet<Page>,
    /// The source has sent the commit.
    committed: bool,
    /// The destination has reported that all memory is there.
    complete: bool,
    /// Number of cuts that are left.
    cuts: u64,
    /// Reasons for which the migration may end before the commit.
    cut: bool,
    cancelled: bool,
}

impl Attempt<'_> {
    /// Passes on a record or a part of it. False if there was none.
    fn pump(&mut self) -> bool {
        self.relay.accept();
        let Some(record) = self.relay.next(self.chance) else { return false };
        // No cut after that: a destination that is complete waits long for a source that does not
        // answer.
        if self.cuts > 0 && !self.complete && self.chance.one_in(40) {
            self.cuts -= 1;
            self.cut = true;
            let length = record.header.payload_length() + pageferry_protocol::stream::RECORD_SIZE;
            let bytes = self.chance.below(length as u64) as usize;
            self.relay.cut(&record, bytes);
            match self.chance.below(3) {
                // In the handshake either side waits long for a stream that it does not read yet,
                // so all are cut.
                _ if self.relay.shakes_hands() => self.relay.cut_all(),
                0 => self.relay.cut_all(),
                1 => self.relay.cut_any(self.chance),
                _ => {}
            }
            return true;
        }
        self.look(&record);
        // One pass in four may find nothing dirty, and end as a precopy.
        if record.kind == Kind::PassDone && !self.committed && !self.chance.one_in(4) {
            keep_busy(self.chance, &self.source.world);
        }
        self.relay.pass(&record);
        true
    }

    fn look(&mut self, record: &Passing) {
        match record.kind {
            Kind::Remaining => self.missing.extend(record.bitmap()),
            Kind::Commit => self.committed = true,
            Kind::Complete if !record.to_destination => self.complete = true,
            Kind::Data if record.header.flags() & FLAGS_COMPRESSED == 0 => {
                self.look_at_data(record)
            }
            _ => {}
        }
    }

    /// `never-read`: memory that the guest gave back, and in which the VMM keeps something else, is
    /// never read before the guest gets it back.
    fn look_at_data(&self, record: &Passing) {
        let model = self.source.world.model.lock().unwrap();
        for (page, bytes) in record.pages().zip(record.payload.chunks(PAGE_SIZE as usize)) {
            let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let guests = model
                .content
                .get(&page)
                .into_iter()
                .chain(model.late.get(&page).into_iter().flatten());
            assert!(
                stamp & OTHERS == 0 || guests.into_iter().any(|own| *own == stamp),
                "discarded page {page:?} was read"
            );
        }
    }

    fn at_source(&mut self) {
        if self.plan.options.mode == Mode::Postcopy && self.chance.one_in(6) {
            return self.reuse();
        }
        step(self.chance, &self.source.world, &self.source.client);
    }

    /// The VMM writes something else to pages that its guest gave back.
    fn reuse(&mut self) {
        let (id, range) = some_pages(self.chance);
        let world = &self.source.world;
        let mut model = world.model.lock().unwrap();
        for page in pages_of(id, range) {
            if model.discarded.contains(&page) {
                let stamp = model.stamp() | OTHERS;
                world.memory.write(page, stamp);
                model.allocated.insert(page);
            }
        }
    }

    /// A step of the guest and its VMM at the destination.
    fn at_destination(&mut self) {
        if self.guest.is_none() {
            if !self.destination.runs() {
                return;
            }
            let model = self.source.world.model.lock().unwrap();
            assert!(model.paused && self.committed, "the destination runs without the commit");
            let (memory, client) = (&self.destination.memory, &self.destination.client);
            let mut guest = Guest::new(&model, self.plan.options.mode, memory, client);
            for (page, found) in self.destination.found.try_iter() {
                guest.device_read(page, found);
                self.relay.settle(page, true);
            }
            self.guest = Some(guest);
        }
        let guest = self.guest.as_mut().unwrap();
        while let Some(page) = guest.done() {
            self.relay.settle(page, true);
        }
        if self.chance.one_in(2) {
            touch(self.chance, guest, &self.source.world);
        }
        match self.chance.below(20) {
            0 => {
                for page in discard(self.chance, guest, self.destination) {
                    self.relay.settle(page, guest.was_touched(page));
                    self.missing.remove(&page);
                }
            }
            1 => populate(self.chance, guest, self.destination),
            2 => punch(self.chance, guest, self.destination),
            3 => {
                for page in free(self.chance, guest, self.destination) {
                    self.relay.settle(page, guest.was_touched(page));
                    self.missing.remove(&page);
                }
            }
            _ => {}
        }
    }

    /// Checks that no cancel is possible after the commit.
    fn check_cancel(&self) {
        for client in [&self.source.client, &self.destination.client] {
            let error = client.cancel().unwrap_err().to_string();
            assert!(
                error.contains("too late to cancel") || error.contains("no job is running"),
                "{error}"
            );
        }
    }

    /// The commit did not reach the destination, whose job has failed. The source stays paused
    /// until its operator, who looked at both sides, resumes it by force.
    fn take_back(&mut self, incoming: u64) {
        let status = self.destination.client.wait(incoming, SOON).unwrap();
        assert_eq!(status.phase, Phase::Failed, "{}", status.error_text());
        assert!(!self.source.runs());
        assert_eq!(self.source.client.ownership(), Ownership::Relinquished);
        let mut operator = RawClient::connect(&self.source.agent.path);
        let deadline = Instant::now() + SOON;
        while let Err(error) = operator.ask(&Request::Resume { force: true }, Vec::new()) {
            // The source may still be busy with an earlier recovery.
            assert!(error.code == ErrorCode::Busy && Instant::now() < deadline, "{error}");
            self.relay.accept();
            self.relay.cut_all();
        }
        assert!(self.source.runs());
    }

    fn run(mut self, incoming: u64, outgoing: u64) -> Outcome {
        let cancel_at = if self.chance.one_in(4) { self.chance.below(300) } else { u64::MAX };
        let started = Instant::now();
        let mut deadline = started + SOON;
        for round in 0.. {
            // On a busy machine an attempt takes long. It is stuck only if no record is sent.
            if self.pump() {
                deadline = started + LONGEST.min(started.elapsed() + SOON);
            }
            if !self.committed && self.chance.one_in(4) {
                self.at_source();
            }
            self.at_destination();
            if round == cancel_at && !self.committed {
                // It may be too late for a cancel. The source decides that.
                self.cancelled = self.source.client.cancel().is_ok();
            }
            if self.guest.is_some() && self.chance.one_in(100) {
                self.check_cancel();
            }
            if self.plan.asks && !self.committed && self.chance.one_in(20) {
                // This fails before the passes and after them.
                let _ = self.source.client.start_postcopy();
            }
            match self.source.phase() {
                Phase::Completed if self.destination.phase().is_final() => break,
                Phase::Completed => {}
                Phase::PostcopyPaused => {
                    assert!(!self.source.runs());
                    // The commit may still have been on its way at an earlier check, so only the
                    // final state of the destination counts.
                    if self.destination.phase().is_final() && !self.destination.runs() {
                        self.take_back(incoming);
                        return Outcome::Stayed;
                    }
                    if self.chance.one_in(4) {
                        match self.source.client.recover(None, &self.plan.options) {
                            // The source has not begun with an earlier recovery yet.
                            Ok(_) | Err(Error::Refused { code: ErrorCode::Busy, .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
                phase if phase.is_final() => break,
                _ => {}
            }
            assert!(
                Instant::now() < deadline,
                "stuck: {:?} {:?}",
                self.source.client.status(),
                self.destination.client.status()
            );
        }
        let status = self.source.client.wait(outgoing, SOON).unwrap();
        if status.phase != Phase::Completed {
            let expected = if self.cancelled { Phase::Cancelled } else { Phase::Failed };
            let there = self.destination.client.status();
            assert!(
                self.cut || self.cancelled,
                "nothing ended it: {status:?}, and the destination {there:?}"
            );
            assert_eq!(
                status.phase,
                expected,
                "{}, and the destination {there:?}",
                status.error_text()
            );
            // The destination's job has failed, unless the source never connected.
            let _ = self.destination.client.cancel();
            self.relay.cut_all();
            self.destination.client.wait(incoming, SOON).unwrap();
            assert!(
                self.source.runs(),
                "what fails before the commit leaves the guest running: {}",
                status.error_text()
            );
            assert!(!self.destination.runs());
            return Outcome::Stayed;
        }
        let status = self.destination.client.wait(incoming, SOON).unwrap();
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
        self.at_destination();
        Outcome::Moved(Box::new(Moved { guest: self.guest.unwrap(), placed: self.missing }))
    }
}

/// Migrates once, while the guest works on either side.
pub fn attempt(
    chance: &mut Random, plan: &Plan, source: &Source, destination: &Destination, folder: &Path,
) -> Outcome {
    let (path, relay_path) = (folder.join("destination"), folder.join("relay"));
    let devices = (0..chance.below(4))
        .map(|_| some_pages(chance))
        .map(|(id, range)| (id, range.first))
        .collect();
    *destination.arrived.lock().unwrap() = Arrived { devices, ..Arrived::default() };
    // Clears the reads of the devices of the last attempt.
    destination.found.try_iter().for_each(drop);
    let connections = plan.options.connections().into();
    let relay = Relay::new(&relay_path, &path, connections);
    let listen = Target::Address(format!("unix:{}", path.display()));
    let incoming =
        destination.client.start_incoming(listen, &IncomingOptions::default()).unwrap().job;
    let target = Target::Address(format!("unix:{}", relay_path.display()));
    let outgoing = source.client.start_outgoing(target, &plan.options).unwrap().job;
    let cuts = if chance.one_in(2) { 1 + chance.below(4) } else { 0 };
    let (missing, guest) = (BTreeSet::new(), None);
    let (committed, complete, cut, cancelled) = (false, false, false, false);
    Attempt {
        chance,
        plan,
        source,
        destination,
        relay,
        guest,
        missing,
        committed,
        complete,
        cuts,
        cut,
        cancelled,
    }
    .run(incoming, outgoing)
}
