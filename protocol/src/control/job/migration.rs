// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Options of a migration.

use super::fields::{bandwidth, flag, huge_pages, micros, resume, timeout};
use super::{HugePages, MAX_STREAMS, ResumePolicy};
use crate::control::codec::{DecodeError, Decoder, Encoder};
use std::time::Duration;

/// What to do if the passes do not converge: after [`OutgoingOptions::max_passes`] passes the rest
/// still does not fit the downtime limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum NonConvergence {
    /// Continue with passes until it fits, or the operator changes a limit or cancels.
    KeepGoing = 0,
    /// Throttle the guest, more with every pass, and continue.
    Throttle = 1,
    /// Pause the guest and send the rest, however long that takes.
    StopAnyway = 2,
    /// Fail; the guest continues at the source.
    Fail = 3,
    /// Switch to postcopy: the guest runs at the destination, and its memory follows. Needs
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

    pub(super) fn from_wire(value: u32) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, policy)| *policy).find(|policy| *policy as u32 == value).ok_or(
            DecodeError::InvalidValue {
                field: "policy",
                value: value.into(),
                allowed: "0 keep-going, 1 throttle, 2 stop, 3 fail, 4 postcopy",
            },
        )
    }
}

/// Whether the guest or its memory moves first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum Mode {
    /// The memory moves first, in passes. The guest is paused for the last pass.
    #[default]
    Precopy = 0,
    /// The guest moves first. It is paused while its state moves, and its memory follows; pages
    /// that it accesses come first.
    Postcopy = 1,
    /// Begins as precopy. Switches to postcopy on request, after [`OutgoingOptions::switch_after`]
    /// passes, or if it does not converge under [`NonConvergence::Postcopy`].
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
            DecodeError::InvalidValue {
                field: "mode",
                value: value.into(),
                allowed: "0 precopy, 1 postcopy, 2 hybrid",
            },
        )
    }
}

/// How the content of pages is compressed. Compression costs processor time on both sides. It pays
/// if the link is slower than they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4: fast, with a lower ratio.
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
            Err(DecodeError::InvalidValue {
                field: "compression_level",
                value: level.into(),
                allowed,
            })
        };
        match (which, level) {
            (0, 0) => Ok(Self::None),
            (1, 0) => Ok(Self::Lz4),
            (0 | 1, _) => refused("0 without zstd"),
            (2, 1..=19) => Ok(Self::Zstd(level as u8)),
            (2, _) => refused("1 to 19 with zstd"),
            _ => Err(DecodeError::InvalidValue {
                field: "compression",
                value: which.into(),
                allowed: "0 none, 1 lz4, 2 zstd",
            }),
        }
    }
}

