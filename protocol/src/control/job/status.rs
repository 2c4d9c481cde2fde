// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kind, the phase and the status of a job.

use super::fields::flag;
use super::{Counters, MAX_SENTENCE, Placing, RunState};
use crate::control::Trackers;
use crate::control::codec::{DecodeError, Decoder, Encoder, truncate_text};

/// The kind of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum JobKind {
    /// No job was started yet.
    #[default]
    None = 0,
    /// An outgoing migration.
    Outgoing = 1,
    /// An incoming migration.
    Incoming = 2,
    /// A snapshot into an image.
    Snapshot = 3,
    /// A restore from an image.
    Restore = 4,
}

impl JobKind {
    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Outgoing => "outgoing",
            Self::Incoming => "incoming",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
        }
    }

    fn from_wire(value: u32) -> Result<Self, DecodeError> {
        [Self::None, Self::Outgoing, Self::Incoming, Self::Snapshot, Self::Restore]
            .into_iter()
            .find(|kind| *kind as u32 == value)
            .ok_or(DecodeError::InvalidValue {
                field: "kind",
                value: value.into(),
                allowed: "0 none, 1 outgoing, 2 incoming, 3 snapshot, 4 restore",
            })
    }
}

/// The phase of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(u32)]
pub enum Phase {
    /// No job was started yet.
    #[default]
    Idle = 0,
    /// Outgoing: connecting. Incoming: waiting for the source.
    Connecting = 1,
    /// Outgoing: announcing the blocks to the peer. Incoming: checking them, and making holes.
    Preparing = 2,
    /// Outgoing: starting the trackers, and clearing discarded pages.
    Tracking = 3,
    /// Passes over the memory of a running guest.
    Passes = 4,
    /// Outgoing: the guest is being paused, or is paused for the last pass.
    Stopping = 5,
    /// The destination loads the VMM's state.
    Loading = 6,
    /// Outgoing: the guest is being relinquished. Incoming: waiting for the commit.
    Committing = 7,
    /// The guest runs at the destination, and its memory follows.
    Postcopy = 8,
    /// The same, but a connection was lost. Faults wait at the destination until the migration is
    /// recovered. The error says what happened.
    PostcopyPaused = 9,
    /// A paused postcopy is being connected again.
    Recovering = 10,
    /// Snapshot: the memory of the running guest is being protected against writes.
    Protecting = 11,
    /// Snapshot: pages are being written to the image.
    Saving = 12,
    /// Restore: pages are being read from the image, and the guest does not run yet.
    Restoring = 13,
    /// Restore: the guest runs, and its memory follows from the image.
    Prefetching = 14,
    /// The job succeeded. Migration: the destination has everything and runs the guest.
    Completed = 15,
    /// The job failed. An outgoing guest continues at the source, unless it was in postcopy.
    Failed = 16,
    /// The job was cancelled. An outgoing guest continues at the source.
    Cancelled = 17,
    /// Outgoing: the commit was sent, and the link died before the destination confirmed. The guest
    /// is paused here. Only an operator can find out whether it runs there.
    Unconfirmed = 18,
}

impl Phase {
    /// All phases with the names that users see.
    pub const ALL: [(Phase, &'static str); 19] = [
        (Phase::Idle, "idle"),
        (Phase::Connecting, "connecting"),
        (Phase::Preparing, "preparing"),
        (Phase::Tracking, "tracking"),
        (Phase::Passes, "passes"),
        (Phase::Stopping, "stopping"),
        (Phase::Loading, "loading"),
        (Phase::Committing, "committing"),
        (Phase::Postcopy, "postcopy"),
        (Phase::PostcopyPaused, "postcopy-paused"),
        (Phase::Recovering, "recovering"),
        (Phase::Protecting, "protecting"),
        (Phase::Saving, "saving"),
        (Phase::Restoring, "restoring"),
        (Phase::Prefetching, "prefetching"),
        (Phase::Completed, "completed"),
        (Phase::Failed, "failed"),
        (Phase::Cancelled, "cancelled"),
        (Phase::Unconfirmed, "unconfirmed"),
    ];

    /// The name that users see.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(phase, _)| *phase == self).map_or("", |(_, name)| name)
    }

