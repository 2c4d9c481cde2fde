// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! pageferry's own requests, from a VMM or an operator to the agent. Their codes begin at 0x1000,
//! above those of vhost-user.
//!
//! Each is answered by a frame with the same code and the reply flag; see [`super::reply`].

use super::codec::{DecodeError, Decoder, Encoder};
use super::devices::{BALLOON_ASK_STATS, BALLOON_SET_TARGET, DeviceSpec};
use super::job::{
    IncomingOptions, MAX_ADDRESS, OutgoingOptions, Parameters, RestoreOptions, SnapshotMode,
    SnapshotOptions,
};
use super::journal::{decode_journal, encode_journal};
use super::ranges::{decode_ranges, encode_ranges};
use super::{Role, Trackers};
use crate::memory::BlockGeometry;
use crate::memory::geometry::MAX_NAME;
use std::time::Duration;

pub use super::ranges::{BlockRange, MAX_RANGES};

/// The version of the control protocol that this crate speaks.
pub const CONTROL_VERSION: u16 = 1;
/// First code of pageferry's own requests.
pub const FIRST_NATIVE_REQUEST: u32 = 0x1000;

/// Request codes.
pub mod code {
    #![allow(missing_docs)]
    pub const HELLO: u32 = 0x1000;
    pub const ADD_BLOCK: u32 = 0x1001;
    pub const REMOVE_BLOCK: u32 = 0x1002;
    pub const DISCARD: u32 = 0x1003;
    pub const POPULATE: u32 = 0x1004;
    pub const SET_TRACKERS: u32 = 0x1005;
    pub const FREE: u32 = 0x1008;
    pub const START_OUTGOING: u32 = 0x1010;
    pub const START_INCOMING: u32 = 0x1011;
    pub const CANCEL: u32 = 0x1012;
    pub const SET_PARAMETERS: u32 = 0x1013;
    pub const QUERY_STATUS: u32 = 0x1014;
    pub const SUBSCRIBE: u32 = 0x1015;
    pub const RESUME: u32 = 0x1016;
    pub const START_POSTCOPY: u32 = 0x1017;
    pub const RECOVER: u32 = 0x1018;
    pub const START_SNAPSHOT: u32 = 0x1019;
    pub const START_RESTORE: u32 = 0x101a;
    pub const QUERY_AGENT: u32 = 0x101b;
    pub const BALLOON: u32 = 0x101c;
    pub const PLUGGED_MEMORY: u32 = 0x101d;
    pub const CONNECT_DEVICE: u32 = 0x101e;
    pub const CONTINUE: u32 = 0x101f;
    pub const UPGRADE: u32 = 0x1020;
    pub const GRANT: u32 = 0x1021;
    pub const OPEN_BASE: u32 = 0x1022;
    /// Not a request: what a subscriber gets, the
    /// [`super::JobStatus`](crate::control::job::JobStatus) as the body.
    pub const EVENT: u32 = 0x1100;
}

/// Flag of a block: it starts as discarded instead of populated.
pub const BLOCK_DISCARDED: u32 = 1 << 0;
/// Flag of a block: it is a private mapping of the base of an image ([`super::clones`]).
pub const BLOCK_CLONE: u32 = 1 << 1;
/// Flag of a discard: the agent frees the backing with `FALLOC_FL_PUNCH_HOLE`.
pub const DISCARD_PUNCH: u32 = 1 << 0;

/// Feature: the agent checks the fence word of the VMM (see [`crate::shm::fence`]) before it acts
/// for the guest. The hello carries the word. The answer carries a pidfd of the agent, so that the
/// VMM can make sure that it has exited before the next agent is attached.
pub const FEATURE_FENCE: u64 = 1 << 0;

/// Feature: a job that brings the memory of a guest which runs already can go on in another agent.
/// The VMM adds a bitmap of owed pages to each block, keeps the
/// [`Journal`](super::journal::Journal) of the job, and hands both to the next agent.
pub const FEATURE_OWED: u64 = 1 << 1;

/// Feature: the answer to the hello carries, after the pidfd, the reading end of a pipe whose other
/// end only the agent's program has. The pipe hangs up when that program is gone: its process has
/// exited, or has executed another program, such as a newer version of the agent.
pub const FEATURE_PROGRAM_PIPE: u64 = 1 << 2;

