// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hooks: requests of the agent to the VMM, on the socket that the VMM hands over with
//! `VHOST_USER_SET_BACKEND_REQ_FD`.
//!
//! Every body begins with a sequence number, which the answer repeats. So the agent can tell an
//! answer that comes after its deadline from the answer that it waits for. The VMM answers in the
//! order of the requests.

use super::Trackers;
use super::codec::{DecodeError, Decoder, Encoder};
use super::job::{JobStatus, MAX_ADDRESS};
use super::journal::{decode_journal, encode_journal};
use super::state_pieces::{PieceSize, decode_pieces, encode_pieces};
use std::fmt;

/// Hook codes.
pub mod code {
    #![allow(missing_docs)]
    pub const PAUSE: u32 = 0x2000;
    pub const RESUME: u32 = 0x2001;
    pub const START_TRACKING: u32 = 0x2002;
    pub const STOP_TRACKING: u32 = 0x2003;
    pub const SYNC_TRACKER: u32 = 0x2004;
    pub const CLEAR_TRACKER: u32 = 0x2005;
    pub const THROTTLE: u32 = 0x2006;
    pub const SAVE_STATE: u32 = 0x2007;
    pub const LOAD_STATE: u32 = 0x2008;
    pub const RELINQUISH: u32 = 0x2009;
    pub const EVENT: u32 = 0x200a;
    pub const REGISTER_FAULTS: u32 = 0x200b;
    pub const UNREGISTER_FAULTS: u32 = 0x200c;
    pub const WATCH_WRITES: u32 = 0x200d;
    pub const UNWATCH_WRITES: u32 = 0x200e;
    pub const ACCEPT_GUEST: u32 = 0x200f;
    pub const PROBE_FAULTS: u32 = 0x2010;
    pub const EXPECT_GUEST: u32 = 0x2011;
    pub const CHECK_GUEST: u32 = 0x2012;
    pub const KEEP_JOURNAL: u32 = 0x2013;
    pub const MEMORY_ARRIVED: u32 = 0x2014;
}

