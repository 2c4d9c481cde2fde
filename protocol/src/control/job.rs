//! What a job is started with, and how it stands.

use super::codec::{DecodeError, Decoder, Encoder, clip};
use std::time::Duration;

/// Most streams of one migration.
pub const MAX_STREAMS: u16 = 64;
/// Longest address of a peer in bytes.
pub const MAX_ADDRESS: usize = 4096;
/// Longest sentence of an error in bytes.
pub const MAX_SENTENCE: usize = 4096;

/// What to do when the passes do not converge: when after [`OutgoingOptions::max_passes`] passes the rest still does not fit
/// the downtime limit.
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
    /// Switch to postcopy: the guest runs on at the destination, and its memory follows. Needs [`Mode::Hybrid`].
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
        Self::NAMES.iter().map(|(_, policy)| *policy).find(|policy| *policy as u32 == value).ok_or(DecodeError::Value {
            field: "policy",
            value: value.into(),
            allowed: "0 keep-going, 1 throttle, 2 stop, 3 fail, 4 postcopy",
        })
    }
}

/// When the guest moves, before its memory or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum Mode {
    /// Its memory first, in passes, and it stands still for the last of them.
    #[default]
    Precopy = 0,
    /// The guest first: it stands still while its state moves, and its memory follows, what it touches before all.
    Postcopy = 1,
    /// As precopy, until it is told to switch, or has made [`OutgoingOptions::switch_after`] passes, or does not converge under
    /// [`NonConvergence::Postcopy`]; from then on as postcopy.
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
        Self::NAMES.iter().map(|(_, mode)| *mode).find(|mode| *mode as u16 == value).ok_or(DecodeError::Value {
            field: "mode",
            value: value.into(),
            allowed: "0 precopy, 1 postcopy, 2 hybrid",
        })
    }
}

/// How the content of pages is made smaller for the wire. It costs time of processors on both sides, and pays where the link is slower than they are.
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
        let refused = |allowed| Err(DecodeError::Value { field: "compression_level", value: level.into(), allowed });
        match (which, level) {
            (0, 0) => Ok(Self::None),
            (1, 0) => Ok(Self::Lz4),
            (0 | 1, _) => refused("0 without zstd"),
            (2, 1..=19) => Ok(Self::Zstd(level as u8)),
            (2, _) => refused("1 to 19 with zstd"),
            _ => {
                Err(DecodeError::Value { field: "compression", value: which.into(), allowed: "0 none, 1 lz4, 2 zstd" })
            }
        }
    }
}

/// Options of an outgoing migration. All but the mode, the streams, the compression, the release and the timeouts can be changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingOptions {
    /// Number of connections, 1 to [`MAX_STREAMS`]. A target that is one handed-over descriptor has one.
    pub streams: u16,
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// Limit of all streams together in bytes per second; 0 is none.
    pub bandwidth: u64,
    /// Passes over running memory after which the policy decides; 0 is no limit.
    pub max_passes: u32,
    /// What to do then.
    pub policy: NonConvergence,
    /// How the content of pages travels; the destination must take it.
    pub compression: Compression,
    /// Whether the guest may run at the destination before its memory is there.
    pub mode: Mode,
    /// With [`Mode::Hybrid`]: passes over running memory after which it switches to postcopy, converging or not; 0 is never for that.
    pub switch_after: u32,
    /// With postcopy: connections for the pages that the guest waits for, beside [`OutgoingOptions::streams`]; at least 1, and at most
    /// [`MAX_STREAMS`] together with them.
    pub urgent_streams: u16,
    /// With postcopy: free each page here once the destination has it. The source can then not be resumed, even by force.
    pub release: bool,
    /// How long the peer may be silent where it owes an answer or room to send.
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
            peer_timeout: Duration::from_secs(30),
            hook_timeout: Duration::from_secs(10),
        }
    }
}