/// Feature: the agent is in a sandbox, and opens only what was granted. So each request that names
/// a path or an address follows a [`Request::Grant`] for it.
pub const FEATURE_GRANTS: u64 = 1 << 3;

/// Feature: blocks may be clones ([`BLOCK_CLONE`], [`Request::OpenBase`]).
pub const FEATURE_CLONES: u64 = 1 << 4;

/// All features that this crate knows.
pub const FEATURES: u64 =
    FEATURE_FENCE | FEATURE_OWED | FEATURE_PROGRAM_PIPE | FEATURE_GRANTS | FEATURE_CLONES;

/// Longest name of a VM in bytes.
pub const MAX_VM_NAME: usize = 128;

/// A request of a VMM or an operator to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Opens pageferry's part of the protocol. Answered by
    /// [`HelloReply`](super::reply::HelloReply), and with [`FEATURE_FENCE`] by a pidfd of the
    /// agent. With [`FEATURE_PROGRAM_PIPE`] a pipe follows.
    Hello {
        /// Lowest version the sender speaks.
        version_min: u16,
        /// Highest version the sender speaks.
        version_max: u16,
        /// Feature bits the sender offers: [`FEATURE_FENCE`], [`FEATURE_OWED`],
        /// [`FEATURE_PROGRAM_PIPE`], [`FEATURE_GRANTS`], [`FEATURE_CLONES`].
        features: u64,
        /// With [`FEATURE_FENCE`], which only a VMM sets: the number that the fence word holds
        /// while this agent is the current one, from 1. The descriptor is the memfd of the fence
        /// word. Without the feature: 0 and no descriptor.
        agent: u64,
        /// With [`FEATURE_FENCE`]: the name of the VM, for people; empty if it has none. At most
        /// [`MAX_VM_NAME`] bytes, without control characters. Without the feature: empty.
        name: String,
    },
    /// Adds a block. Descriptors: the memory, then the bitmap of discarded pages (one bit per page,
    /// whole 64-bit words), which the VMM keeps and whose bits hold from the start. With
    /// [`FEATURE_OWED`] a third one: the bitmap of owed pages, of the same size. With
    /// [`BLOCK_CLONE`] three more: the `/proc/self/mem` and the `/proc/self/pagemap` of the VMM,
    /// and the socket over which it gives pages back. Answered by
    /// [`AddBlockReply`](super::reply::AddBlockReply).
    AddBlock {
        /// Id, name, place, granularity.
        geometry: BlockGeometry,
        /// Offset of the block in its file in bytes.
        fd_offset: u64,
        /// Address at which the VMM has it mapped; 0 if it has not.
        vmm_address: u64,
        /// [`BLOCK_DISCARDED`], [`BLOCK_CLONE`].
        flags: u32,
    },
    /// Removes a block.
    RemoveBlock {
        /// The block.
        id: u32,
    },
    /// The content of these ranges is stale from now on. Answered by the number of pages that were
    /// not discarded before.
    Discard {
        /// [`DISCARD_PUNCH`].
        flags: u32,
        /// The ranges; rounded inward.
        ranges: Vec<BlockRange>,
    },
    /// The guest gave these ranges back and may write into them again at any time, without a
    /// populate. The agent frees the memory before it answers. Answered by the number of pages that
    /// were freed: those of the ranges that are not discarded.
    Free {
        /// The ranges; rounded inward.
        ranges: Vec<BlockRange>,
    },
    /// The guest is about to use these ranges. Answered by the number of pages that were discarded
    /// before.
    Populate {
        /// The ranges; rounded outward.
        ranges: Vec<BlockRange>,
    },
    /// Declares what reports the writes of the guest. Before that, the agent starts no job that
    /// relies on dirty pages. Descriptor: with [`Trackers::WRITE_PROTECT`] the `/proc/self/pagemap`
    /// of the VMM.
    SetTrackers {
        /// At least one.
        sources: Trackers,
    },
    /// Starts to send the guest. Answered by [`JobStarted`](super::reply::JobStarted).
    StartOutgoing {
        /// `tcp:HOST:PORT`, `tls:HOST:PORT`, `unix:PATH`, or `fd` with a connected socket as the
        /// descriptor.
        target: String,
        /// The options.
        options: OutgoingOptions,
    },
    /// Starts to wait for a guest. Answered by [`JobStarted`](super::reply::JobStarted).
    StartIncoming {
        /// `tcp:HOST:PORT`, `tls:HOST:PORT`, `unix:PATH`, or `fd` with a connected socket as the
        /// descriptor.
        listen: String,
        /// The options.
        options: IncomingOptions,
    },
    /// Cancels the job that runs. Refused after the guest was relinquished.
    Cancel,
    /// Changes options of the job that runs.
    SetParameters {
        /// The changes.
        parameters: Parameters,
    },
    /// Asks for the status of the job that runs or ran last. Answered by a
    /// [`JobStatus`](super::job::JobStatus).
    QueryStatus,
    /// Asks what the agent serves. Answered by an [`AgentInfo`](super::agent_info::AgentInfo).
    QueryAgent,
    /// Sets the target of the balloon, and asks for its status. Answered by a
    /// [`BalloonStatus`](super::devices::BalloonStatus).
    Balloon {
        /// What the balloon is to hold, in bytes, rounded down to pages of 4096 bytes. `None`
        /// leaves it as it is.
        target: Option<u64>,
        /// Asks the guest for new statistics, and waits for them for a moment.
        ask_stats: bool,
    },
    /// Sets the size that the guest is to have plugged of virtio-mem, and asks for its status.
    /// Answered by a [`MemStatus`](super::devices::MemStatus).
    PluggedMemory {
        /// The size in bytes: a multiple of the block size. `None` leaves it as it is.
        requested: Option<u64>,
    },
    /// Connects a front-end of the VMM to a device of the agent, which makes the device if it has
    /// none. Descriptor: the agent's end of the vhost-user connection.
    ConnectDevice {
        /// The device.
        device: DeviceSpec,
    },
    /// Asks for a status in every interval and at every change of phase, as [`code::EVENT`] frames.
    Subscribe {
        /// Time between two of them.
        interval: Duration,
    },
    /// Has the VMM resume the guest after a commit that was never confirmed
    /// ([`one-owner`](crate::invariants#one-owner)). Only for an operator who has looked at both
    /// sides.
    Resume {
        /// Must be true: the operator knows that the guest does not run at the destination.
        force: bool,
    },
    /// Switches the running outgoing migration of mode hybrid to postcopy after its current pass.
    StartPostcopy,
    /// Connects a paused postcopy again. Answered by [`JobStarted`](super::reply::JobStarted).
    ///
    /// At the source: of the job that is paused, or, with a session, of a migration that another
    /// agent began for this guest. At the destination: the paused job listens at another address in
    /// addition to the first.
    Recover {
        /// Identifies the migration, as it came with
        /// [`Hook::Relinquish`](crate::control::hook::Hook::Relinquish); zeroes for the job that is
        /// paused here.
        session: [u8; 16],
        /// The address to connect to, or to listen at; empty for the address before.
        address: String,
        /// The options, if another agent began the migration; a job that is paused here keeps its
        /// own.
        options: OutgoingOptions,
    },
    /// Continues the job of a lost agent, which brings the memory of a guest that runs here
    /// already. The pages that are owed are in the bitmaps of the blocks. Descriptor: the
    /// userfaultfd with which the mappings of the VMM are registered. Answered by
    /// [`JobStarted`](super::reply::JobStarted).
    Continue {
        /// What the lost agent gave the VMM with
        /// [`Hook::KeepJournal`](super::hook::Hook::KeepJournal).
        journal: Vec<u8>,
    },
    /// Has the agent execute its program again, or another one, in the same process. It does so as
    /// soon as no job runs that the next program could not continue.
    Upgrade {
        /// Absolute path of the program as the agent sees it; empty for its own.
        program: String,
    },
    /// Allows the agent what the descriptors stand for ([`Grants`](super::grants::Grants)): 1 to
    /// [`MAX_GRANTS`](super::grants::MAX_GRANTS) of them. An agent without a sandbox ignores them.
    Grant,
    /// Opens the file whose pages all clones of an image share, and makes it if there is none.
    /// Answered by [`OpenBaseReply`](super::clones::OpenBaseReply) and the file.
    OpenBase {
        /// Absolute path of the image.
        path: String,
    },
    /// Starts to save the guest into an image. Answered by
    /// [`JobStarted`](super::reply::JobStarted).
    StartSnapshot {
        /// Absolute path of the image.
        path: String,
        /// The options.
        options: SnapshotOptions,
    },
    /// Starts to restore a guest from an image and its bases. Answered by
    /// [`JobStarted`](super::reply::JobStarted).
    StartRestore {
        /// Absolute path of the image.
        path: String,
        /// The options.
        options: RestoreOptions,
    },
}