/// Largest number of pages in one [`Hook::ClearTracker`]: 1 GiB, 32 KiB of bitmap.
pub const MAX_CLEAR_PAGES: u64 = 1 << 18;
/// A request of the agent to the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    /// Pause the guest and everything that writes its memory.
    Pause,
    /// The guest is ours. A guest that never left returns to its run state before the pause: it
    /// runs, unless its operator had paused it. A guest that a job has brought runs, unless
    /// `paused` says otherwise.
    Resume {
        /// An operator forces it although the guest was given up
        /// ([`one-owner`](crate::invariants#one-owner)).
        force: bool,
        /// A guest that a job has brought stays paused. Says nothing about a guest that never left:
        /// its VMM knows the run state.
        paused: bool,
    },
    /// Start these trackers: the VMM's own one (KVM's dirty log), or the registration of its
    /// mappings for write-protect scanning. A job on the dirty log alone also asks, before it reads
    /// memory: the VMM then gives back what it has queued, and there is nothing to start.
    StartTracking {
        /// [`Trackers::HOOKS`], [`Trackers::WRITE_PROTECT`], or both; or
        /// [`Trackers::LOG_IS_COMPLETE`] alone.
        sources: Trackers,
    },
    /// Stop these trackers.
    StopTracking {
        /// [`Trackers::HOOKS`], [`Trackers::WRITE_PROTECT`], or both.
        sources: Trackers,
    },
    /// Mark all pages that the VMM's tracker reports as dirty in the shared log.
    SyncTracker,
    /// Clear these pages in the VMM's tracker, so that their next write is reported.
    ClearTracker {
        /// The block.
        block: u32,
        /// First page within the block; a multiple of 64.
        first: u64,
        /// One bit per page from `first`: the pages to clear.
        bitmap: Vec<u64>,
    },
    /// Throttle the guest by this percentage of its time.
    Throttle {
        /// 0 to 99.
        percent: u32,
    },
    /// Save the state of the VMM and its devices. Answered by a
    /// [`SavedState`](super::hook_reply::SavedState) and a file as the descriptor.
    SaveState,
    /// Load the state. A file comes as the descriptor.
    LoadState {
        /// The pieces in the file.
        pieces: Vec<PieceSize>,
    },
    /// The agent is about to give the guest up. From the answer on, the VMM must not resume the
    /// guest by itself, even if it loses the agent ([`one-owner`](crate::invariants#one-owner)).
    Relinquish {
        /// Lets another agent recover a postcopy that this one leaves behind; zeroes if there will
        /// be none.
        session: [u8; 16],
        /// Pages are freed here as they arrive at the destination, so a later agent cannot take the
        /// memory here for complete.
        release: bool,
    },
    /// All memory of the guest that was given up is at the destination, which hears next that this
    /// VMM knows it. From then on nobody there answers a recovery. So an agent that is lost between
    /// the two leaves no VMM that recovers for ever.
    MemoryArrived,
    /// Can the mappings of all blocks be registered for missing pages? Asked before a guest is
    /// accepted that may run before its memory is here, and before memory is given up for it.
    /// Nothing stays registered.
    ProbeFaults,
    /// The guest is about to run before its memory is here: register the mappings of all blocks for
    /// missing pages. Answered by the userfaultfd as the descriptor.
    RegisterFaults,
    /// Keep this, for the agent that continues if this one is lost while memory is missing. Only
    /// with [`FEATURE_OWED`](super::request::FEATURE_OWED), after [`Hook::RegisterFaults`]: from
    /// now on the bitmaps of owed pages say what is missing.
    KeepJournal {
        /// How it continues: see [`Journal`](super::journal::Journal).
        journal: Vec<u8>,
    },
    /// The memory is all here, or the rest never arrives: unregister the mappings.
    UnregisterFaults {
        /// All memory is here. If not, missing pages must not be taken for zero, and the guest must
        /// not run.
        complete: bool,
    },
    /// A snapshot is about to protect memory against writes: register the mappings of all blocks
    /// for write protection. Answered by the userfaultfd as the descriptor.
    WatchWrites,
    /// The snapshot needs no protection any more: unregister the mappings.
    UnwatchWrites,
    /// An operator wants the agent to wait for a guest: would this VMM accept one? Asked before the
    /// wait begins. Nothing changes: [`Hook::AcceptGuest`] follows when a source is here.
    ExpectGuest {
        /// Where the guest would come from.
        origin: GuestOrigin,
    },
    /// An operator wants to migrate or save the guest: does this VMM have one? Nothing changes.
    CheckGuest,
    /// An operator wants to bring another guest here: may the memory of this VMM be filled, and
    /// its guest, if it has one, be given up?
    AcceptGuest {
        /// Where the other guest comes from.
        origin: GuestOrigin,
    },
    /// The status of a job. Not answered.
    Event {
        /// The status.
        status: Box<JobStatus>,
    },
}

/// Where a guest comes from that an operator wants to bring into a VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestOrigin {
    /// It is restored from an image.
    Image {
        /// Absolute path of the image.
        path: String,
    },
    /// It migrates here.
    Migration {
        /// Address at which the agent listens for it.
        address: String,
    },
}

impl GuestOrigin {
    fn encode(&self, encoder: Encoder) -> Encoder {
        match self {
            Self::Image { path } => encoder.u32(0).text(path),
            Self::Migration { address } => encoder.u32(1).text(address),
        }
    }

    fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let kind = decoder.u32("kind")?;
        let text = decoder.text("origin", MAX_ADDRESS)?.to_owned();
        match kind {
            0 => Ok(Self::Image { path: text }),
            1 => Ok(Self::Migration { address: text }),
            _ => {
                let (value, allowed) = (kind.into(), "0 image, 1 migration");
                Err(DecodeError::InvalidValue { field: "kind", value, allowed })
            }
        }
    }
}