impl OutgoingOptions {
    pub(super) fn encode(&self, encoder: Encoder) -> Encoder {
        let (compression, level) = self.compression.to_wire();
        encoder
            .u16(self.streams)
            .u16(self.mode as u16)
            .u32(self.switch_after)
            .u16(self.urgent_streams)
            .u16(u16::from(self.release))
            .u32(self.max_passes)
            .u64(micros(self.downtime_limit))
            .u64(self.bandwidth)
            .u32(self.policy as u32)
            .u16(compression)
            .u16(level)
            .u64(micros(self.peer_timeout))
            .u64(micros(self.hook_timeout))
    }

    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let streams = decoder.u16("streams")?;
        let mode = Mode::from_wire(decoder.u16("mode")?)?;
        let switch_after = decoder.u32("switch_after")?;
        let urgent_streams = decoder.u16("urgent_streams")?;
        let release = flag(decoder, "release")?;
        let max_passes = decoder.u32("max_passes")?;
        let downtime_limit = Duration::from_micros(decoder.u64("downtime_limit")?);
        let bandwidth = decoder.u64("bandwidth")?;
        let policy = NonConvergence::from_wire(decoder.u32("policy")?)?;
        let compression = Compression::from_wire(decoder.u16("compression")?, decoder.u16("compression_level")?)?;
        let peer_timeout = timeout(decoder, "peer_timeout")?;
        let hook_timeout = timeout(decoder, "hook_timeout")?;
        if streams == 0 || streams > MAX_STREAMS {
            return Err(DecodeError::Value { field: "streams", value: streams.into(), allowed: "1 to 64" });
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
            peer_timeout,
            hook_timeout,
        };
        options.check_postcopy().map(|()| options)
    }

    /// Connections of all kinds.
    pub fn connections(&self) -> u16 {
        if self.mode.may_postcopy() { self.streams.saturating_add(self.urgent_streams) } else { self.streams }
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
        if self.mode.may_postcopy() && (self.urgent_streams == 0 || self.connections() > MAX_STREAMS) {
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
    /// How long the source may be silent once it is connected.
    pub peer_timeout: Duration,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl Default for IncomingOptions {
    fn default() -> Self {
        let OutgoingOptions { peer_timeout, hook_timeout, .. } = OutgoingOptions::default();
        Self { peer_timeout, hook_timeout }
    }
}

impl IncomingOptions {
    pub(super) fn encode(&self, encoder: Encoder) -> Encoder {
        encoder.u64(micros(self.peer_timeout)).u64(micros(self.hook_timeout))
    }

    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let peer_timeout = timeout(decoder, "peer_timeout")?;
        let hook_timeout = timeout(decoder, "hook_timeout")?;
        Ok(Self { peer_timeout, hook_timeout })
    }
}

/// How a snapshot treats the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum SnapshotMode {
    /// It runs on: it stands still for a moment, and what it is about to write after that is saved first.
    #[default]
    Background = 0,
    /// It stands still until its memory is saved, and runs on.
    Paused = 1,
    /// The VMM has stopped it, and lets it run when it likes: no pause and no resume hook is called.
    Stopped = 2,
}

impl SnapshotMode {
    /// All modes with the names that users write.
    pub const NAMES: [(&'static str, SnapshotMode); 3] = [
        ("background", SnapshotMode::Background),
        ("paused", SnapshotMode::Paused),
        ("stopped", SnapshotMode::Stopped),
    ];

    fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, mode)| *mode).find(|mode| *mode as u16 == value).ok_or(DecodeError::Value {
            field: "mode",
            value: value.into(),
            allowed: "0 background, 1 paused, 2 stopped",
        })
    }
}

/// Options of a snapshot. Only the bandwidth can be changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// What becomes of the guest meanwhile.
    pub mode: SnapshotMode,
    /// Threads that save, 1 to [`MAX_STREAMS`].
    pub workers: u16,
    /// Limit in bytes per second; 0 is none. What the guest is about to write or discards is not held back by it.
    pub bandwidth: u64,
    /// Path of the image that it is an increment to; empty for one that stands alone.
    pub base: String,
    /// What is written from now on is kept track of, so that the next snapshot can be an increment to this one.
    pub track: bool,
    /// An image that has the name already is replaced. It never is before the new one is complete.
    pub replace: bool,
    /// The image is written through the page cache, and stays there for those who restore from it soon.
    pub cached: bool,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            mode: SnapshotMode::Background,
            workers: 2,
            bandwidth: 0,
            base: String::new(),
            track: false,
            replace: false,
            cached: false,
            hook_timeout: OutgoingOptions::default().hook_timeout,
        }
    }
}

impl SnapshotOptions {
    pub(super) fn encode(&self, encoder: Encoder) -> Encoder {
        encoder
            .u16(self.mode as u16)
            .u16(self.workers)
            .u16(u16::from(self.track))
            .u16(u16::from(self.replace))
            .u16(u16::from(self.cached))
            .u64(self.bandwidth)
            .u64(micros(self.hook_timeout))
            .text(&self.base)
    }

    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            mode: SnapshotMode::from_wire(decoder.u16("mode")?)?,
            workers: workers(decoder)?,
            track: flag(decoder, "track")?,
            replace: flag(decoder, "replace")?,
            cached: flag(decoder, "cached")?,
            bandwidth: decoder.u64("bandwidth")?,
            hook_timeout: timeout(decoder, "hook_timeout")?,
            base: decoder.text("base", MAX_ADDRESS)?.to_owned(),
        })
    }
}