/// The name of a request in `docs/control.md`, for messages.
pub fn name(request: u32) -> &'static str {
    match request {
        6 => "SET_LOG_BASE",
        21 => "SET_BACKEND_REQ_FD",
        code::HELLO => "HELLO",
        code::ADD_BLOCK => "ADD_BLOCK",
        code::REMOVE_BLOCK => "REMOVE_BLOCK",
        code::DISCARD => "DISCARD",
        code::POPULATE => "POPULATE",
        code::SET_TRACKERS => "SET_TRACKERS",
        code::FREE => "FREE",
        code::START_OUTGOING => "START_OUTGOING",
        code::START_INCOMING => "START_INCOMING",
        code::CANCEL => "CANCEL",
        code::SET_PARAMETERS => "SET_PARAMETERS",
        code::QUERY_STATUS => "QUERY_STATUS",
        code::SUBSCRIBE => "SUBSCRIBE",
        code::RESUME => "RESUME",
        code::START_POSTCOPY => "START_POSTCOPY",
        code::RECOVER => "RECOVER",
        code::START_SNAPSHOT => "START_SNAPSHOT",
        code::START_RESTORE => "START_RESTORE",
        code::QUERY_AGENT => "QUERY_AGENT",
        code::BALLOON => "BALLOON",
        code::PLUGGED_MEMORY => "PLUGGED_MEMORY",
        code::CONNECT_DEVICE => "CONNECT_DEVICE",
        code::CONTINUE => "CONTINUE",
        code::UPGRADE => "UPGRADE",
        code::GRANT => "GRANT",
        code::OPEN_BASE => "OPEN_BASE",
        code::EVENT => "EVENT",
        _ => "an unknown request",
    }
}