/// Options of an outgoing migration. [`Parameters`](super::Parameters) has those that can be
/// changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingOptions {
    /// Number of connections, 1 to [`MAX_STREAMS`]. A target that is one handed-over descriptor has
    /// one.
    pub streams: u16,
    /// How long the guest may be paused.
    pub downtime_limit: Duration,
    /// Limit of all streams together in bytes per second, at least
    /// [`MIN_BANDWIDTH`](super::MIN_BANDWIDTH); 0 for no limit.
    pub bandwidth: u64,
    /// Passes over running memory after which the policy decides; 0 for no limit.
    pub max_passes: u32,
    /// What to do then.
    pub policy: NonConvergence,
    /// How the content of pages travels. The destination must support it.
    pub compression: Compression,
    /// Whether the guest may run at the destination before its memory is there.
    pub mode: Mode,
    /// With [`Mode::Hybrid`]: passes over running memory after which it switches to postcopy,
    /// unless the rest fits the downtime limit by then; 0 for never.
    pub switch_after: u32,
    /// With postcopy: connections for the pages that the guest waits for, in addition to
    /// [`OutgoingOptions::streams`]. At least 1, and together at most [`MAX_STREAMS`].
    pub urgent_streams: u16,
    /// With postcopy: free each page here once the destination has it. The source can then not be
    /// resumed, even by force.
    pub release: bool,
    /// Whether the guest is resumed at the destination. At the source, a failure always restores
    /// its run state.
    pub resume: ResumePolicy,
    /// How long the peer may be silent while an answer is due, take to send a record that it has
    /// begun, and take to receive what is sent to it.
    ///
    /// A guest that is paused for its hand-over is resumed here unless the destination has loaded
    /// it within a limit. The limit is the sum of this, two `hook_timeout`, and the time for the
    /// state and, in precopy, the dirty pages: ten times what they should take at the measured
    /// bandwidth, or what they take at 1 MiB/s if nothing was measured.
    pub peer_timeout: Duration,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
    /// Whether the destination gets to know where it may make huge pages.
    pub huge_pages: HugePages,
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
            huge_pages: HugePages::Auto,
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
            .u16(self.huge_pages as u16)
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
        let huge_pages = huge_pages(decoder)?;
        if streams == 0 || streams > MAX_STREAMS {
            return Err(DecodeError::InvalidValue {
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
            huge_pages,
        };
        options.check_postcopy().map(|()| options)
    }

    /// Number of connections of all kinds.
    pub fn connections(&self) -> u16 {
        if self.mode.may_postcopy() {
            self.streams.saturating_add(self.urgent_streams)
        } else {
            self.streams
        }
    }

    /// Refuses an option that the start would have to ignore.
    ///
    /// # Errors
    /// If an option is set that the mode does not use.
    pub fn check_start(&self) -> Result<(), DecodeError> {
        if self.switch_after != 0 && self.mode != Mode::Hybrid {
            let (value, allowed) = (self.switch_after.into(), "0 unless mode is 2 hybrid");
            return Err(DecodeError::InvalidValue { field: "switch_after", value, allowed });
        }
        if self.release && !self.mode.may_postcopy() {
            let allowed = "0 unless mode is 1 postcopy or 2 hybrid";
            return Err(DecodeError::InvalidValue { field: "release", value: 1, allowed });
        }
        Ok(())
    }

    fn check_postcopy(&self) -> Result<(), DecodeError> {
        if self.mode.may_postcopy()
            && (self.urgent_streams == 0 || self.connections() > MAX_STREAMS)
        {
            let value = self.urgent_streams.into();
            let allowed = "at least 1 with postcopy, and at most 64 together with streams";
            return Err(DecodeError::InvalidValue { field: "urgent_streams", value, allowed });
        }
        if self.policy == NonConvergence::Postcopy && self.mode != Mode::Hybrid {
            let (value, allowed) = (self.policy as u64, "4 postcopy only with mode 2 hybrid");
            return Err(DecodeError::InvalidValue { field: "policy", value, allowed });
        }
        Ok(())
    }
}

/// Options of an incoming migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingOptions {
    /// Whether the guest is resumed here. It also stays paused if the source says so.
    pub resume: ResumePolicy,
    /// How long the source may be silent once it is connected.
    pub peer_timeout: Duration,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
    /// Whether the guest gets huge pages where its source has all of them.
    pub huge_pages: HugePages,
}

impl Default for IncomingOptions {
    fn default() -> Self {
        let OutgoingOptions { resume, peer_timeout, hook_timeout, .. } = OutgoingOptions::default();
        Self { resume, peer_timeout, hook_timeout, huge_pages: HugePages::Auto }
    }
}

impl IncomingOptions {
    pub(in crate::control) fn encode(&self, encoder: Encoder) -> Encoder {
        encoder
            .u64(micros(self.peer_timeout))
            .u64(micros(self.hook_timeout))
            .u16(self.resume as u16)
            .u16(self.huge_pages as u16)
    }

    pub(in crate::control) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let peer_timeout = timeout(decoder, "peer_timeout")?;
        let hook_timeout = timeout(decoder, "hook_timeout")?;
        let (resume, huge_pages) = (resume(decoder)?, huge_pages(decoder)?);
        Ok(Self { resume, peer_timeout, hook_timeout, huge_pages })
    }
}