impl fmt::Display for GuestOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image { path } => write!(f, "the image {path}"),
            Self::Migration { address } => write!(f, "a migration at {address}"),
        }
    }
}

impl Hook {
    /// The hook's code.
    pub fn code(&self) -> u32 {
        match self {
            Self::Pause => code::PAUSE,
            Self::Resume { .. } => code::RESUME,
            Self::StartTracking { .. } => code::START_TRACKING,
            Self::StopTracking { .. } => code::STOP_TRACKING,
            Self::SyncTracker => code::SYNC_TRACKER,
            Self::ClearTracker { .. } => code::CLEAR_TRACKER,
            Self::Throttle { .. } => code::THROTTLE,
            Self::SaveState => code::SAVE_STATE,
            Self::LoadState { .. } => code::LOAD_STATE,
            Self::Relinquish { .. } => code::RELINQUISH,
            Self::MemoryArrived => code::MEMORY_ARRIVED,
            Self::ProbeFaults => code::PROBE_FAULTS,
            Self::RegisterFaults => code::REGISTER_FAULTS,
            Self::KeepJournal { .. } => code::KEEP_JOURNAL,
            Self::UnregisterFaults { .. } => code::UNREGISTER_FAULTS,
            Self::WatchWrites => code::WATCH_WRITES,
            Self::UnwatchWrites => code::UNWATCH_WRITES,
            Self::ExpectGuest { .. } => code::EXPECT_GUEST,
            Self::CheckGuest => code::CHECK_GUEST,
            Self::AcceptGuest { .. } => code::ACCEPT_GUEST,
            Self::Event { .. } => code::EVENT,
        }
    }