impl Request {
    /// The request's code.
    pub fn code(&self) -> u32 {
        match self {
            Self::Hello { .. } => code::HELLO,
            Self::AddBlock { .. } => code::ADD_BLOCK,
            Self::RemoveBlock { .. } => code::REMOVE_BLOCK,
            Self::Discard { .. } => code::DISCARD,
            Self::Free { .. } => code::FREE,
            Self::Populate { .. } => code::POPULATE,
            Self::SetTrackers { .. } => code::SET_TRACKERS,
            Self::StartOutgoing { .. } => code::START_OUTGOING,
            Self::StartIncoming { .. } => code::START_INCOMING,
            Self::Cancel => code::CANCEL,
            Self::SetParameters { .. } => code::SET_PARAMETERS,
            Self::QueryStatus => code::QUERY_STATUS,
            Self::QueryAgent => code::QUERY_AGENT,
            Self::Balloon { .. } => code::BALLOON,
            Self::PluggedMemory { .. } => code::PLUGGED_MEMORY,
            Self::ConnectDevice { .. } => code::CONNECT_DEVICE,
            Self::Continue { .. } => code::CONTINUE,
            Self::Upgrade { .. } => code::UPGRADE,
            Self::Grant => code::GRANT,
            Self::OpenBase { .. } => code::OPEN_BASE,
            Self::Subscribe { .. } => code::SUBSCRIBE,
            Self::Resume { .. } => code::RESUME,
            Self::StartPostcopy => code::START_POSTCOPY,
            Self::Recover { .. } => code::RECOVER,
            Self::StartSnapshot { .. } => code::START_SNAPSHOT,
            Self::StartRestore { .. } => code::START_RESTORE,
        }
    }

