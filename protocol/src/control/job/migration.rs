//! What a migration is started with.

use super::fields::{bandwidth, flag, micros, resume, timeout};
use super::{MAX_STREAMS, ResumePolicy};
use crate::control::codec::{DecodeError, Decoder, Encoder};
use std::time::Duration;

/// What to do when the passes do not converge: when after [`OutgoingOptions::max_passes`] passes
/// the rest still does not fit the downtime limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum NonConvergence {
    /// Go on with passes until they do, or the operator changes a limit or cancels.
    KeepGoing = 0,
    /// Ask the VMM to slow the guest down, more with every pass, and go on.
    Throttle = 1,
    /// Stop the guest and send the rest, however long that takes.
    StopAnyway = 2,
    /// Fail; the guest runs on at the source.
    Fail = 3,
    /// Switch to postcopy: the guest runs on at the destination, and its memory follows. Needs
    /// [`Mode::Hybrid`].
    Postcopy = 4,
}

impl NonConvergence {
    /// All policies with the names that users write.
    pub const NAMES: [(&'static str, NonConvergence); 5] = [
        ("keep-going", NonConvergence::KeepGoing),
        ("throttle", NonConvergence::Throttle),
        ("stop", NonConvergence::StopAnyway),
        ("fail", NonConvergence::Fail),
        ("postcopy", NonConvergence::Postcopy),
    ];

    fn from_wire(value: u32) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, policy)| *policy).find(|policy| *policy as u32 == value).ok_or(
            DecodeError::Value {
                field: "policy",
                value: value.into(),
                allowed: "0 keep-going, 1 throttle, 2 stop, 3 fail, 4 postcopy",
            },
        )
    }
}

/// When the guest moves, before its memory or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum Mode {
    /// Its memory first, in passes, and it stands still for the last of them.
    #[default]
    Precopy = 0,
    /// The guest first: it stands still while its state moves, and its memory follows, what it
    /// touches before all.
    Postcopy = 1,
    /// As precopy, until it is told to switch, or has made [`OutgoingOptions::switch_after`]
    /// passes, or does not converge under [`NonConvergence::Postcopy`]; from then on as postcopy.
    Hybrid = 2,
}

impl Mode {
    /// All modes with the names that users write.
    pub const NAMES: [(&'static str, Mode); 3] =
        [("precopy", Mode::Precopy), ("postcopy", Mode::Postcopy), ("hybrid", Mode::Hybrid)];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }

    /// True if the guest may run at the destination before its memory is there.
    pub fn may_postcopy(self) -> bool {
        self != Self::Precopy
    }

    fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, mode)| *mode).find(|mode| *mode as u16 == value).ok_or(
            DecodeError::Value {
                field: "mode",
                value: value.into(),
                allowed: "0 precopy, 1 postcopy, 2 hybrid",
            },
        )
    }
}

/// How the content of pages is made smaller for the wire. It costs time of processors on both
/// sides, and pays where the link is slower than they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4: little time, and not as small.
    Lz4,
    /// Zstandard at a level from 1, the fastest, to [`Compression::MAX_LEVEL`].
    Zstd(u8),
}

impl Compression {
    /// Highest level of Zstandard.
    pub const MAX_LEVEL: u8 = 19;
    /// Level of Zstandard where none is given.
    pub const DEFAULT_LEVEL: u8 = 1;

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd(_) => "zstd",
        }
    }

    /// The two numbers on the wire: which one, and its level.
    fn to_wire(self) -> (u16, u16) {
        match self {
            Self::None => (0, 0),
            Self::Lz4 => (1, 0),
            Self::Zstd(level) => (2, level.into()),
        }
    }

    fn from_wire(which: u16, level: u16) -> Result<Self, DecodeError> {
        let refused = |allowed| {
            Err(DecodeError::Value { field: "compression_level", value: level.into(), allowed })
        };
        match (which, level) {
            (0, 0) => Ok(Self::None),
            (1, 0) => Ok(Self::Lz4),
            (0 | 1, _) => refused("0 without zstd"),
            (2, 1..=19) => Ok(Self::Zstd(level as u8)),
            (2, _) => refused("1 to 19 with zstd"),
            _ => Err(DecodeError::Value {
                field: "compression",
                value: which.into(),
                allowed: "0 none, 1 lz4, 2 zstd",
            }),
        }
    }
}

/// Options of an outgoing migration. All but the mode, the streams, the compression, the release,
/// the resume and the timeouts can be changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingOptions {
    /// Number of connections, 1 to [`MAX_STREAMS`]. A target that is one handed-over descriptor has
    /// one.
    pub streams: u16,
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// Limit of all streams together in bytes per second, at least
    /// [`MIN_BANDWIDTH`](super::MIN_BANDWIDTH); 0 is none.
    pub bandwidth: u64,
    /// Passes over running memory after which the policy decides; 0 is no limit.
    pub max_passes: u32,
    /// What to do then.
    pub policy: NonConvergence,
    /// How the content of pages travels; the destination must take it.
    pub compression: Compression,
    /// Whether the guest may run at the destination before its memory is there.
    pub mode: Mode,
    /// With [`Mode::Hybrid`]: passes over running memory after which it switches to postcopy,
    /// converging or not; 0 is never for that.
    pub switch_after: u32,
    /// With postcopy: connections for the pages that the guest waits for, beside
    /// [`OutgoingOptions::streams`]; at least 1, and at most [`MAX_STREAMS`] together with them.
    pub urgent_streams: u16,
    /// With postcopy: free each page here once the destination has it. The source can then not be
    /// resumed, even by force.
    pub release: bool,
    /// Whether the guest is resumed at the destination. At the source a failure always leaves it as
    /// it was.
    pub resume: ResumePolicy,
    /// How long the peer may be silent where an answer is due, take to send a record that it began,
    /// and take to receive what is sent to it. A guest that is paused for its hand-over runs on
    /// here unless the destination has loaded it within this, two `hook_timeout`, and the time for
    /// the state and, in precopy, the dirty pages: ten times what they should take at the measured
    /// bandwidth, or once what they take at 1 MiB/s where nothing was measured.
    pub peer_timeout: Duration,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl Default for OutgoingOptions {
    fn default() -> Self {
        Self {
            streams: 1,
            downtime_limit: Duration::from_millis(300),
            bandwidth: 0,
            max_passes: 30,
            policy: NonConvergence::KeepGoing,
            compression: Compression::None,
            mode: Mode::Precopy,
            switch_after: 0,
            urgent_streams: 2,
            release: false,
            resume: ResumePolicy::Auto,
            peer_timeout: Duration::from_secs(30),
            hook_timeout: Duration::from_secs(10),
        }
    }
}