    /// The name of the hook, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume { .. } => "resume",
            Self::StartTracking { .. } => "start tracking",
            Self::StopTracking { .. } => "stop tracking",
            Self::SyncTracker => "sync tracker",
            Self::ClearTracker { .. } => "clear tracker",
            Self::Throttle { .. } => "throttle",
            Self::SaveState => "save state",
            Self::LoadState { .. } => "load state",
            Self::Relinquish { .. } => "relinquish",
            Self::MemoryArrived => "memory arrived",
            Self::ProbeFaults => "probe faults",
            Self::RegisterFaults => "register faults",
            Self::KeepJournal { .. } => "keep journal",
            Self::UnregisterFaults { .. } => "unregister faults",
            Self::WatchWrites => "watch writes",
            Self::UnwatchWrites => "unwatch writes",
            Self::ExpectGuest { .. } => "expect guest",
            Self::CheckGuest => "check guest",
            Self::AcceptGuest { .. } => "accept guest",
            Self::Event { .. } => "event",
        }
    }

    /// The hook's body.
    pub fn encode(&self, sequence: u64) -> Vec<u8> {
        let encoder = Encoder::new().u64(sequence);
        match self {
            Self::Resume { force, paused } => {
                encoder.u32(u32::from(*force)).u32(u32::from(*paused))
            }
            Self::ClearTracker { block, first, bitmap } => {
                let encoder = encoder.u32(*block).u32(bitmap.len() as u32).u64(*first);
                bitmap.iter().fold(encoder, |encoder, word| encoder.u64(*word))
            }
            Self::StartTracking { sources } | Self::StopTracking { sources } => {
                encoder.u32(sources.bits())
            }
            Self::Throttle { percent } => encoder.u32(*percent),
            Self::LoadState { pieces } => encode_pieces(pieces, encoder),
            Self::Event { status } => status.encode(encoder),
            Self::Relinquish { session, release } => {
                encoder.bytes(session).u32(u32::from(*release))
            }
            Self::KeepJournal { journal } => encode_journal(encoder, journal),
            Self::UnregisterFaults { complete } => encoder.u32(u32::from(*complete)),
            Self::ExpectGuest { origin } | Self::AcceptGuest { origin } => origin.encode(encoder),
            _ => encoder,
        }
        .finish()
    }

    /// Decodes a hook and its sequence number; `None` if the code is unknown.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(hook: u32, body: &[u8]) -> Option<Result<(u64, Self), DecodeError>> {
        let mut decoder = Decoder::new(body);
        let decoded = match decoder.u64("sequence") {
            Ok(sequence) => Self::decode_fields(hook, &mut decoder)?.map(|hook| (sequence, hook)),
            Err(error) => Err(error),
        };
        Some(decoded.and_then(|decoded| decoder.finish().map(|()| decoded)))
    }

    fn decode_fields(hook: u32, decoder: &mut Decoder<'_>) -> Option<Result<Self, DecodeError>> {
        Some(match hook {
            code::PAUSE => Ok(Self::Pause),
            code::RESUME => decode_resume(decoder),
            code::START_TRACKING => {
                decode_started(decoder).map(|sources| Self::StartTracking { sources })
            }
            code::STOP_TRACKING => {
                decode_stopped(decoder).map(|sources| Self::StopTracking { sources })
            }
            code::SYNC_TRACKER => Ok(Self::SyncTracker),
            code::CLEAR_TRACKER => decode_clear(decoder),
            code::THROTTLE => match decoder.u32("percent") {
                Ok(percent @ 0..=99) => Ok(Self::Throttle { percent }),
                Ok(value) => Err(DecodeError::InvalidValue {
                    field: "percent",
                    value: value.into(),
                    allowed: "0 to 99",
                }),
                Err(error) => Err(error),
            },
            code::SAVE_STATE => Ok(Self::SaveState),
            code::LOAD_STATE => decode_pieces(decoder).map(|pieces| Self::LoadState { pieces }),
            code::RELINQUISH => decode_relinquish(decoder),
            code::MEMORY_ARRIVED => Ok(Self::MemoryArrived),
            code::PROBE_FAULTS => Ok(Self::ProbeFaults),
            code::REGISTER_FAULTS => Ok(Self::RegisterFaults),
            code::KEEP_JOURNAL => {
                decode_journal(decoder).map(|journal| Self::KeepJournal { journal })
            }
            code::UNREGISTER_FAULTS => {
                decode_flag(decoder, "complete").map(|complete| Self::UnregisterFaults { complete })
            }
            code::WATCH_WRITES => Ok(Self::WatchWrites),
            code::UNWATCH_WRITES => Ok(Self::UnwatchWrites),
            code::EXPECT_GUEST => {
                GuestOrigin::decode(decoder).map(|origin| Self::ExpectGuest { origin })
            }
            code::CHECK_GUEST => Ok(Self::CheckGuest),
            code::ACCEPT_GUEST => {
                GuestOrigin::decode(decoder).map(|origin| Self::AcceptGuest { origin })
            }
            code::EVENT => {
                JobStatus::decode(decoder).map(|status| Self::Event { status: Box::new(status) })
            }
            _ => return None,
        })
    }
}

fn decode_relinquish(decoder: &mut Decoder<'_>) -> Result<Hook, DecodeError> {
    let session = decoder.array("session")?;
    Ok(Hook::Relinquish { session, release: decode_flag(decoder, "release")? })
}

fn decode_resume(decoder: &mut Decoder<'_>) -> Result<Hook, DecodeError> {
    let force = decode_flag(decoder, "force")?;
    Ok(Hook::Resume { force, paused: decode_flag(decoder, "paused")? })
}

fn decode_flag(decoder: &mut Decoder<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match decoder.u32(field)? {
        value @ 0..=1 => Ok(value == 1),
        value => Err(DecodeError::InvalidValue { field, value: value.into(), allowed: "0 or 1" }),
    }
}

/// The trackers that can be started: at least one, or the dirty log alone.
fn decode_started(decoder: &mut Decoder<'_>) -> Result<Trackers, DecodeError> {
    const LOG: u32 = Trackers::LOG_IS_COMPLETE.bits();
    let allowed = "bit 0, hooks, bit 1, write-protect, or both, or bit 2, log-is-complete, alone";
    decode_sources(decoder, |value| value == LOG || is_startable(value), allowed)
}