/// When a restored guest runs, before its memory or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u16)]
pub enum RestoreMode {
    /// Its memory first, all of it.
    #[default]
    Eager = 0,
    /// The guest first: what it touches is read at once, the rest behind it.
    Lazy = 1,
}

impl RestoreMode {
    /// All modes with the names that users write.
    pub const NAMES: [(&'static str, RestoreMode); 2] = [("eager", RestoreMode::Eager), ("lazy", RestoreMode::Lazy)];

    fn from_wire(value: u16) -> Result<Self, DecodeError> {
        Self::NAMES.iter().map(|(_, mode)| *mode).find(|mode| *mode as u16 == value).ok_or(DecodeError::Value {
            field: "mode",
            value: value.into(),
            allowed: "0 eager, 1 lazy",
        })
    }
}

/// Options of a restore. Only the bandwidth can be changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreOptions {
    /// When the guest runs.
    pub mode: RestoreMode,
    /// Threads that read, 1 to [`MAX_STREAMS`].
    pub workers: u16,
    /// Limit in bytes per second; 0 is none. What the guest waits for is not held back by it.
    pub bandwidth: u64,
    /// With [`RestoreMode::Lazy`]: path of the working set. If the file is there, its pages are read ahead; if not, those that the guest touches first are
    /// written to it. Empty for none.
    pub working_set: String,
    /// How long the VMM may take to answer a hook.
    pub hook_timeout: Duration,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        let SnapshotOptions { workers, bandwidth, hook_timeout, .. } = SnapshotOptions::default();
        Self { mode: RestoreMode::Eager, workers, bandwidth, working_set: String::new(), hook_timeout }
    }
}

impl RestoreOptions {
    pub(super) fn encode(&self, encoder: Encoder) -> Encoder {
        let encoder = encoder.u16(self.mode as u16).u16(self.workers).u64(self.bandwidth);
        encoder.u64(micros(self.hook_timeout)).text(&self.working_set)
    }

    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let options = Self {
            mode: RestoreMode::from_wire(decoder.u16("mode")?)?,
            workers: workers(decoder)?,
            bandwidth: decoder.u64("bandwidth")?,
            hook_timeout: timeout(decoder, "hook_timeout")?,
            working_set: decoder.text("working_set", MAX_ADDRESS)?.to_owned(),
        };
        if options.mode != RestoreMode::Lazy && !options.working_set.is_empty() {
            let (value, allowed) = (options.mode as u64, "1 lazy with a working_set");
            return Err(DecodeError::Value { field: "mode", value, allowed });
        }
        Ok(options)
    }
}

fn workers(decoder: &mut Decoder<'_>) -> Result<u16, DecodeError> {
    match decoder.u16("workers")? {
        value @ 1..=MAX_STREAMS => Ok(value),
        value => Err(DecodeError::Value { field: "workers", value: value.into(), allowed: "1 to 64" }),
    }
}

fn flag(decoder: &mut Decoder<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match decoder.u16(field)? {
        value @ 0..=1 => Ok(value == 1),
        value => Err(DecodeError::Value { field, value: value.into(), allowed: "0 or 1" }),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn timeout(decoder: &mut Decoder<'_>, field: &'static str) -> Result<Duration, DecodeError> {
    const LONGEST: u64 = 24 * 3600 * 1_000_000;
    match decoder.u64(field)? {
        value @ 1..=LONGEST => Ok(Duration::from_micros(value)),
        value => Err(DecodeError::Value { field, value, allowed: "1 microsecond to 24 hours" }),
    }
}

/// What a job is.
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
            .ok_or(DecodeError::Value {
                field: "kind",
                value: value.into(),
                allowed: "0 none, 1 outgoing, 2 incoming, 3 snapshot, 4 restore",
            })
    }
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(u32)]
pub enum Phase {
    /// No job was started yet.
    #[default]
    Idle = 0,
    /// Outgoing: connecting. Incoming: waiting for the source.
    Connecting = 1,
    /// Outgoing: telling the peer what comes. Incoming: checking that, and making holes.
    Preparing = 2,
    /// Outgoing: starting the trackers, and clearing what is discarded.
    Tracking = 3,
    /// Passes over the memory of a running guest.
    Passes = 4,
    /// Outgoing: the guest is being stopped, or stands still for the last pass.
    Stopping = 5,
    /// The destination loads the VMM's state.
    Loading = 6,
    /// Outgoing: ownership is being given up. Incoming: waiting for it.
    Committing = 7,
    /// The guest runs at the destination, and its memory is on its way.
    Postcopy = 8,
    /// The same, but a connection was lost. Faults wait at the destination until the migration is recovered. The error says what happened.
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
    /// What was asked for is done. Migration: the destination has it all, and runs.
    Completed = 15,
    /// It failed; an outgoing guest runs on at the source, unless it was in postcopy.
    Failed = 16,
    /// It was cancelled; an outgoing guest runs on at the source.
    Cancelled = 17,
    /// Outgoing: the commit was sent and the link died before the destination confirmed. The guest stands still here, and whether it
    /// runs there only an operator can find out.
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