    /// The least role whose connection may send this request.
    ///
    /// This is the only place that says so. One rule depends on the agent's state and is not here:
    /// only the VMM may [`Recover`](Self::Recover) a migration that another agent began, since only
    /// the VMM knows its session.
    pub fn required_role(&self) -> Role {
        match self {
            // The fence word belongs to the VMM.
            Self::Hello { features, .. } if features & FEATURE_FENCE != 0 => Role::Vmm,
            Self::AddBlock { .. }
            | Self::RemoveBlock { .. }
            | Self::Discard { .. }
            | Self::Free { .. }
            | Self::Populate { .. }
            | Self::ConnectDevice { .. }
            | Self::Continue { .. }
            | Self::OpenBase { .. }
            | Self::SetTrackers { .. } => Role::Vmm,
            // Only the VMM knows that it has stopped its guest.
            Self::StartSnapshot { options, .. } if options.mode == SnapshotMode::Stopped => {
                Role::Vmm
            }
            Self::Hello { .. }
            | Self::StartOutgoing { .. }
            | Self::StartIncoming { .. }
            | Self::Cancel
            | Self::SetParameters { .. }
            | Self::QueryStatus
            | Self::QueryAgent
            | Self::Balloon { .. }
            | Self::PluggedMemory { .. }
            | Self::Upgrade { .. }
            | Self::Grant
            | Self::Subscribe { .. }
            | Self::Resume { .. }
            | Self::StartPostcopy
            | Self::Recover { .. }
            | Self::StartSnapshot { .. }
            | Self::StartRestore { .. } => Role::Operator,
        }
    }

    /// True for a request that hands over memory, or something that belongs to the memory. If no
    /// connection owns the memory yet, the one that sends such a request becomes the VMM.
    ///
    /// A snapshot of a stopped guest needs the VMM, too, but hands over nothing: it does not make
    /// its sender the VMM.
    pub fn claims_memory(&self) -> bool {
        self.required_role() == Role::Vmm && !matches!(self, Self::StartSnapshot { .. })
    }

    /// The request's body.
    pub fn encode(&self) -> Vec<u8> {
        let encoder = Encoder::new();
        match self {
            Self::Hello { version_min, version_max, features, agent, name } => {
                let encoder = encoder.u16(*version_min).u16(*version_max).u32(0).u64(*features);
                match features & FEATURE_FENCE {
                    0 => encoder,
                    _ => encoder.u64(*agent).text(name),
                }
            }
            Self::AddBlock { geometry, fd_offset, vmm_address, flags } => encoder
                .u32(geometry.id)
                .u32(*flags)
                .u64(geometry.gpa)
                .u64(geometry.length)
                .u64(geometry.granularity)
                .u64(*fd_offset)
                .u64(*vmm_address)
                .text(&geometry.name),
            Self::RemoveBlock { id } => encoder.u32(*id),
            Self::Discard { flags, ranges } => encode_ranges(*flags, ranges),
            Self::Free { ranges } | Self::Populate { ranges } => encode_ranges(0, ranges),
            Self::SetTrackers { sources } => encoder.u32(sources.bits()),
            Self::StartOutgoing { target, options } => options.encode(encoder.text(target)),
            Self::StartIncoming { listen, options } => options.encode(encoder.text(listen)),
            Self::StartSnapshot { path, options } => options.encode(encoder.text(path)),
            Self::StartRestore { path, options } => options.encode(encoder.text(path)),
            Self::SetParameters { parameters } => parameters.encode(encoder),
            Self::Subscribe { interval } => {
                encoder.u32(u32::try_from(interval.as_millis()).unwrap_or(u32::MAX))
            }
            Self::Balloon { target, ask_stats } => {
                let set = target.map_or(0, |_| BALLOON_SET_TARGET);
                let ask = if *ask_stats { BALLOON_ASK_STATS } else { 0 };
                encoder.u32(set | ask).u64(target.unwrap_or(0))
            }
            Self::PluggedMemory { requested } => {
                encoder.u32(requested.is_some().into()).u64(requested.unwrap_or(0))
            }
            Self::ConnectDevice { device } => device.encode(encoder),
            Self::Continue { journal } => encode_journal(encoder, journal),
            Self::Upgrade { program } => encoder.text(program),
            Self::OpenBase { path } => encoder.text(path),
            Self::Resume { force } => encoder.u32(u32::from(*force)),
            Self::Recover { session, address, options } => {
                options.encode(encoder.bytes(session).text(address))
            }
            Self::Cancel
            | Self::QueryStatus
            | Self::QueryAgent
            | Self::StartPostcopy
            | Self::Grant => encoder,
        }
        .finish()
    }