/// The trackers that can be stopped: at least one, and not a writer that marks the log.
fn decode_stopped(decoder: &mut Decoder<'_>) -> Result<Trackers, DecodeError> {
    decode_sources(decoder, is_startable, "bit 0, hooks, bit 1, write-protect, or both")
}

fn is_startable(value: u32) -> bool {
    const STARTABLE: u32 = Trackers::HOOKS.bits() | Trackers::WRITE_PROTECT.bits();
    value != 0 && value & !STARTABLE == 0
}

fn decode_sources(
    decoder: &mut Decoder<'_>, is_allowed: impl Fn(u32) -> bool, allowed: &'static str,
) -> Result<Trackers, DecodeError> {
    match decoder.u32("sources")? {
        value if is_allowed(value) => Trackers::from_wire("sources", value),
        value => {
            let (field, value) = ("sources", value.into());
            Err(DecodeError::InvalidValue { field, value, allowed })
        }
    }
}

fn decode_clear(decoder: &mut Decoder<'_>) -> Result<Hook, DecodeError> {
    let block = decoder.u32("block")?;
    let words = decoder.u32("words")?;
    let first = decoder.u64("first")?;
    if u64::from(words) * 64 > MAX_CLEAR_PAGES {
        return Err(DecodeError::InvalidValue {
            field: "words",
            value: words.into(),
            allowed: "at most 4096",
        });
    }
    if first % 64 != 0 {
        return Err(DecodeError::InvalidValue {
            field: "first",
            value: first,
            allowed: "multiples of 64",
        });
    }
    let bytes = decoder.bytes("bitmap", words as usize * 8)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(Hook::ClearTracker {
        block,
        first,
        bitmap: words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_and_bitmaps_are_limited_before_anything_is_allocated() {
        let words = Encoder::new().u64(1).u32(0).u32(u32::MAX).u64(0).finish();
        assert!(matches!(
            Hook::decode(code::CLEAR_TRACKER, &words).unwrap(),
            Err(DecodeError::InvalidValue { field: "words", .. })
        ));
        let pieces = Encoder::new().u64(1).u32(1).u64(u64::MAX).text("x").finish();
        assert!(matches!(
            Hook::decode(code::LOAD_STATE, &pieces).unwrap(),
            Err(DecodeError::InvalidValue { field: "length of a piece", .. })
        ));
    }

    #[test]
    fn only_trackers_that_can_be_started_are_started_and_stopped() {
        for code in [code::START_TRACKING, code::STOP_TRACKING] {
            let decode =
                |bits| Hook::decode(code, &Encoder::new().u64(1).u32(bits).finish()).unwrap();
            for bits in 1..=3 {
                assert_eq!(decode(bits).unwrap().1.encode(1)[8..], bits.to_le_bytes());
            }
            let log = Trackers::LOG_IS_COMPLETE.bits();
            for value in [0, log | Trackers::HOOKS.bits(), 1 << 3, u32::MAX] {
                let refused = decode(value).unwrap_err().to_string();
                let expected = format!("sources is {value:#x}, allowed: bit 0, hooks, ");
                assert!(refused.starts_with(&expected), "{refused}");
            }
            assert_eq!(decode(log).is_ok(), code == code::START_TRACKING);
        }
    }

    #[test]
    fn what_is_yes_or_no_is_nothing_else() {
        let body = |before: &[u8]| Encoder::new().u64(1).bytes(before).u32(2).finish();
        for (code, before, field) in [
            (code::RESUME, &[][..], "force"),
            (code::RESUME, &[1, 0, 0, 0], "paused"),
            (code::UNREGISTER_FAULTS, &[], "complete"),
            (code::RELINQUISH, &[7; 16], "release"),
        ] {
            let refused = Hook::decode(code, &body(before)).unwrap().unwrap_err();
            assert_eq!(refused, DecodeError::InvalidValue { field, value: 2, allowed: "0 or 1" });
        }
    }
}