impl OutgoingOptions {
    pub(in crate::control) fn encode(&self, encoder: Encoder) -> Encoder {
        let (compression, level) = self.compression.to_wire();
        encoder
            .u16(self.streams)
            .u16(self.mode as u16)
            .u32(self.switch_after)
            .u16(self.urgent_streams)
            .u16(u16::from(self.release))
            .u16(self.resume as u16)
            .u32(self.max_passes)
            .u64(micros(self.downtime_limit))
            .u64(self.bandwidth)
            .u32(self.policy as u32)
            .u16(compression)
            .u16(level)
            .u64(micros(self.peer_timeout))
            .u64(micros(self.hook_timeout))
    }

    pub(in crate::control) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let streams = decoder.u16("streams")?;
        let mode = Mode::from_wire(decoder.u16("mode")?)?;
        let switch_after = decoder.u32("switch_after")?;
        let urgent_streams = decoder.u16("urgent_streams")?;
        let release = flag(decoder, "release")?;
        let resume = resume(decoder)?;
        let max_passes = decoder.u32("max_passes")?;
        let downtime_limit = Duration::from_micros(decoder.u64("downtime_limit")?);
        let bandwidth = bandwidth(decoder)?;
        let policy = NonConvergence::from_wire(decoder.u32("policy")?)?;
        let compression =
            Compression::from_wire(decoder.u16("compression")?, decoder.u16("compression_level")?)?;
        let peer_timeout = timeout(decoder, "peer_timeout")?;
        let hook_timeout = timeout(decoder, "hook_timeout")?;
        if streams == 0 || streams > MAX_STREAMS {
            return Err(DecodeError::Value {
                field: "streams",
                value: streams.into(),
                allowed: "1 to 64",
            });
        }
        let options = Self {
            streams,
            downtime_limit,
            bandwidth,
            max_passes,
            policy,
            compression,
            mode,
            switch_after,
            urgent_streams,
            release,
            resume,
            peer_timeout,
            hook_timeout,
        };
        options.check_postcopy().map(|()| options)
    }

    /// Connections of all kinds.
    pub fn connections(&self) -> u16 {
        if self.mode.may_postcopy() {
            self.streams.saturating_add(self.urgent_streams)
        } else {
            self.streams
        }
    }

    /// Refuses what a start would have to ignore.
    ///
    /// # Errors
    /// If an option is set that the mode has no use for.
    pub fn check_start(&self) -> Result<(), DecodeError> {
        if self.switch_after != 0 && self.mode != Mode::Hybrid {
            let (value, allowed) = (self.switch_after.into(), "0 unless mode is 2 hybrid");
            return Err(DecodeError::Value { field: "switch_after", value, allowed });
        }
        if self.release && !self.mode.may_postcopy() {
            let allowed = "0 unless mode is 1 postcopy or 2 hybrid";
            return Err(DecodeError::Value { field: "release", value: 1, allowed });
        }
        Ok(())
    }

    fn check_postcopy(&self) -> Result<(), DecodeError> {
        if self.mode.may_postcopy()
            && (self.urgent_streams == 0 || self.connections() > MAX_STREAMS)
        {
            let value = self.urgent_streams.into();
            let allowed = "at least 1 with postcopy, and at most 64 together with streams";
            return Err(DecodeError::Value { field: "urgent_streams", value, allowed });
        }
        if self.policy == NonConvergence::Postcopy && self.mode != Mode::Hybrid {
            let (value, allowed) = (self.policy as u64, "4 postcopy only with mode 2 hybrid");
            return Err(DecodeError::Value { field: "policy", value, allowed });
        }
        Ok(())
    }
}

/// Options of an incoming migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingOptions {
    /// Whether the guest is resumed here. It stays paused, too, if the source says so.
    pub resume: ResumePolicy,
    /// How long the source may be silent once it is connected.
    pub peer_timeout: Duration,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl Default for IncomingOptions {
    fn default() -> Self {
        let OutgoingOptions { resume, peer_timeout, hook_timeout, .. } = OutgoingOptions::default();
        Self { resume, peer_timeout, hook_timeout }
    }
}

impl IncomingOptions {
    pub(in crate::control) fn encode(&self, encoder: Encoder) -> Encoder {
        encoder
            .u64(micros(self.peer_timeout))
            .u64(micros(self.hook_timeout))
            .u16(self.resume as u16)
    }

    pub(in crate::control) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let peer_timeout = timeout(decoder, "peer_timeout")?;
        let hook_timeout = timeout(decoder, "hook_timeout")?;
        let resume = resume(decoder)?;
        Ok(Self { resume, peer_timeout, hook_timeout })
    }
}