    /// Decodes a request; `None` if the code is unknown.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(request: u32, body: &[u8]) -> Option<Result<Self, DecodeError>> {
        let mut decoder = Decoder::new(body);
        let decoded = Self::decode_fields(request, &mut decoder)?;
        Some(decoded.and_then(|request| decoder.finish().map(|()| request)))
    }

    fn decode_fields(request: u32, decoder: &mut Decoder<'_>) -> Option<Result<Self, DecodeError>> {
        Some(match request {
            code::HELLO => decode_hello(decoder),
            code::ADD_BLOCK => decode_add_block(decoder),
            code::REMOVE_BLOCK => decoder.u32("id").map(|id| Self::RemoveBlock { id }),
            code::DISCARD => decode_ranges(decoder, DISCARD_PUNCH, "bit 0, punch")
                .map(|(flags, ranges)| Self::Discard { flags, ranges }),
            code::FREE => {
                decode_ranges(decoder, 0, "none").map(|(_, ranges)| Self::Free { ranges })
            }
            code::POPULATE => {
                decode_ranges(decoder, 0, "none").map(|(_, ranges)| Self::Populate { ranges })
            }
            code::SET_TRACKERS => {
                decode_trackers(decoder).map(|sources| Self::SetTrackers { sources })
            }
            code::START_OUTGOING => decoder.text("target", MAX_ADDRESS).and_then(|target| {
                let options = OutgoingOptions::decode(decoder)?;
                Ok(Self::StartOutgoing { target: target.to_owned(), options })
            }),
            code::START_INCOMING => decoder.text("listen", MAX_ADDRESS).and_then(|listen| {
                let options = IncomingOptions::decode(decoder)?;
                Ok(Self::StartIncoming { listen: listen.to_owned(), options })
            }),
            code::CANCEL => Ok(Self::Cancel),
            code::SET_PARAMETERS => {
                Parameters::decode(decoder).map(|parameters| Self::SetParameters { parameters })
            }
            code::QUERY_STATUS => Ok(Self::QueryStatus),
            code::QUERY_AGENT => Ok(Self::QueryAgent),
            code::BALLOON => decode_balloon(decoder),
            code::PLUGGED_MEMORY => decode_plugged_memory(decoder),
            code::CONNECT_DEVICE => {
                DeviceSpec::decode(decoder).map(|device| Self::ConnectDevice { device })
            }
            code::CONTINUE => decode_journal(decoder).map(|journal| Self::Continue { journal }),
            code::UPGRADE => decoder
                .text("program", MAX_ADDRESS)
                .map(|program| Self::Upgrade { program: program.to_owned() }),
            code::GRANT => Ok(Self::Grant),
            code::OPEN_BASE => decoder
                .text("path", MAX_ADDRESS)
                .map(|path| Self::OpenBase { path: path.to_owned() }),
            code::SUBSCRIBE => decode_subscribe(decoder),
            code::RESUME => {
                decoder.flags("force", 1, "0 or 1").map(|force| Self::Resume { force: force == 1 })
            }
            code::START_POSTCOPY => Ok(Self::StartPostcopy),
            code::RECOVER => decode_recover(decoder),
            code::START_SNAPSHOT => decoder.text("path", MAX_ADDRESS).and_then(|path| {
                let options = SnapshotOptions::decode(decoder)?;
                Ok(Self::StartSnapshot { path: path.to_owned(), options })
            }),
            code::START_RESTORE => decoder.text("path", MAX_ADDRESS).and_then(|path| {
                let options = RestoreOptions::decode(decoder)?;
                Ok(Self::StartRestore { path: path.to_owned(), options })
            }),
            _ => return None,
        })
    }
}

fn decode_balloon(decoder: &mut Decoder<'_>) -> Result<Request, DecodeError> {
    let all = BALLOON_SET_TARGET | BALLOON_ASK_STATS;
    let flags =
        decoder.flags("flags", all, "bit 0, set the target, and bit 1, ask for statistics")?;
    let target = decoder.u64("target")?;
    let is_set = flags & BALLOON_SET_TARGET != 0;
    if !is_set && target != 0 {
        let allowed = "0 without bit 0 of flags";
        return Err(DecodeError::InvalidValue { field: "target", value: target, allowed });
    }
    let ask_stats = flags & BALLOON_ASK_STATS != 0;
    Ok(Request::Balloon { target: is_set.then_some(target), ask_stats })
}

