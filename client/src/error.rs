// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of the client library, and [`chain`], which prints them with their causes.
//!
//! None of them stops the guest ([`vmm-survives`](crate::invariants#vmm-survives)). Before the
//! switchover, an error means that a migration does not happen, never that the guest is lost.

use crate::ownership::Ownership;
use pageferry_protocol::control::SocketError;
use pageferry_protocol::control::job::NotUtf8;
use pageferry_protocol::control::reply::ErrorCode;
use pageferry_protocol::memory::file::MemoryFileError;
use pageferry_protocol::memory::{GeometryError, RangeError};
use pageferry_protocol::shm::MappingError;
use pageferry_protocol::stream::RecordError;
use rustix::io::Errno;
use std::path::PathBuf;
use std::time::Duration;

pub use pageferry_protocol::error::chain;

/// An error of the client library.
///
/// Printed with `{error}` it says only what failed. Why is its
/// [source](std::error::Error::source), as is usual for errors in Rust. [`chain`] prints both in
/// one line, and escapes control characters, since names come from files and peers:
///
/// ```
/// use pageferry_client::error::chain;
/// use pageferry_client::{Client, Config};
///
/// let error = Client::connect("/nowhere/socket".as_ref(), Config::default()).unwrap_err();
/// assert_eq!(error.to_string(), "cannot connect to the agent at /nowhere/socket");
/// let whole = chain(&error);
/// assert!(whole.ends_with("/nowhere/socket: No such file or directory (os error 2)"), "{whole}");
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent died, hung, or broke the protocol. It stays lost until
    /// [`Client::reattach`](crate::Client::reattach); discards and populates continue without it.
    #[error("the agent is lost: {reason}")]
    AgentLost {
        /// What happened, in words.
        reason: String,
    },
    /// The process of an agent that was given up has not exited. Until then it could still take
    /// dirty pages that the next agent has to find, send the commit of a guest, read memory, or
    /// carry out a discard. So no other agent is attached, the guest is not taken by force, and
    /// nothing is freed, populated or removed.
    #[error("process {pid} of the previous agent has not exited: {why}")]
    AgentStillRunning {
        /// Its process id.
        pid: u32,
        /// Why it still lives, and what to do, in words.
        why: String,
    },
    /// The memory of the guest is not all here, and this agent cannot bring the rest.
    #[error("the agent cannot continue to bring the memory of the guest: {why}")]
    CannotContinue {
        /// Why not.
        why: String,
    },
    /// A clone's memory is no private mapping of the base.
    #[error(
        "block {id}: {why}: vmm_address must be a private mapping of length bytes of the base, \
         from fd_offset on"
    )]
    NoPrivateMapping {
        /// The block.
        id: u32,
        /// What is there instead.
        why: String,
    },
    /// The agent is of a version that knows no clones.
    #[error("the agent knows no clones: it is of an older version")]
    NoClones,
    /// A clone's block must be mapped by this process.
    #[error("block {id} cannot be a clone's: another process has the guest's memory mapped")]
    ForeignClone {
        /// The block.
        id: u32,
    },
    /// A duration in the configuration is too short.
    #[error("{field} is {value:?}, allowed are {shortest:?} and more")]
    DurationTooShort {
        /// Its name in [`Config`](crate::Config).
        field: &'static str,
        /// What it is.
        value: Duration,
        /// The shortest that is allowed.
        shortest: Duration,
    },
    /// The name of the VM in the configuration is not allowed.
    #[error("name is {name:?}, allowed are 1 to 128 bytes without control characters, or no name")]
    VmName {
        /// What it is.
        name: String,
    },
    /// The agent refused the request.
    #[error("the agent refused ({code:?}): {sentence}")]
    Refused {
        /// For programs.
        code: ErrorCode,
        /// For people: the field, its value, and what was allowed.
        sentence: String,
    },
    /// The client cannot connect to the socket of the agent.
    #[error("cannot connect to the agent at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The process of the agent cannot be started.
    #[error("cannot start the agent {program:?}")]
    Spawn {
        /// The program.
        program: std::ffi::OsString,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A thread of the client cannot be started.
    #[error("cannot start the thread {name}")]
    Thread {
        /// Its name.
        name: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The hook channel broke. The agent counts as lost.
    #[error("hook channel")]
    HookChannel {
        /// What happened.
        #[source]
        source: SocketError,
    },
    /// The range names a block that was not added.
    #[error("block {id} does not exist")]
    UnknownBlock {
        /// The block.
        id: u32,
    },
    /// The range is not part of its block.
    #[error("block {block}")]
    Range {
        /// The block.
        block: u32,
        /// The numbers.
        #[source]
        source: RangeError,
    },
    /// The block is not valid, or does not fit the others.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The block ends outside the dirty log.
    #[error(
        "block {id}: gpa {gpa:#x} + length {length:#x} ends outside the dirty log, which covers {covers:#x} bytes"
    )]
    OutsideLog {
        /// The block.
        id: u32,
        /// Its guest physical address.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
        /// [`Config::log_covers`](crate::Config::log_covers), rounded up.
        covers: u64,
    },
    /// The mapping of the block would end after the address space.
    #[error("block {id}: vmm_address {vmm_address:#x} + length {length:#x} overflows")]
    MappingOverflow {
        /// The block.
        id: u32,
        /// Its address in the VMM.
        vmm_address: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// Another block is mapped there.
    #[error(
        "block {id}: vmm_address {vmm_address:#x} + length {length:#x} overlaps the mapping of block {other}"
    )]
    MappingOverlap {
        /// The block.
        id: u32,
        /// Its address in the VMM.
        vmm_address: u64,
        /// Its length in bytes.
        length: u64,
        /// The block that it overlaps.
        other: u32,
    },
    /// A part of a range of addresses is not guest memory.
    #[error("{what} address {address:#x} + {length:#x}: {gap:#x} + {gap_length:#x} is in no block")]
    NoBlock {
        /// `guest` or `host`.
        what: &'static str,
        /// The first address.
        address: u64,
        /// The length in bytes.
        length: u64,
        /// The first address that is in no block.
        gap: u64,
        /// How many bytes from there are in no block.
        gap_length: u64,
    },
    /// The region of guest memory has no file, so it cannot be shared with the agent.
    #[error("region at {gpa:#x} + {length:#x} has no file")]
    RegionWithoutFile {
        /// The region's guest physical address.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The bitmap of the region marks another log, or another position in it.
    #[error("region at {gpa:#x}: its bitmap is attached to another dirty log or address already")]
    BitmapAttached {
        /// The region's guest physical address.
        gpa: u64,
    },
    /// A block is not mapped, so it cannot be registered with a userfaultfd.
    #[error(
        "block {id} has no vmm_address, which postcopy, lazy restore, background snapshots and write-protect tracking need"
    )]
    NotMapped {
        /// The block.
        id: u32,
    },
    /// A mapping is registered with a userfaultfd of other code, or by the client for missing
    /// pages. The client switches between its other uses by itself.
    #[error(
        "block {id} is registered with another userfaultfd already, and a mapping can have only one: background \
         snapshots, write-protect tracking, postcopy and lazy restore need it (a snapshot of mode paused does not)"
    )]
    RegisteredElsewhere {
        /// The block.
        id: u32,
    },
    /// A mapping cannot be registered for missing pages.
    #[error(
        "block {id} cannot be registered for missing pages, which postcopy and lazy restore need: is it mapped at its \
         vmm_address, from a memfd, tmpfs or hugetlbfs, and registered with no other userfaultfd, as by write-protect tracking?"
    )]
    Unregistrable {
        /// The block.
        id: u32,
        /// What the kernel said.
        #[source]
        source: pageferry_protocol::userfault::UserfaultError,
    },
    /// There is no userfaultfd, or a mapping cannot be registered.
    #[error(transparent)]
    Userfault(#[from] pageferry_protocol::userfault::UserfaultError),
    /// Something cannot be done in the process that maps the guest's memory, which is another one
    /// ([`Config::mapped_by`](crate::Config::mapped_by)).
    #[error("the process of the VMM")]
    MappingProcess {
        /// Why.
        #[source]
        source: crate::MappingProcessError,
    },
    /// The set of trackers is empty.
    #[error(
        "the set of trackers is empty; if every writer marks the dirty log, declare Trackers::LOG_IS_COMPLETE"
    )]
    EmptyTrackers,
    /// The guest has left, so there is nothing to populate. Trying again does not help.
    #[error("the guest has left: {sentence}")]
    GuestGone {
        /// For people: by what job, or how.
        sentence: String,
    },
    /// The client itself panicked, which is a defect of this library. The agent counts as lost.
    #[error("the hook channel panicked, and the agent was given up: {message}")]
    Panicked {
        /// The message of the panic.
        message: String,
    },
    /// A file cannot be guest memory.
    #[error("block {id}")]
    Memory {
        /// The block.
        id: u32,
        /// What is wrong with the file.
        #[source]
        source: MemoryFileError,
    },
    /// There is no migration to recover.
    #[error("ownership is {ownership:?}, and there is no migration to recover")]
    NothingToRecover {
        /// The ownership.
        ownership: Ownership,
    },
    /// The guest is not ours, so it cannot be sent or saved.
    #[error("ownership is {ownership:?}: only a guest that is ours can be sent or saved")]
    NotOurs {
        /// The ownership.
        ownership: Ownership,
    },
    /// The guest ran before its memory was here, and the missing pages never arrived. So it can be
    /// neither sent nor saved.
    #[error(
        "memory of this guest is missing, since its agent was lost or its image was damaged before all was here: restore it again"
    )]
    MemoryLost,
    /// The address is longer than the protocol carries.
    #[error(
        "address of {length} bytes, allowed are {}",
        pageferry_protocol::control::job::MAX_ADDRESS
    )]
    AddressTooLong {
        /// Length of the address in bytes.
        length: usize,
    },
    /// A path cannot be sent to the agent.
    #[error("{what} {path:?}")]
    Path {
        /// What it is the path of: `image`, or the name of the option.
        what: &'static str,
        /// The path as it was given.
        path: PathBuf,
        /// Why.
        #[source]
        source: PathError,
    },
    /// The job is not the one that the agent runs or ran last.
    #[error("job {job} is not known to the agent, whose last job is {last}")]
    UnknownJob {
        /// The job asked for.
        job: u64,
        /// The agent's last job; 0 if there was none.
        last: u64,
    },
    /// The job did not end in time. It continues.
    #[error("job {job} did not end within {waited:?}: it is {phase}")]
    JobNotEnded {
        /// The job.
        job: u64,
        /// Name of the phase it is in.
        phase: &'static str,
        /// Time that the client has waited.
        waited: Duration,
    },
    /// A record of the page stream is not valid.
    #[error("page stream")]
    Record(#[from] RecordError),
    /// The page stream ended inside a record.
    #[error("page stream: the connection ended inside a record")]
    ClosedInRecord,
    /// The page stream cannot be read or written.
    #[error("page stream")]
    Stream {
        /// What the kernel or the transport said.
        #[source]
        source: std::io::Error,
    },
    /// Memory that the client shares with the agent cannot be mapped.
    #[error("{what}")]
    Mapping {
        /// What the memory is for.
        what: &'static str,
        /// Why.
        #[source]
        source: MappingError,
    },
    /// The kernel refused.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// Why a path cannot be sent to the agent.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// It is empty, or relative to a current directory that no longer exists.
    #[error("cannot be made an absolute path")]
    NotAbsolute {
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It is no file, and no store has it.
    #[error(
        "{scheme} is no scheme of a store, allowed are {}; a file of this name begins with ./",
        pageferry_protocol::image::stored::SCHEMES.join(", ")
    )]
    UnknownScheme {
        /// What stands before `://`.
        scheme: String,
    },
    /// The protocol carries text.
    #[error("the absolute path is not UTF-8")]
    NotUtf8,
    /// It is longer than the protocol carries.
    #[error(
        "the absolute path has {length} bytes, allowed are {}",
        pageferry_protocol::control::job::MAX_ADDRESS
    )]
    TooLong {
        /// Length of the absolute path in bytes.
        length: usize,
    },
}

impl From<NotUtf8> for Error {
    fn from(NotUtf8 { what, path }: NotUtf8) -> Self {
        Self::Path { what, path, source: PathError::NotUtf8 }
    }
}

impl Error {
    /// For `map_err`: the kernel refused `what`.
    pub(crate) fn kernel(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Kernel { what, source }
    }
    /// The same for an error number that the standard library wraps.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Kernel {
            what,
            source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        }
    }
}