    /// True if nothing more will happen.
    pub fn is_final(self) -> bool {
        self == Self::Idle || self >= Self::Completed
    }

    /// True if the guest runs at the destination, as far as is known, and some of its memory is
    /// still missing.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::PostcopyPaused | Self::Recovering)
    }

    fn from_wire(value: u32) -> Result<Self, DecodeError> {
        Self::ALL.iter().map(|(phase, _)| *phase).find(|phase| *phase as u32 == value).ok_or(
            DecodeError::InvalidValue { field: "phase", value: value.into(), allowed: "0 to 18" },
        )
    }
}

/// The status of a job.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobStatus {
    /// Number of the job, counted from 1; 0 if there was none.
    pub job: u64,
    /// The kind of the job.
    pub kind: JobKind,
    /// The phase of the job.
    pub phase: Phase,
    /// The run state of the guest at its destination or in the image; `None` until it is known.
    pub guest: Option<RunState>,
    /// Incoming: the commit of the source has arrived, so the guest belongs to this VMM, however
    /// the job ends: also if its resume failed, or its memory was lost later.
    pub arrived: bool,
    /// The trackers that the VMM has declared; the empty set if it has declared none.
    pub trackers: Trackers,
    /// The counters.
    pub counters: Counters,
    /// How the job places pages.
    pub placing: Placing,
    /// Why it does not place them better. `None` if it does what it can.
    pub placing_reason: Option<String>,
    /// Why the job failed or is paused. While it runs: what an operator should know, such as why a
    /// waiting incoming migration refused a source, or what a guest in postcopy waits for. After it
    /// completed: a warning about something else that failed. `None` if there is nothing to say.
    /// On the wire that is the empty text, so an empty sentence arrives as `None`.
    pub error: Option<String>,
}

impl JobStatus {
    /// The sentence of [`error`](Self::error), or an empty text if there is nothing to say.
    pub fn error_text(&self) -> &str {
        self.error.as_deref().unwrap_or_default()
    }

    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        // Zero while it is not known.
        let guest = self.guest.map_or(0, |guest| guest as u32 + 1);
        let encoder = encoder.u64(self.job).u32(self.kind as u32).u32(self.phase as u32).u32(guest);
        let encoder = encoder.u16(self.arrived.into()).u32(self.trackers.bits());
        let encoder = self.counters.encode(encoder).u16(self.placing as u16);
        let reason = self.placing_reason.as_deref().unwrap_or_default();
        encoder
            .text(truncate_text(reason, MAX_SENTENCE))
            .text(truncate_text(self.error_text(), MAX_SENTENCE))
    }

    /// Reads the fields from a body.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            job: decoder.u64("job")?,
            kind: JobKind::from_wire(decoder.u32("kind")?)?,
            phase: Phase::from_wire(decoder.u32("phase")?)?,
            guest: decode_guest(decoder)?,
            arrived: flag(decoder, "arrived")?,
            trackers: Trackers::from_wire("trackers", decoder.u32("trackers")?)?,
            counters: Counters::decode(decoder)?,
            placing: Placing::from_wire(decoder.u16("placing")?)?,
            placing_reason: decode_sentence(decoder.text("placing_reason", MAX_SENTENCE)?),
            error: decode_sentence(decoder.text("error", MAX_SENTENCE)?),
        })
    }
}

/// The empty text says nothing.
fn decode_sentence(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn decode_guest(decoder: &mut Decoder<'_>) -> Result<Option<RunState>, DecodeError> {
    let value = decoder.u32("guest")?;
    match value.checked_sub(1).map(RunState::from_wire) {
        None => Ok(None),
        Some(Some(guest)) => Ok(Some(guest)),
        Some(None) => {
            let allowed = "0 not known, 1 running, 2 paused";
            Err(DecodeError::InvalidValue { field: "guest", value: value.into(), allowed })
        }
    }
}