fn decode_plugged_memory(decoder: &mut Decoder<'_>) -> Result<Request, DecodeError> {
    let flags = decoder.flags("flags", 1, "bit 0, set the size")?;
    let requested = decoder.u64("requested")?;
    if flags == 0 && requested != 0 {
        let allowed = "0 without bit 0 of flags";
        return Err(DecodeError::InvalidValue { field: "requested", value: requested, allowed });
    }
    Ok(Request::PluggedMemory { requested: (flags == 1).then_some(requested) })
}

fn decode_hello(decoder: &mut Decoder<'_>) -> Result<Request, DecodeError> {
    let version_min = decoder.u16("version_min")?;
    let version_max = decoder.u16("version_max")?;
    decoder.u32("reserved")?;
    let features = decoder.u64("features")?;
    let (agent, name) = match features & FEATURE_FENCE {
        0 => (0, String::new()),
        _ => (decode_agent_number(decoder)?, decode_vm_name(decoder)?),
    };
    Ok(Request::Hello { version_min, version_max, features, agent, name })
}

fn decode_agent_number(decoder: &mut Decoder<'_>) -> Result<u64, DecodeError> {
    match decoder.u64("agent")? {
        0 => Err(DecodeError::InvalidValue { field: "agent", value: 0, allowed: "from 1" }),
        number => Ok(number),
    }
}

fn decode_vm_name(decoder: &mut Decoder<'_>) -> Result<String, DecodeError> {
    decode_name(decoder, MAX_VM_NAME)
}

/// A name that operators see.
fn decode_name(decoder: &mut Decoder<'_>, limit: usize) -> Result<String, DecodeError> {
    let name = decoder.text("name", limit)?;
    if name.chars().any(char::is_control) {
        return Err(DecodeError::ControlCharacter { field: "name", value: name.to_owned() });
    }
    Ok(name.to_owned())
}

fn decode_add_block(decoder: &mut Decoder<'_>) -> Result<Request, DecodeError> {
    let id = decoder.u32("id")?;
    let flags =
        decoder.flags("flags", BLOCK_DISCARDED | BLOCK_CLONE, "bit 0, discarded, bit 1, clone")?;
    let gpa = decoder.u64("gpa")?;
    let length = decoder.u64("length")?;
    let granularity = decoder.u64("granularity")?;
    let fd_offset = decoder.u64("fd_offset")?;
    let vmm_address = decoder.u64("vmm_address")?;
    let name = decode_name(decoder, MAX_NAME)?;
    Ok(Request::AddBlock {
        geometry: BlockGeometry { id, name, gpa, length, granularity },
        fd_offset,
        vmm_address,
        flags,
    })
}

fn decode_trackers(decoder: &mut Decoder<'_>) -> Result<Trackers, DecodeError> {
    let sources = Trackers::from_wire("sources", decoder.u32("sources")?)?;
    if sources.is_declared() {
        return Ok(sources);
    }
    let allowed =
        "at least one tracker; bit 2, log-is-complete, if every writer marks the shared log";
    Err(DecodeError::InvalidValue { field: "sources", value: 0, allowed })
}

fn decode_recover(decoder: &mut Decoder<'_>) -> Result<Request, DecodeError> {
    let session = decoder.array("session")?;
    let address = decoder.text("address", MAX_ADDRESS)?.to_owned();
    Ok(Request::Recover { session, address, options: OutgoingOptions::decode(decoder)? })
}

fn decode_subscribe(decoder: &mut Decoder<'_>) -> Result<Request, DecodeError> {
    match decoder.u32("interval")? {
        value @ 10..=3_600_000 => {
            Ok(Request::Subscribe { interval: Duration::from_millis(value.into()) })
        }
        value => Err(DecodeError::InvalidValue {
            field: "interval",
            value: value.into(),
            allowed: "10 to 3600000 milliseconds",
        }),
    }
}

#[cfg(test)]
mod tests;