    /// True if the guest runs at the destination, as far as is known, and its memory is not all there.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::PostcopyPaused | Self::Recovering)
    }

    fn from_wire(value: u32) -> Result<Self, DecodeError> {
        Self::ALL.iter().map(|(phase, _)| *phase).find(|phase| *phase as u32 == value).ok_or(DecodeError::Value {
            field: "phase",
            value: value.into(),
            allowed: "0 to 18",
        })
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The figures of a job. One field a line; the wire, `--json` and the tables all follow this list.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// All figures with their names.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }

            fn encode(&self, encoder: Encoder) -> Encoder {
                encoder$(.u64(self.$name))*
            }

            fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
                Ok(Self { $($name: decoder.u64(stringify!($name))?,)* })
            }
        }
    };
}

counters! {
    /// Passes that ended, the last one, with the guest stopped, among them.
    passes,
    /// Pages sent with their content. A page sent in two passes counts twice. Snapshot: pages whose content the image has. Restore: pages that were
    /// read from it and placed.
    pages_sent,
    /// Allocated pages that were read and found to be zero, and holes that were sent as zero.
    zero_pages,
    /// Pages told to the destination as discarded; or that are discarded in the image.
    discarded_pages,
    /// Pages sent although discarded, since the guest wrote into them afterwards.
    stray_pages,
    /// Bytes written to, or read from, all streams: headers, content and state; or the image.
    wire_bytes,
    /// Pages that are dirty and not sent yet; in postcopy, those that the destination still lacks; those that are still to be saved or restored.
    remaining_pages,
    /// Pages that the current pass started with.
    pass_pages,
    /// Pages of the current pass that are done.
    pass_pages_done,
    /// Microseconds since the job started; stands when it ends.
    total_us,
    /// Microseconds from asking the VMM to pause until the destination said that its guest runs. Snapshot: until the VMM said so.
    downtime_us,
    /// Microseconds that the guest would stand still if it were stopped now.
    expected_downtime_us,
    /// Bytes per second over the last pass.
    bandwidth,
    /// Pages per second that the guest dirtied during the last pass.
    dirty_pages_per_s,
    /// Microseconds that the last sync of the trackers took.
    sync_us,
    /// Percent of its time that the guest is held back, if throttled.
    throttle_percent,
    /// Postcopy: faults of the guest, and of its devices, that were answered. At the destination. Lazy restore: the same. Snapshot: writes into pages that were
    /// still protected.
    faults,
    /// Postcopy: pages that the destination asked for, since the guest waited for them.
    requested_pages,
    /// Postcopy: pages that the source sent, or the destination took, without being asked.
    pushed_pages,
    /// Postcopy: pages that the guest discarded while they remained, so that they need not come any more.
    dropped_pages,
    /// Postcopy: pages that the source freed since the destination has them.
    released_pages,
    /// Postcopy: microseconds without a connection.
    paused_us,
    /// Microseconds from reading a fault to answering it, for half of the faults.
    fault_p50_us,
    /// The same for 90 of 100.
    fault_p90_us,
    /// The same for 99 of 100.
    fault_p99_us,
    /// The same for the slowest.
    fault_max_us,
    /// Snapshot: pages that were saved before their turn, since the guest was about to write there.
    captured_pages,
    /// Snapshot: pages that were saved before their turn, since the guest discarded them.
    rescued_pages,
    /// Snapshot: pages that are as in the base.
    unchanged_pages,
    /// Restore: pages of the working set that were read ahead.
    working_set_pages,
    /// Restore: microseconds from the request until the VMM said that its guest runs.
    running_us,
}

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobStatus {
    /// Number of the job, counted from 1; 0 if there was none.
    pub job: u64,
    /// What it is.
    pub kind: JobKind,
    /// Where it stands.
    pub phase: Phase,
    /// Its figures.
    pub counters: Counters,
    /// Why it failed, or is paused; empty if it did not and is not.
    pub error: String,
}

impl JobStatus {
    /// Adds the fields to a body.
    pub fn encode(&self, encoder: Encoder) -> Encoder {
        let encoder = encoder.u64(self.job).u32(self.kind as u32).u32(self.phase as u32);
        self.counters.encode(encoder).text(clip(&self.error, MAX_SENTENCE))
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
            counters: Counters::decode(decoder)?,
            error: decoder.text("error", MAX_SENTENCE)?.to_owned(),
        })
    }
}
